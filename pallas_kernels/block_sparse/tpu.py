"""Block-sparse attention on a TPU, with its gradient by kernels that compute the scores again."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from ..block_sizes import BlockSizes
from . import walk
from .tpu_forward import forward


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
        NotImplementedError: for a dtype, a size or a block that the kernels cannot serve.
    """
    walk.check(block, q, k, v)
    if 0 in indices.shape:
        raise NotImplementedError("TPU kernels take no empty arrays")
    return _attend((block, length, float(scale), block_sizes), q, k, v, indices, counts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, indices, counts):
    block, length, scale, sizes = static
    return forward(
        q, k, v, indices, counts, block=block, length=length, scale=scale, block_sizes=sizes
    )


def _forward(static, q, k, v, indices, counts):
    part: Any = _attend(static, q, k, v, indices, counts)
    out, lse = part
    return (out, lse), (q, k, v, indices, counts, out, lse)


def _backward(static, saved: Any, gradient: Any):
    from .tpu_backward import backward

    block, length, scale, sizes = static
    dq, dk, dv = backward(
        *saved, *gradient, block=block, length=length, scale=scale, block_sizes=sizes
    )
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)
