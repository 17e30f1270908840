"""The L step on a TPU: a small attention at every position, with its gradient by kernels too.

Up to 128 frames a position's scores are made at once, several positions in one product
(`tpu_forward.py`). Beyond, and where rows and key blocks are too unlike to pack, the arrays are
turned to `[positions, frames, d]`: `last` is then plain attention with `-cL` as its bias, and
`middle` is two attentions: one of the rows to the key blocks for
their log-sum-exp, and one of the key blocks to the rows, with its negative as bias,

    lse[l] = logsumexp_k F ;  mean[k], w[k] = attention of aL[k] to q with bias -lse[l]
    cR[k] = exp(w[k] - cL[k]) ;  qt[k] = mean[k] cR[k] / max(cR[k], floor)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..attend.tpu import attend
from ..block_sizes import BlockSizes
from ..numerics import MASKED, TINY_MASS
from ..tpu.mode import available
from . import tpu_forward
from .packing import packs


def last(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    y: Float[Array, "g M n e"],
    *,
    key_blocks: Bool[Array, "g M"] | None = None,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g m n e"], Float[Array, "g m n"]]:
    """`(out, lse)`; zeros and -inf without any key block.

        F[l,k] = q[l] . aL[k] - cL[k] ;  out[l] = sum_k softmax_k(F) Y[k] ;  lse[l] = logsumexp_k F

    `out` has the dtype of `y`, lse is float32.

    Raises:
        NotImplementedError: for a dtype or a size that the kernels cannot serve.
    """
    (out,), lse = position_attention(
        q, al, (y,), shift=cl, key_blocks=key_blocks, block_sizes=block_sizes
    )
    return out, lse


def position_attention(
    q: Float[Array, "g m n d"],
    k: Float[Array, "g M n d"],
    values: tuple[Float[Array, "g M n _"], ...],
    *,
    scale: float = 1.0,
    gains: tuple[float, ...] | None = None,
    shift: Float[Array, "g M n"] | None = None,
    key_blocks: Bool[Array, "g M"] | Bool[Array, "g M n"] | None = None,
    block_sizes: BlockSizes,
) -> tuple[tuple[Float[Array, "g m n _"], ...], Float[Array, "g m n"]]:
    """`(outs, lse)` of softmax attention along the second axis, for every position by itself.

        x[l,k] = scale q[l] . k[k] - shift[k]                 (where `key_blocks` is true)
        lse[l] = logsumexp_k x ;  out[l] = gain * sum_k exp(x - lse) values[k]

    A value that is `k` itself, the same object, is read from memory once. A row without keys
    gives zeros and -inf.

    Raises:
        NotImplementedError: for a dtype or a size that the kernels cannot serve.
    """
    _check(q, k, *values)
    gains = gains or (1.0,) * len(values)
    if not packs(q.shape[1], k.shape[1]):
        return _long_attention(q, k, values, scale, gains, shift, key_blocks, block_sizes)
    shared = bool(values) and values[0] is k
    settings = (float(scale), tuple(gains), shared, block_sizes)
    return _attention(settings, q, k, tuple(values[shared:]), shift, key_blocks)


def middle(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    *,
    floor: float,
    queries: Bool[Array, "g m n"] | None = None,
    key_blocks: Bool[Array, "g M"] | None = None,
    block_sizes: BlockSizes,
) -> Float[Array, "g M n d"]:
    """The mean queries of the next iteration, in the dtype of q.

        L[l,k] = softmax_k (q[l] . aL[k] - cL[k]) ;  qt[k] = sum_l L q[l] / max(sum_l L, floor)

    Rows that are not `queries` weigh nothing; key blocks that are not `key_blocks` get zeros.

    Raises:
        NotImplementedError: for a dtype or a size that the kernels cannot serve.
    """
    _check(q, al)
    if not packs(q.shape[1], al.shape[1]):
        return _long_middle(q, al, cl, floor, queries, key_blocks, block_sizes)
    return _middle((max(floor, TINY_MASS), block_sizes), q, al, cl, queries, key_blocks)


def _check(q: Array, *others: Array) -> None:
    if not available():
        raise NotImplementedError("TPU kernels need a TPU")
    dtypes = {x.dtype for x in (q, *others)}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
        names = sorted(str(dtype) for dtype in dtypes)
        raise NotImplementedError(f"TPU kernels take bfloat16 or float32 throughout, got {names}")
    if any(0 in x.shape for x in (q, *others)):
        raise NotImplementedError("TPU kernels take no empty arrays")


def _bias(shift: Any, key_blocks: Any, shape: tuple[int, ...]) -> Float[Array, "g M n"]:
    """`-shift` in float32; MASKED for the keys that are left out."""
    bias = jnp.zeros(shape, jnp.float32) if shift is None else -shift.astype(jnp.float32)
    if key_blocks is None:
        return bias
    return jnp.where(key_blocks[..., None] if key_blocks.ndim == 2 else key_blocks, bias, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q, k, values, shift, key_blocks):
    scale, gains, shared, block_sizes = settings
    bias = _bias(shift, key_blocks, k.shape[:3])
    return tpu_forward.last(
        q, k, values, bias, scale=scale, gains=gains, shared=shared, block_sizes=block_sizes
    )


def _attention_forward(settings, q, k, values, shift, key_blocks):
    part: Any = _attention(settings, q, k, values, shift, key_blocks)
    outs, lse = part
    return (outs, lse), (q, k, values, shift, key_blocks, lse)


def _attention_backward(settings, saved, gradient):
    from .tpu_backward import last_backward

    scale, gains, shared, block_sizes = settings
    q, k, values, shift, key_blocks, lse = saved
    douts, dlse = gradient
    dq, dk, dshift, dvalues = last_backward(
        q, k, shift, (k, *values) if shared else values, None, lse, douts, dlse,
        scale=scale, gains=gains, key_blocks=key_blocks, block_sizes=block_sizes,
    )  # fmt: skip
    if shared:
        dk = dk + dvalues[0]
    return dq, dk, tuple(dvalues[shared:]), dshift, None


_attention.defvjp(_attention_forward, _attention_backward)


def _long_attention(q, k, values, scale, gains, shift, key_blocks, block_sizes):
    """Attention of groups of rows, a group a position."""
    g, _, n, _ = q.shape

    def turned(x: Any) -> Any:
        return x.swapaxes(1, 2).reshape(g * n, x.shape[1], *x.shape[3:])

    def back(x: Any) -> Any:
        return x.reshape(g, n, *x.shape[1:]).swapaxes(1, 2)

    if key_blocks is not None and key_blocks.ndim == 2:
        key_blocks = jnp.broadcast_to(key_blocks[..., None], k.shape[:3])
    outs, lse = attend(
        turned(q), turned(k), tuple(turned(v) for v in values),
        scale=scale, gains=gains, block_sizes=block_sizes,
        bias=None if shift is None else -turned(shift.astype(jnp.float32)),
        mask=None if key_blocks is None else turned(key_blocks),
    )  # fmt: skip
    return tuple(back(out) for out in outs), back(lse)


def _long_middle(q, al, cl, floor, queries, key_blocks, block_sizes):
    cl = cl.astype(jnp.float32)
    _, lse = _long_attention(q, al, (al,), 1.0, (1.0,), cl, key_blocks, block_sizes)
    some = jnp.isfinite(lse)
    if queries is not None:
        some &= queries
    (mean,), total = _long_attention(
        al, q, (q,), 1.0, (1.0,), jnp.where(some, lse, 0.0), some, block_sizes
    )
    # No more than every row's whole attention: the two passes round huge logits differently.
    mass = jnp.exp(jnp.minimum(total - cl, jnp.log(float(q.shape[1]))))  # cR
    share = mass / jnp.maximum(mass, max(floor, TINY_MASS))
    if key_blocks is not None:
        share = jnp.where(key_blocks[..., None], share, 0.0)
    return (mean.astype(jnp.float32) * share[..., None]).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _middle(settings, q, al, cl, queries, key_blocks):
    floor, block_sizes = settings
    bias = _bias(cl, key_blocks, al.shape[:3])
    return tpu_forward.middle(q, al, bias, queries, floor=floor, block_sizes=block_sizes)


def _middle_forward(settings, q, al, cl, queries, key_blocks):
    qt = _middle(settings, q, al, cl, queries, key_blocks)
    return qt, (q, al, cl, queries, key_blocks)


def _middle_backward(settings, saved, dqt):
    from .tpu_backward import middle_backward

    floor, block_sizes = settings
    q, al, cl, queries, key_blocks = saved
    dq, dal, dcl = middle_backward(
        q, al, cl, None, dqt,
        floor=floor, queries=queries, key_blocks=key_blocks, block_sizes=block_sizes,
    )  # fmt: skip
    return dq, dal, dcl, None, None


_middle.defvjp(_middle_forward, _middle_backward)
