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
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g a m b e"], Float[Array, "g a m b"]]:
    """`(out, lse)` of one iteration of tiled Monarch attention; see the room's page.

    Raises:
        NotImplementedError: for a dtype or a shape that the kernels cannot serve.
    """
    return _tiled(float(scale), entropy_gradient, block_sizes, q, k, v, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tiled(scale, entropy_gradient, block_sizes, q, k, v, keys):
    del entropy_gradient
    return forward(q, k, v, keys, scale=scale, block_sizes=block_sizes)


def _forward(scale, entropy_gradient, block_sizes, q, k, v, keys):
    part: Any = _tiled(scale, entropy_gradient, block_sizes, q, k, v, keys)
    out, lse = part
    return (out, lse), (q, k, v, keys, out, lse)


def _backward(scale, entropy_gradient, block_sizes, saved: Any, gradient: Any):
    q, k, v, keys, out, lse = saved
    dq, dk, dv = backward(
        q, k, v, keys, out, lse, *gradient,
        scale=scale, entropy_gradient=entropy_gradient, block_sizes=block_sizes,
    )  # fmt: skip
    return dq, dk, dv, None


_tiled.defvjp(_forward, _backward)
