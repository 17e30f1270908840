"""The oracle of the L step: all of F at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..numerics import TINY_MASS, accumulator


def _weights(q, al, cl, key_blocks, left_out=None):
    wide = accumulator(q.dtype)
    f = jnp.einsum(
        "gljd,gkjd->gjlk", q.astype(wide), al.astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    f = f - cl.swapaxes(1, 2)[:, :, None, :]
    if key_blocks is None and left_out is None:
        return jax.nn.softmax(f, axis=-1), jax.nn.logsumexp(f, axis=-1)
    there = jnp.ones(f.shape, bool)
    if key_blocks is not None:
        there &= key_blocks[:, None, None, :]
    if left_out is not None:
        there &= ~left_out[:, None]
    some = there.any(-1)
    keep = there | ~some[..., None]
    lse = jnp.where(some, jax.nn.logsumexp(f, axis=-1, where=keep), -jnp.inf)
    return jnp.where(there, jax.nn.softmax(f, axis=-1, where=keep), 0), lse


def middle(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    *,
    floor: float,
    queries: Bool[Array, "g m n"] | None = None,
    key_blocks: Bool[Array, "g M"] | None = None,
    block_sizes=None,
) -> Float[Array, "g M n d"]:
    """The mean queries `qt` of the next iteration, in float32."""
    del block_sizes
    weights, _ = _weights(q, al, cl, key_blocks)
    if queries is not None:
        weights = jnp.where(queries.swapaxes(1, 2)[..., None], weights, 0)
    cr = jnp.einsum("gjlk->gkj", weights)
    total = jnp.einsum(
        "gjlk,gljd->gkjd", weights, q.astype(cl.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return total / jnp.maximum(cr, max(floor, TINY_MASS))[..., None]


def last(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    y: Float[Array, "g M n e"],
    *,
    key_blocks: Bool[Array, "g M"] | None = None,
    left_out: Bool[Array, "g m M"] | None = None,
    block_sizes=None,
) -> tuple[Float[Array, "g m n e"], Float[Array, "g m n"]]:
    """`(out, lse)` in float32; without any key block, zeros and -inf.

    `left_out`: the pairs of a query and a key block that are attended to elsewhere.
    """
    del block_sizes
    weights, lse = _weights(q, al, cl, key_blocks, left_out)
    out = jnp.einsum(
        "gjlk,gkjd->gljd", weights, y.astype(cl.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return out, lse.swapaxes(1, 2)
