"""Linear attention: every query sees every key, through a state of `head_dim x value_dim`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmonarch_jax.pallas_kernels.numerics import accumulator, precision

from . import checks

# Added to the normaliser, a mean over keys: a query without a positive feature gives zeros.
EPSILON = 1e-6

FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1,
}


def linear_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads value_dim"],
    *,
    rotate: Callable[[Array], Array] | None = None,
    feature_map: str = "relu",
    eps: float = EPSILON,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention by a product of features, linear in the number of tokens.

        out[n] = (R phi(q[n])) . mean_s (R phi(k[s])) v[s]^T / (phi(q[n]) . mean_s phi(k[s]) + eps)

    `R` is a rotation that depends on a token's place (RoPE). It stands in the numerator alone: the
    normaliser stays a sum of products of positive features, which a rotation would let vanish.
    Matmul FLOPs a head: `4 N d e` (`vm.flops.linear_branch`).

    It has no log-sum-exp, because its weights are no softmax: it is no part, and carries no
    certificate.

    Args:
        query: `[batch, seq, heads, head_dim]`, before RoPE.
        key: `[batch, keys, heads, head_dim]`, before RoPE.
        value: `[batch, keys, heads, value_dim]`.
        rotate: R, on arrays like query and key; `None`: no rotation.
        feature_map: phi, "relu" or "elu" (`elu(x) + 1`).
        eps: added to the normaliser.

    Returns:
        `[batch, seq, heads, value_dim]`, in the dtype of the inputs; sums are float32.

    Raises:
        ValueError: if shapes, dtypes or options are wrong.

    Example:
        >>> out = vm.linear_attention(query, key, value)

    Reference: SALAD (arXiv 2601.16515), the linear branch. The mean over keys instead of the sum
    changes nothing but what `eps` is measured against.
    """
    query, key, value = checks.attention_inputs(query, key, value, same_length=False)
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"`feature_map` must be one of {sorted(FEATURE_MAPS)}, got {feature_map!r}"
        )
    eps = checks.finite("eps", eps, least=0)
    dtype, wide = value.dtype, accumulator(value.dtype)
    exact: dict[str, Any] = {
        "precision": precision(dtype),
        "preferred_element_type": wide,
    }
    phi = FEATURE_MAPS[feature_map]
    q, k = phi(query), phi(key)
    normaliser = jnp.einsum(
        "znhd,zhd->znh", q.astype(wide), k.mean(1, dtype=wide), precision=precision(wide)
    )
    if rotate is not None:
        q, k = (checks.rotated(rotate, x).astype(dtype) for x in (q, k))
    state = jnp.einsum("zshd,zshe->zhde", k, value, **exact) / key.shape[1]
    # The state is the sum over all tokens: what is rounded here is rounded for every query.
    out = jnp.einsum("znhd,zhde->znhe", q.astype(wide), state, precision=precision(wide))
    return (out / (normaliser + eps)[..., None]).astype(dtype)
