"""Fused tiled Monarch attention on a TPU, differentiable."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from .tpu_backward import backward
from .tpu_forward import forward


def tiled(
    q: Float[Array, "g a m b d"],
    k: Float[Array, "g f m b d"],
    v: Float[Array, "g f m b e"],
    *,
    scale: float,
    keys: Bool[Array, "g f m b"] | None = None,
    entropy_gradient: bool = False,
    known: tuple[Float[Array, "g a m b e"], Float[Array, "g a m b"]] | None = None,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g a m b e"], Float[Array, "g a m b"]]:
    """`(out, lse)` of one iteration of tiled Monarch attention; see the room's page.

    `known` is the result, where a caller kept it from an earlier forward pass: nothing is computed
    then, but the gradient is still that of the attention.

    Raises:
        NotImplementedError: for a dtype or a shape that the kernels cannot serve.
    """
    known = jax.lax.stop_gradient(known)
    return _tiled(float(scale), entropy_gradient, block_sizes, q, k, v, keys, known)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tiled(scale, entropy_gradient, block_sizes, q, k, v, keys, known):
    del entropy_gradient
    if known is not None:
        return known
    return forward(q, k, v, keys, scale=scale, block_sizes=block_sizes)


def _forward(scale, entropy_gradient, block_sizes, q, k, v, keys, known):
    part: Any = _tiled(scale, entropy_gradient, block_sizes, q, k, v, keys, known)
    out, lse = part
    return (out, lse), (q, k, v, keys, out, lse)


def _backward(scale, entropy_gradient, block_sizes, saved: Any, gradient: Any):
    q, k, v, keys, out, lse = saved
    dq, dk, dv = backward(
        q, k, v, keys, out, lse, *gradient,
        scale=scale, entropy_gradient=entropy_gradient, block_sizes=block_sizes,
    )  # fmt: skip
    return dq, dk, dv, None, None


_tiled.defvjp(_forward, _backward)
