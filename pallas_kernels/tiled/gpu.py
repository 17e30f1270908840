"""Tiled Monarch attention on a Hopper GPU, differentiable.

The gradient runs R and L steps again, one query tile at a time, whose averages are as large as K
and V: R steps by their kernel and by cuDNN's backward pass, L steps by XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..gpu.checks import check
from ..l_step import xla as l_step
from ..r_step import gpu as r_step
from .gpu_forward import forward
from .gpu_r_step import LONGEST_BLOCK


def tiled(
    q: Float[Array, "g a m b d"],
    k: Float[Array, "g f m b d"],
    v: Float[Array, "g f m b e"],
    *,
    scale: float,
    keys: Bool[Array, "g f m b"] | None = None,
    entropy_gradient: bool = False,
    known: tuple[Float[Array, "g a m b e"], Float[Array, "g a m b"]] | None = None,
    entries: int = 1,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g a m b e"], Float[Array, "g a m b"]]:
    """`(out, lse)` of one iteration of tiled Monarch attention; see the room's page.

    `known` is the result, where a caller kept it from an earlier forward pass: nothing is computed
    then, but the gradient is still that of the attention. `entries` says of how many entries of a
    batch the groups are the heads; it changes only where arrays lie.

    Raises:
        NotImplementedError: for a dtype or a size that the kernels cannot serve, for masked keys,
            and where there is no Hopper GPU.
    """
    check(q, k, v)
    if keys is not None:
        raise NotImplementedError("the GPU kernels of tiled Monarch take no masked keys")
    if q.shape[3] > LONGEST_BLOCK:
        raise NotImplementedError(
            f"the GPU kernels of tiled Monarch take blocks of up to {LONGEST_BLOCK} tokens, "
            f"got {q.shape[3]}"
        )
    known = jax.lax.stop_gradient(known)
    settings = float(scale), entropy_gradient, entries, block_sizes
    return _tiled(*settings, q, k, v, known)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _tiled(scale, entropy_gradient, entries, block_sizes, q, k, v, known):
    del entropy_gradient
    if known is not None:
        return known
    return forward(q, k, v, scale=scale, most=block_sizes.bytes(), entries=entries)


def _forward(scale, entropy_gradient, entries, block_sizes, q, k, v, known):
    part = _tiled(scale, entropy_gradient, entries, block_sizes, q, k, v, known)
    return part, (q, k, v)


def _backward(scale, entropy_gradient, entries, block_sizes, saved: Any, gradient: Any):
    q, k, v = saved
    g, m = q.shape[0], q.shape[2]
    blocks = [x.reshape(g, -1, *x.shape[3:]) for x in (k, v)]

    def one_tile(rows: Array, k: Array, v: Array) -> tuple[Array, Array]:
        step = r_step.r_step(
            jnp.tile(rows, (1, k.shape[1] // m, 1, 1)), k, (v,),
            scale=scale, entropy_gradient=entropy_gradient, entries=entries,
            block_sizes=block_sizes,
        )  # fmt: skip
        out, lse = l_step.last(rows, step.al, step.cl, step.ys[0], block_sizes=block_sizes)
        return out.astype(v.dtype), lse

    def add(total: Any, tile: Any) -> Any:
        rows, cotangents = tile
        _, pullback = jax.vjp(one_tile, rows, *blocks)
        dq, *found = pullback(cotangents)
        return jax.tree.map(jnp.add, total, [x.astype(jnp.float32) for x in found]), dq

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in blocks]
    tiles = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, gradient))
    total, dq = jax.lax.scan(add, zeros, tiles)
    dk, dv = (x.astype(k.dtype).reshape(like.shape) for x, like in zip(total, (k, v), strict=True))
    return dq.swapaxes(0, 1), dk, dv, None


_tiled.defvjp(_forward, _backward)
