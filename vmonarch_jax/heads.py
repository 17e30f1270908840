"""Running a method over the heads (and query tiles) of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.chunks import map_chunks

from .dispatch import Backend
from .monarch import monarch_tile
from .parts import Part


def heads_major(x: Shaped[Array, "z n h d"]) -> Shaped[Array, "z h n d"]:
    """`[batch, seq, heads, d] -> [batch, heads, seq, d]`, as kernels work."""
    return x.swapaxes(1, 2)


def tokens_major(part: Part) -> Part:
    """The inverse, for an `(out, lse)` pair."""
    return Part(part.out.swapaxes(1, 2), part.lse.swapaxes(1, 2))


def dense_part(
    q: Float[Array, "z h n d"],
    k: Float[Array, "z h s d"],
    v: Float[Array, "z h s e"],
    keys: Bool[Array, "z s"] | None,
    *,
    scale: float,
    backend: Backend,
    block_sizes: BlockSizes,
) -> Part:
    """Exact attention of any rows on any keys: one group a head."""
    batch, heads = q.shape[:2]
    flat = [x.reshape(batch * heads, *x.shape[2:]) for x in (q, k, v)]
    mask = None if keys is None else jnp.repeat(keys, heads, axis=0)
    (out,), lse = backend.attend(
        flat[0], flat[1], (flat[2],), scale=scale, mask=mask, block_sizes=block_sizes
    )
    out = out.astype(v.dtype).reshape(batch, heads, *out.shape[1:])
    return Part(out, lse.reshape(out.shape[:-1]))


def monarch_part(
    q: Float[Array, "z h a m b d"],
    k: Float[Array, "z h a m b d"],
    v: Float[Array, "z h a m b e"],
    queries: Bool[Array, "z a m b"] | None,
    keys: Bool[Array, "z a m b"] | None,
    *,
    backend: Backend,
    block_sizes: BlockSizes,
    **settings: Any,
) -> Part:
    """Monarch attention of every query tile on the key tiles of its own batch entry and head.

    Every tile sees all key tiles in one softmax. `settings` are those of `monarch_tile`.
    """
    batch, heads, tiles, m, b, _ = q.shape

    def tile(q, queries, k, v, keys):
        return monarch_tile(
            q, k, v, queries, keys, backend=backend, block_sizes=block_sizes, **settings
        )

    def head(q, k, v, queries, keys):
        k, v = (x.reshape(tiles * m, *x.shape[2:]) for x in (k, v))
        keys = None if keys is None else keys.reshape(tiles * m, b)
        if tiles == 1:
            first = jax.tree.map(lambda x: x[0], (q, queries))
            return jax.tree.map(lambda x: x[None], tile(*first, k, v, keys))
        return over(lambda q, queries: tile(q, queries, k, v, keys), tiles * m * b * b, q, queries)

    def over(function: Callable[..., Any], scores: int, *arrays: Any) -> Any:
        """`function` for every entry of the leading axis, as many at once as the budget holds."""
        if not backend.loops:
            return jax.vmap(function)(*arrays)
        at_once = max(1, block_sizes.scores() // scores)
        if at_once == 1:
            return jax.lax.map(lambda entry: function(*entry), arrays)
        return map_chunks(jax.vmap(function), at_once, *arrays)

    def by_head(mask):
        return None if mask is None else jnp.repeat(mask, heads, axis=0)

    flat = [x.reshape(batch * heads, *x.shape[2:]) for x in (q, k, v)]
    part = over(head, tiles * tiles * m * b * b, *flat, by_head(queries), by_head(keys))
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), part)
