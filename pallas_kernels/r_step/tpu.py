"""The R step on a TPU: attention of the mean queries on their block, `[K | V]` as its values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..attend.tpu import finite, masked_bias
from ..attend.tpu_forward import softmax_rows
from ..block_sizes import BlockSizes
from ..l_step.packing import packs
from ..l_step.tpu import position_attention
from .step import RStep

# Blocks up to this length (tubes through time) are better taken position by position.
SHORT = 48


def r_step(
    qt: Float[Array, "g M n d"],
    k: Float[Array, "g M b d"],
    values: tuple[Float[Array, "g M b _"], ...],
    *,
    scale: float,
    keys: Bool[Array, "g M b"] | None = None,
    entropy_gradient: bool = False,
    known: RStep | None = None,
    block_sizes: BlockSizes,
) -> RStep:
    """One kernel: aL, Y, cL and the log-sum-exp of each row leave it together.

        lse = logsumexp_i (scale qt . K) ;  aL = scale R K ;  Y = R V ;  cL = qt . aL - lse

    `known` is the result, where a caller kept it from an earlier forward pass: nothing is computed
    then, but the gradient is still that of the R step. (Very short blocks are computed anew.)

    Raises:
        NotImplementedError: for a dtype or a size that the kernel cannot serve.
    """
    if max(qt.shape[2], k.shape[2]) <= SHORT and packs(qt.shape[2], k.shape[2]):
        return _short(qt, k, values, scale, keys, entropy_gradient, block_sizes)
    known = jax.lax.stop_gradient(known)
    statics = (float(scale), entropy_gradient, block_sizes)
    step: Any = _r_step(*statics, qt, k, tuple(values), masked_bias(None, keys), known)
    return step if entropy_gradient else step._replace(cl=jax.lax.stop_gradient(step.cl))


def _short(qt, k, values, scale, keys, entropy_gradient, block_sizes) -> RStep:
    """Key blocks are the positions of an attention over a short axis, many in one product.

    Such blocks run through time or height in memory: the axes were swapped to get here, and
    swapping them back costs nothing. A result that was kept would save a cheap kernel.
    """

    def swap(x: Array) -> Array:
        return jnp.swapaxes(x, 1, 2)

    turned = swap(k)
    (al, *ys), lse = position_attention(
        swap(qt), turned, (turned, *map(swap, values)),
        scale=scale, gains=(scale, *(1.0 for _ in values)),
        key_blocks=None if keys is None else swap(keys), block_sizes=block_sizes,
    )  # fmt: skip
    al, lse = swap(al), swap(lse)
    cl = jnp.sum(qt.astype(jnp.float32) * al.astype(jnp.float32), axis=-1) - lse
    if keys is not None:
        cl = jnp.where(keys.any(-1, keepdims=True), cl, 0)
    cl = cl if entropy_gradient else jax.lax.stop_gradient(cl)
    return RStep(al, tuple(map(swap, ys)), cl, lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _r_step(scale, entropy_gradient, block_sizes, qt, k, values, bias, known):
    del entropy_gradient
    if known is not None:
        return known
    (al, *ys), lse, cl = softmax_rows(
        _flat(qt), _flat(k), [_flat(v) for v in values], None if bias is None else _flat(bias),
        scale=scale, gains=(scale, *(1.0 for _ in values)), shared=True, entropy=True,
        name="r_step", block_sizes=block_sizes,
    )  # fmt: skip
    lead = k.shape[:2]
    return RStep(
        _whole(al, lead), tuple(_whole(y, lead) for y in ys), _whole(cl, lead), _whole(lse, lead)
    )


def _forward(scale, entropy_gradient, block_sizes, qt, k, values, bias, known):
    step = _r_step(scale, entropy_gradient, block_sizes, qt, k, values, bias, known)
    return step, (qt, k, values, bias, step)


def _backward(scale, entropy_gradient, block_sizes, saved: Any, gradient: RStep):
    """By the gradient of `attend`; that of cL enters through `cL = qt . aL - lse`."""
    from ..attend.tpu_backward import backward

    qt, k, values, bias, step = saved
    dal, dlse, through = gradient.al, gradient.lse, None
    if entropy_gradient:
        dcl = gradient.cl
        if bias is not None:  # cL is the constant 0 where there is no key
            dcl = jnp.where(jnp.isneginf(step.lse), 0, dcl)
        wide = dcl[..., None]
        dal = (dal + wide * qt.astype(jnp.float32)).astype(dal.dtype)
        through = wide * step.al.astype(jnp.float32)
        dlse = dlse - dcl
    dq, dk, dvalues, _ = backward(
        _flat(qt), _flat(k), tuple(_flat(v) for v in values),
        tuple(_flat(x) for x in (step.al, *step.ys)), finite(_flat(step.lse)),
        tuple(_flat(x) for x in (dal, *gradient.ys)), _flat(dlse),
        scale=scale, gains=(scale, *(1.0 for _ in values)),
        bias=None if bias is None else _flat(bias), shared=True, block_sizes=block_sizes,
    )  # fmt: skip
    lead = k.shape[:2]
    dq = _whole(dq, lead)
    if through is not None:
        dq = (dq + through).astype(qt.dtype)
    return dq, _whole(dk, lead), tuple(_whole(dv, lead) for dv in dvalues), None, None


_r_step.defvjp(_forward, _backward)


def _flat(x: Array) -> Array:
    """Batch, heads and key blocks are all groups to the kernel."""
    return x.reshape(-1, *x.shape[2:])


def _whole(x: Any, lead: tuple[int, int]) -> Array:
    return x.reshape(*lead, *x.shape[1:])
