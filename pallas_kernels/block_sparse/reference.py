"""The oracle of block-sparse attention and of block masses: all scores at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..numerics import accumulator

HIGHEST = jax.lax.Precision.HIGHEST


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
    block_sizes=None,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"]]:
    """`(out, lse)` by definition, in float32; a row without keys gives zeros and -inf."""
    del block_sizes
    blocks = k.shape[1] // block
    used = jnp.arange(indices.shape[-1]) < counts[..., None]
    # Slots that are not used point behind the last block, where no one-hot is.
    chosen = jnp.where(used, indices, blocks)
    pairs = jax.nn.one_hot(chosen, blocks, dtype=bool).any(-2)  # [g, p, blocks]
    keep = jnp.repeat(jnp.repeat(pairs, block, axis=1), block, axis=2)
    keep &= jnp.arange(k.shape[1]) < length
    some = keep.any(-1)
    where = keep | ~some[..., None]  # a softmax over nothing has no gradient but NaN
    x = _scores(q, k, scale)
    p = jnp.where(keep, jax.nn.softmax(x, axis=-1, where=where), 0)
    lse = jnp.where(some, jax.nn.logsumexp(x, axis=-1, where=where), -jnp.inf)
    out = jnp.einsum("gns,gse->gne", p, v.astype(x.dtype), precision=HIGHEST)
    return out.astype(v.dtype), lse


def block_mass(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    lse: Float[Array, "g n"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes=None,
) -> Float[Array, "g p blocks"]:
    """`mass` by definition, in float32; a padded row has an infinite `lse`."""
    del block_sizes
    weights = jnp.exp(_scores(q, k, scale) - lse[..., None])
    weights = jnp.where(jnp.arange(k.shape[1]) < length, weights, 0)
    groups, n, s = weights.shape
    return weights.reshape(groups, n // block, block, s // block, block).sum((2, 4))


def _scores(q: Array, k: Array, scale: float) -> Array:
    wide = accumulator(q.dtype)
    q, k = q.astype(wide), k.astype(wide)
    return scale * jnp.einsum("gnd,gsd->gns", q, k, precision=HIGHEST)
