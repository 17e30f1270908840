"""Block-sparse attention on a Hopper GPU, with its gradient, and masses of blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attend.gpu import attend
from ..block_sizes import BlockSizes
from ..gpu.checks import check
from . import gpu_walk
from .gpu_forward import forward


def block_sparse(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    indices: Int[Array, "g p c"],
    counts: Int[Array, "g p"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"]]:
    """`(out, lse)`; a row without keys gives zeros and -inf. Differentiable in q, k and v.

    Raises:
        NotImplementedError: for a dtype, a size or a block that the kernels cannot serve, and where
            there is no Hopper GPU.
    """
    del block_sizes
    _check(block, q, k, v)
    if 0 in indices.shape:
        raise NotImplementedError("GPU kernels take no empty arrays")
    keep = gpu_walk.keep_map(indices, counts, k.shape[1] // block)
    return _attend((block, length, float(scale), indices.shape[2]), q, k, v, keep)


def block_mass(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    lse: Float[Array, "g n"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> Float[Array, "g p blocks"]:
    """The mass of every pair of blocks; a padded row has an infinite `lse`. It has no gradient.

    Raises:
        NotImplementedError: for a dtype, a size or a block that the kernel cannot serve, and where
            there is no Hopper GPU.
    """
    from .gpu_mass import masses

    del block_sizes
    _check(block, q, k)
    return masses(q, k, lse, block=block, length=length, scale=float(scale))


def attend_mass(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    *,
    block: int,
    rows: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"], Float[Array, "g p blocks"]]:
    """Dense `(out, lse)` and the mass of its weights; only the first `rows` queries have any.

    Two passes: a row's weights are known when all its keys have been seen. The padding of the keys
    is cut off, as the kernel of dense attention takes no mask.

    Raises:
        NotImplementedError: as `block_mass`, and where dense attention has no kernel.
    """
    _check(block, q, k, v)
    near, values = (x[:, :length] for x in (k, v))
    (out,), lse = attend(q, near, (values,), scale=scale, block_sizes=block_sizes)
    weighed = jnp.where(jnp.arange(q.shape[1]) < rows, lse, jnp.inf)
    known = jax.lax.stop_gradient((q, k, weighed))
    mass = block_mass(*known, block=block, length=length, scale=scale, block_sizes=block_sizes)
    return out, lse, mass


def _check(block: int, *arrays: Array) -> None:
    check(*arrays)
    if block not in gpu_walk.BLOCKS:
        raise NotImplementedError(
            f"GPU kernels take blocks of {' or '.join(map(str, gpu_walk.BLOCKS))} tokens, "
            f"got {block}"
        )
    if arrays[0].shape[0] > gpu_walk.MOST_GROUPS:
        raise NotImplementedError(
            f"GPU kernels take at most {gpu_walk.MOST_GROUPS} groups, got {arrays[0].shape[0]}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, keep):
    block, length, scale, kept = static
    order = gpu_walk.schedule(keep, block, length, block)
    return forward(q, k, v, order, block=block, scale=scale, kept=kept)


def _forward(static, q, k, v, keep):
    part: Any = _attend(static, q, k, v, keep)
    out, lse = part
    return (out, lse), (q, k, v, keep, out, lse)


def _backward(static, saved: Any, gradient: Any):
    from .gpu_backward import backward

    block, length, scale, kept = static
    dq, dk, dv = backward(*saved, *gradient, block=block, length=length, scale=scale, kept=kept)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)
