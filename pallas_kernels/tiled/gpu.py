"""Tiled Monarch attention on a Hopper GPU, differentiable.

The gradient runs the R steps again, for some groups or some query tiles at a time. It takes the L
steps' gradients from a kernel for tiles of up to 64 blocks, else from XLA, and the R steps' as
`r_step` does.
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
from ..r_step.step import RStep
from ..varying import varying
from .gpu_forward import divisor, forward
from .gpu_l_step_backward import LONGEST, l_step_backward
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
    part: Any = _tiled(scale, entropy_gradient, entries, block_sizes, q, k, v, known)
    return part, (q, k, v, part)


def _backward(scale, entropy_gradient, entries, block_sizes, saved: Any, gradient: Any):
    q, k, v, part = saved
    g, a = q.shape[:2]
    # The averages of one query tile of a group have as many bytes as its K and V, and they are
    # there with their gradients.
    fit = max(1, block_sizes.bytes() // 2 * g // (k.nbytes + v.nbytes))
    tiles = divisor(a, fit)
    groups = divisor(g, fit // a) if tiles == a else 1
    some = functools.partial(
        _gradients, scale, entropy_gradient, entries if groups == g else 1, block_sizes, tiles
    )
    arrays = (q, k, v, part, gradient)
    if groups == g:
        return (*some(arrays), None)
    apart = jax.tree.map(lambda x: x.reshape(-1, groups, *x.shape[1:]), arrays)
    found = jax.lax.map(some, apart)
    return (*jax.tree.map(lambda x: x.reshape(g, *x.shape[2:]), found), None)


def _gradients(scale, entropy_gradient, entries, block_sizes, tiles, arrays: Any) -> Any:
    """`(dq, dk, dv)` of some groups, so many query tiles at a time."""
    q, k, v, part, gradient = arrays
    g, _, m, b, d = q.shape
    blocks = [x.reshape(g, -1, *x.shape[3:]) for x in (k, v)]

    def averages(qt: Array, k: Array, v: Array) -> Any:
        return r_step.r_step(
            qt, k, (v,),
            scale=scale, entropy_gradient=entropy_gradient, entries=entries,
            block_sizes=block_sizes,
        )  # fmt: skip

    def last(*arrays: Array) -> tuple[Array, Array]:
        out, lse = l_step.last(*arrays, block_sizes=block_sizes)
        return out.astype(v.dtype), lse

    def add(total: Any, these: Any) -> Any:
        rows, (out, lse), (dout, dlse) = these
        step, pullback = jax.vjp(averages, jnp.tile(rows, (1, k.shape[1], 1, 1)), *blocks)
        arrays = rows, step.al, step.cl, step.ys[0]
        if m <= LONGEST:
            delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - dlse
            dq, dal, dcl, dy = l_step_backward(*arrays, lse, dout, delta, entries=entries)
        else:
            dq, dal, dcl, dy = jax.vjp(last, *arrays)[1]((dout, dlse))
        dqt, *found = pullback(RStep(dal, (dy,), dcl, jnp.zeros_like(step.lse)))
        dqt = dqt.reshape(g, -1, *rows.shape[1:]).sum(1, dtype=jnp.float32)
        total = jax.tree.map(jnp.add, total, [x.astype(jnp.float32) for x in found])
        return total, (dq.astype(jnp.float32) + dqt).astype(q.dtype)

    def side_by_side(x: Array) -> Array:
        x = x.reshape(g, -1, tiles, *x.shape[2:])
        x = jnp.moveaxis(x, (1, 3), (0, 2))  # [a / tiles, g, m, tiles, b, ...]
        return x.reshape(*x.shape[:3], tiles * b, *x.shape[5:])

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in blocks]
    steps = jax.tree.map(side_by_side, (q, part, gradient))
    total, dq = jax.lax.scan(add, varying(zeros, blocks, steps), steps)
    dq = jnp.moveaxis(dq.reshape(-1, g, m, tiles, b, d), (0, 2), (1, 3))
    dk, dv = (x.astype(k.dtype).reshape(like.shape) for x, like in zip(total, (k, v), strict=True))
    return dq.reshape(q.shape), dk, dv


_tiled.defvjp(_forward, _backward)
