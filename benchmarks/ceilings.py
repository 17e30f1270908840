"""What this machine could do at best: the prediction that a measurement is held against."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp

import vmonarch_jax as vm

from .timing import alternate


def rates(block: int, head_dim: int, dtype: Any) -> dict[str, float]:
    """FLOP/s of score products of one block, and exponentials a second, both out of cache."""
    groups = max(1, 2**22 // (block * block))
    q, k = jax.random.normal(jax.random.key(0), (2, groups, block, head_dim), dtype)
    scores = jnp.zeros((2**20,), jnp.float32)  # 4 MiB
    product = jax.jit(lambda q, k: jnp.einsum("gjd,gid->gji", q, k))
    exponential = jax.jit(lambda x: jnp.exp(x).sum())
    seconds = alternate({"flops": lambda: product(q, k), "exps": lambda: exponential(scores)}, 15)
    work = {"flops": 2 * groups * block * block * head_dim, "exps": scores.size}
    return {name: work[name] / statistics.median(seconds[name]) for name in work}


def exponentials(method: Any, grid: vm.VideoGrid, heads: int) -> int:
    """Softmax weights that a method computes, each an exponential."""
    if isinstance(method, vm.Dense):
        return heads * grid.tokens**2
    a, m, b = vm.flops.tiling_of(method, grid).sizes
    frames = method.recompute_frames
    exact = (frames if isinstance(frames, int) else len(frames)) * grid.frame_tokens * grid.tokens
    return heads * (method.steps * (a * a * m * b * b + b * (m * a) ** 2) + exact)


def prediction(method: Any, grid: vm.VideoGrid, heads: int, head_dim: int, rate: dict) -> float:
    """Seconds of the products at the measured rate plus those of the exponentials at theirs."""
    flops = vm.flops.attention(method, grid, heads=heads, head_dim=head_dim)
    return flops / rate["flops"] + exponentials(method, grid, heads) / rate["exps"]
