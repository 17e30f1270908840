"""The oracle of the L step: all of F at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..numerics import TINY_MASS, accumulator


def _weights(q, al, cl, key_blocks):
    wide = accumulator(q.dtype)
    f = jnp.einsum(
        "ljd,kjd->jlk", q.astype(wide), al.astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    f = f - cl.T[:, None, :]
    if key_blocks is None:
        return jax.nn.softmax(f, axis=-1), jax.nn.logsumexp(f, axis=-1)
    some = key_blocks.any()
    keep = jnp.where(some, key_blocks, True)
    lse = jnp.where(some, jax.nn.logsumexp(f, axis=-1, where=keep), -jnp.inf)
    return jnp.where(key_blocks, jax.nn.softmax(f, axis=-1, where=keep), 0), lse


def middle(
    q: Float[Array, "m b d"],
    al: Float[Array, "M b d"],
    cl: Float[Array, "M b"],
    *,
    floor: float,
    queries: Bool[Array, "m b"] | None = None,
    key_blocks: Bool[Array, " M"] | None = None,
    block_sizes=None,
) -> Float[Array, "M b d"]:
    """The mean queries `qt` of the next iteration, in float32."""
    del block_sizes
    weights, _ = _weights(q, al, cl, key_blocks)
    if queries is not None:
        weights = jnp.where(queries.T[:, :, None], weights, 0)
    cr = jnp.einsum("jlk->kj", weights)
    total = jnp.einsum(
        "jlk,ljd->kjd", weights, q.astype(cl.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return total / jnp.maximum(cr, max(floor, TINY_MASS))[..., None]


def last(
    q: Float[Array, "m b d"],
    al: Float[Array, "M b d"],
    cl: Float[Array, "M b"],
    y: Float[Array, "M b e"],
    *,
    key_blocks: Bool[Array, " M"] | None = None,
    block_sizes=None,
) -> tuple[Float[Array, "m b e"], Float[Array, "m b"]]:
    """`(out, lse)` in float32; without any key block, zeros and -inf."""
    del block_sizes
    weights, lse = _weights(q, al, cl, key_blocks)
    out = jnp.einsum(
        "jlk,kjd->ljd", weights, y.astype(cl.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return out, lse.T
