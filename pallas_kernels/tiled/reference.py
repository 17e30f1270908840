"""The oracle of tiled Monarch attention: every pair of tiles at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..numerics import accumulator


def tiled(
    q: Float[Array, "g a m b d"],
    k: Float[Array, "g f m b d"],
    v: Float[Array, "g f m b e"],
    *,
    scale: float,
    keys: Bool[Array, "g f m b"] | None = None,
    entropy_gradient: bool = False,
    block_sizes=None,
) -> tuple[Float[Array, "g a m b e"], Float[Array, "g a m b"]]:
    """By definition, in float32; without any key, zeros and -inf."""
    del block_sizes
    wide = accumulator(q.dtype)
    q, k, v, kept = q.astype(wide), k.astype(wide), v.astype(wide), v.dtype

    def dot(formula, x, y):
        return jnp.einsum(formula, x, y, precision=jax.lax.Precision.HIGHEST)

    keys = jnp.full(k.shape[:-1], True) if keys is None else keys
    keep = keys[:, None, :, :, None, :]  # [g, 1, f, k, 1, i]
    some = keys.any(-1)  # [g, f, k]
    safe = keep | ~some[:, None, :, :, None, None]
    x = scale * dot("gakjd,gfkid->gafkji", q, k)
    r = jax.nn.softmax(x, axis=-1, where=safe)
    r = jnp.where(keep, r, 0)
    al = scale * dot("gafkji,gfkid->gafkjd", r, k)
    y = dot("gafkji,gfkie->gafkje", r, v)
    cl = dot("gakjd,gafkjd->gafkj", q, al) - jax.nn.logsumexp(x, axis=-1, where=safe)
    if not entropy_gradient:
        cl = jax.lax.stop_gradient(cl)
    f = dot("galjd,gafkjd->galjfk", q, al) - jnp.einsum("gafkj->gajfk", cl)[:, :, None]
    there = jnp.broadcast_to(some[:, None, None, None], f.shape)
    flat, there = (t.reshape(*t.shape[:4], -1) for t in (f, there))
    none = ~there.any(-1, keepdims=True)
    weights = jnp.where(there, jax.nn.softmax(flat, axis=-1, where=there | none), 0)
    lse = jax.nn.logsumexp(flat, axis=-1, where=there | none)
    out = dot("galjfk,gafkje->galje", weights.reshape(f.shape), y)
    return out.astype(kept), jnp.where(none[..., 0], -jnp.inf, lse)
