"""`attend` on a TPU, with its gradient by kernels that compute the scores again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..numerics import MASKED
from .tpu_forward import softmax_rows

Part = tuple[tuple[Float[Array, "g n _"], ...], Float[Array, "g n"]]


def attend(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    values: tuple[Float[Array, "g s _"], ...],
    *,
    scale: float,
    bias: Float[Array, "g s"] | None = None,
    mask: Bool[Array, "g s"] | None = None,
    gains: tuple[float, ...] | None = None,
    known: Part | None = None,
    block_sizes: BlockSizes,
) -> Part:
    """`(outs, lse)`; a row without keys gives zeros and -inf.

        lse[g,n] = logsumexp_s (scale q . k + bias) ;  out = gain * sum_s exp(x - lse) values

    `known` is the result, where a caller kept it from an earlier forward pass: nothing is computed
    then, but the gradient is still that of the attention.

    Raises:
        NotImplementedError: for a dtype or a size that the kernel cannot serve.
    """
    gains = gains or (1.0,) * len(values)
    line = masked_bias(bias, mask)
    known = jax.lax.stop_gradient(known)
    return _attend(float(scale), tuple(gains), block_sizes, q, k, tuple(values), line, known)


def masked_bias(
    bias: Float[Array, "g s"] | None, mask: Bool[Array, "g s"] | None
) -> Float[Array, "g s"] | None:
    """The bias of each key, a very low one where the key is masked."""
    if bias is not None:
        bias = bias.astype(jnp.float32)
    if mask is None:
        return bias
    return jnp.where(mask, 0.0 if bias is None else bias, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, gains, block_sizes, q, k, values, bias, known):
    if known is not None:
        return known
    outs, lse, _ = softmax_rows(
        q, k, values, bias,
        scale=scale, gains=gains, shared=False, entropy=False,
        name="attend", block_sizes=block_sizes,
    )  # fmt: skip
    return outs, lse


def _forward(scale, gains, block_sizes, q, k, values, bias, known):
    part: Any = _attend(scale, gains, block_sizes, q, k, values, bias, known)
    outs, lse = part
    return (outs, lse), (q, k, values, bias, outs, lse, known is not None)


def _backward(scale, gains, block_sizes, saved: Any, gradient: Any):
    from .tpu_backward import backward

    q, k, values, bias, outs, lse, _ = saved
    douts, dlse = gradient
    dq, dk, dvalues, dbias = backward(
        q, k, values, outs, finite(lse), douts, dlse,
        scale=scale, gains=gains, bias=bias, shared=False, block_sizes=block_sizes,
    )  # fmt: skip
    return dq, dk, tuple(dvalues), None if bias is None else dbias, None


def finite(lse: Float[Array, "g n"]) -> Float[Array, "g n"]:
    """A row without keys gets a log-sum-exp above every score: no weight, no gradient."""
    return jnp.where(jnp.isneginf(lse), -MASKED, lse)


_attend.defvjp(_forward, _backward)
