"""The L step of up to 128 frames on a Hopper GPU, forward and backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..gpu.call import ROWS
from ..gpu.checks import check
from ..numerics import MASKED, TINY_MASS, scaled
from . import gpu_backward, gpu_backward_long, gpu_forward, xla


def last(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    y: Float[Array, "g M n e"],
    *,
    key_blocks: Bool[Array, "g M"] | None = None,
    left_out: Bool[Array, "g m M"] | None = None,
    gain: float = 1.0,
    entries: int = 1,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g m n e"], Float[Array, "g m n"]]:
    """`(out, lse)`; zeros and -inf without any key block.

        F[l,k] = gain q[l] . aL[k] - cL[k]
        out[l] = sum_k softmax_k(F) Y[k] ;  lse[l] = logsumexp_k F

    `out` has the dtype of `y`, lse is float32. `entries` says of how many entries of a batch the
    groups are the heads; it changes only where arrays lie. `left_out`: the pairs of a query and a
    key block that are attended to elsewhere; the gradient without them is XLA's.

    Raises:
        NotImplementedError: for a dtype or a size that the kernel cannot serve, and where there
            is no Hopper GPU.
    """
    check(q, al, y)
    _check_lengths(q, al)
    return _last((float(gain), entries, block_sizes), q, al, cl, y, key_blocks, left_out)


def middle(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    *,
    floor: float,
    queries: Bool[Array, "g m n"] | None = None,
    key_blocks: Bool[Array, "g M"] | None = None,
    gain: float = 1.0,
    entries: int = 1,
    block_sizes: BlockSizes,
) -> Float[Array, "g M n d"]:
    """The mean queries of the next iteration, in the dtype of q; gain and entries as above.

        L[l,k] = softmax_k (gain q[l] . aL[k] - cL[k])
        qt[k] = sum_l L q[l] / max(sum_l L, floor)

    Rows that are not `queries` weigh nothing; key blocks that are not `key_blocks` get zeros.

    Raises:
        NotImplementedError: for a dtype or a size that the kernel cannot serve, and where there
            is no Hopper GPU.
    """
    del block_sizes
    check(q, al)
    _check_lengths(q, al)
    settings = max(floor, TINY_MASS), float(gain), entries
    return _middle(settings, q, al, cl, queries, key_blocks)


def _check_lengths(q: Array, al: Array) -> None:
    longest = max(q.shape[1], al.shape[1])
    if longest > gpu_forward.LONGEST:
        raise NotImplementedError(
            f"the GPU kernels of the L step take up to {gpu_forward.LONGEST} frames, got {longest}"
        )


def backward_of(q: Array, al: Array) -> Any:
    """The module with the gradients for so many frames."""
    return gpu_backward if max(q.shape[1], al.shape[1]) <= ROWS else gpu_backward_long


def _bias(cl: Float[Array, "g M n"], key_blocks: Bool[Array, "g M"] | None) -> Array:
    """`-cL` in float32, MASKED for the key blocks that are left out."""
    bias = -cl.astype(jnp.float32)
    return bias if key_blocks is None else jnp.where(key_blocks[..., None], bias, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _last(settings, q, al, cl, y, key_blocks, left_out):
    gain, entries, _ = settings
    bias = _bias(cl, key_blocks)
    return gpu_forward.last(q, al, bias, y, left_out, gain=gain, entries=entries)


def _last_forward(settings, q, al, cl, y, key_blocks, left_out):
    saved = q, al, cl, y, key_blocks, left_out
    return _last(settings, *saved), saved


def _last_backward(settings, saved: Any, gradient: Any):
    gain, entries, block_sizes = settings
    q, al, cl, y, key_blocks, left_out = saved
    if left_out is None:
        dq, dal, dcl, dy = backward_of(q, al).last_backward(
            q, al, _bias(cl, key_blocks), y, *gradient, gain=gain, entries=entries
        )
        return dq, dal, dcl.astype(cl.dtype), dy, None, None

    def again(q, al, cl, y):
        out, lse = xla.last(
            q, scaled(al, gain), cl, y,
            key_blocks=key_blocks, left_out=left_out, block_sizes=block_sizes,
        )  # fmt: skip
        return out.astype(y.dtype), lse

    return *jax.vjp(again, q, al, cl, y)[1](gradient), None, None


_last.defvjp(_last_forward, _last_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _middle(settings, q, al, cl, queries, key_blocks):
    floor, gain, entries = settings
    bias = _bias(cl, key_blocks)
    return gpu_forward.middle(q, al, bias, queries, floor=floor, gain=gain, entries=entries)


def _middle_forward(settings, q, al, cl, queries, key_blocks):
    qt = _middle(settings, q, al, cl, queries, key_blocks)
    return qt, (q, al, cl, queries, key_blocks)


def _middle_backward(settings, saved: Any, dqt):
    floor, gain, entries = settings
    q, al, cl, queries, key_blocks = saved
    dq, dal, dcl = backward_of(q, al).middle_backward(
        q, al, _bias(cl, key_blocks), queries, dqt, floor=floor, gain=gain, entries=entries
    )
    return dq, dal, dcl.astype(cl.dtype), None, None


_middle.defvjp(_middle_forward, _middle_backward)
