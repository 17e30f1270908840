"""Running a method over the heads (and query tiles) of a batch, some at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.chunks import map_chunks

from .dispatch import Backend
from .monarch import monarch_tile
from .parts import Part


def by_heads(
    function: Callable[..., Part],
    arrays: tuple[Float[Array, "z _ h _"], ...],
    masks: Any,
    *,
    scores: int,
    backend: Backend,
    block_sizes: BlockSizes,
) -> Part:
    """`function` on heads-major copies of token-major arrays, as many heads as the budget holds.

    `function(*arrays, masks)` gets `[z, h, n, d]` arrays and masks with a leading batch axis,
    and returns a heads-major part that is made of each head apart. `scores` is the number of
    scores that it computes for a head.
    """
    batch, _, heads, _ = arrays[0].shape
    if not backend.loops:
        return _tokens_major(function(*(x.swapaxes(1, 2) for x in arrays), masks))
    at_once = max(1, block_sizes.scores() // scores)
    some_heads = _divisor(heads, at_once)
    some_entries = _divisor(batch, at_once // heads) if some_heads == heads else 1
    return _loop(function, (some_entries, some_heads), arrays, masks)


def _divisor(number: int, most: int) -> int:
    return max(n for n in range(1, max(1, min(number, most)) + 1) if number % n == 0)


def _tokens_major(part: Part) -> Part:
    return Part(part.out.swapaxes(1, 2), part.lse.swapaxes(1, 2))


# With a gradient of its own: the backward pass runs each chunk of heads again, and writes its
# gradients side by side. JAX's own would either keep heads-major copies of all inputs, or add up
# gradients of whole arrays, a chunk at a time.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loop(function: Any, size: tuple[int, int], arrays: Any, masks: Any) -> Part:
    def some(cut: Callable[..., Any]) -> Part:
        return function(*(cut(x).swapaxes(1, 2) for x in arrays), _cut_masks(cut, masks))

    return Part(*_over_chunks(some, size, arrays[0].shape))


def _loop_forward(function, size, arrays, masks):
    return _loop(function, size, arrays, masks), (arrays, masks)


def _loop_backward(function, size, saved, gradient):
    arrays, masks = saved

    def some(cut: Callable[..., Any]) -> Any:
        inputs = [cut(x).swapaxes(1, 2) for x in arrays]
        chunk_masks = _cut_masks(cut, masks)
        _, pullback = jax.vjp(lambda *x: function(*x, chunk_masks), *inputs)
        return pullback(Part(*(cut(x).swapaxes(1, 2) for x in gradient)))

    return _over_chunks(some, size, arrays[0].shape), None


_loop.defvjp(_loop_forward, _loop_backward)


def _cut_masks(cut: Callable[..., Any], masks: Any) -> Any:
    return jax.tree.map(lambda mask: cut(mask, heads=False), masks)


def _over_chunks(some: Callable[..., Any], size: tuple[int, int], shape: tuple[int, ...]) -> Any:
    """`some(cut)` for every chunk; heads-major results become whole token-major arrays."""
    batch, _, heads, _ = shape
    counts = batch // size[0], heads // size[1]

    def chunk(index: Any) -> Any:
        def cut(x: Any, heads: bool = True) -> Any:
            if counts[0] > 1:
                start = index // counts[1] * size[0]
                x = jax.lax.dynamic_slice_in_dim(x, start, size[0], axis=0)
            if heads and counts[1] > 1:
                start = index % counts[1] * size[1]
                x = jax.lax.dynamic_slice_in_dim(x, start, size[1], axis=2)
            return x

        return some(cut)

    if counts == (1, 1):
        return jax.tree.map(lambda x: x.swapaxes(1, 2), chunk(0))
    stacked = jax.lax.map(chunk, jnp.arange(counts[0] * counts[1]))

    def whole(x: Any) -> Any:
        x = x.reshape(batch // size[0], heads // size[1], *size, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(batch, heads, *x.shape[4:]).swapaxes(1, 2)

    return jax.tree.map(whole, stacked)


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
        if tiles == 1:
            return tile(q, queries, k, v, keys)

        def some_tiles(fixed, q, queries):
            return jax.vmap(lambda q, queries: tile(q, queries, *fixed))(q, queries)

        # The linearised blocks of all tile pairs would be `tiles` times as large as K.
        at_once = block_sizes.scores() // (tiles * m * b * b) if backend.loops else tiles
        return map_chunks(some_tiles, at_once, q, queries, shared=(k, v, keys))

    def flat(x, *shape):
        return None if x is None else x.reshape(-1, *shape, *x.shape[5:])

    def by_head(mask):
        return None if mask is None else jnp.repeat(mask[:, None], heads, axis=1)

    # An axis of one tile is left out: to a compiler a transpose of it looks like a copy.
    rows = (m, b) if tiles == 1 else (tiles, m, b)
    arrays = (
        flat(q, *rows), flat(k, tiles * m, b), flat(v, tiles * m, b),
        flat(by_head(queries), *rows), flat(by_head(keys), tiles * m, b),
    )  # fmt: skip
    if batch * heads == 1:
        part = head(*jax.tree.map(lambda x: x[0], arrays))
    else:
        part = jax.vmap(head)(*arrays)
    return Part(
        part.out.reshape(batch, heads, tiles, m, b, -1), part.lse.reshape(batch, heads, tiles, m, b)
    )
