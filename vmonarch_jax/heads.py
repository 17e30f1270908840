"""Running a method over the heads (and query tiles) of a batch, some at a time."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.chunks import map_chunks
from vmonarch_jax.pallas_kernels.varying import varying

from .dispatch import Backend
from .keeping import record, replay
from .monarch import monarch_tiles
from .parts import Part


def by_heads(
    function: Callable[..., Any],
    arrays: tuple[Float[Array, "z _ h _"], ...],
    masks: Any,
    *,
    scores: int,
    backend: Backend,
    block_sizes: BlockSizes,
) -> Any:
    """`function` on heads-major copies of token-major arrays, as many heads as the budget holds.

    `function(backend, *arrays, masks)` gets `[z, h, n, d]` arrays and masks with a leading batch
    axis, and returns a heads-major part (or any pytree of heads-major arrays) that is made of each
    head apart. A mask, or any array of whole numbers, that has heads has them as its third axis,
    as it is handed in. `scores` is the number of scores that it computes for a head.
    """
    batch, _, heads, _ = arrays[0].shape
    size = (batch, heads)
    if backend.loops:
        at_once = max(1, block_sizes.scores() // scores)
        some_heads = _divisor(heads, at_once)
        some_entries = _divisor(batch, at_once // heads) if some_heads == heads else 1
        size = (some_entries, some_heads)
    elif backend.keeps:
        size = _size_by_bytes(arrays, block_sizes.bytes(copied=not backend.informed))
    else:
        return _tokens_major(function(backend, *(x.swapaxes(1, 2) for x in arrays), masks))
    return _loop(function, backend, size, arrays, masks)


def _size_by_bytes(arrays: Any, budget: int) -> tuple[int, int]:
    """`(entries, heads)` at a time: all of them while an array is within `budget`, else a few.

    Beside each copied array a method keeps several intermediate ones of its size, in the backward
    pass about a dozen.
    """
    batch, _, heads, _ = arrays[0].shape
    most = max(x.size * x.dtype.itemsize for x in arrays)
    if most <= budget:
        return batch, heads
    if most // batch <= budget:
        return _divisor(batch, budget * batch // most), heads
    return 1, _divisor(heads, max(1, heads // 10))


def _divisor(number: int, most: int) -> int:
    return max(n for n in range(1, max(1, min(number, most)) + 1) if number % n == 0)


def _tokens_major(found: Any) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(1, 2), found)


# With a gradient of its own: the backward pass runs each chunk of heads again, and writes its
# gradients side by side. JAX's own would either keep heads-major copies of all inputs, or add up
# gradients of whole arrays, a chunk at a time. A backend that `keeps` passes on what its attention
# kernels returned, which spares the second run of them and costs a few arrays of the size of q.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loop(function: Any, backend: Backend, size: tuple[int, int], arrays: Any, masks: Any) -> Any:
    def some(cut: Callable[..., Any], _: Any) -> Any:
        return function(backend, *_heads_major(cut, arrays), _cut_masks(cut, masks))

    return _over_chunks(some, size, arrays)[0]


def _loop_forward(function, backend, size, arrays, masks):
    if not backend.keeps:
        return _loop(function, backend, size, arrays, masks), (arrays, masks, None)

    def some(cut: Callable[..., Any], _: Any) -> tuple[Any, Any]:
        recording, kept = record(backend)
        part = function(recording, *_heads_major(cut, arrays), _cut_masks(cut, masks))
        return part, tuple(kept)

    part, kept = _over_chunks(some, size, arrays, keep=True)
    return part, (arrays, masks, kept)


def _loop_backward(function, backend, size, saved, gradient):
    arrays, masks, kept = saved

    def some(cut: Callable[..., Any], kept: Any) -> Any:
        inputs = _heads_major(cut, arrays)
        chunk_masks = _cut_masks(cut, masks)

        def run(*inputs: Any) -> Any:
            replaying = replay(backend, kept) if backend.keeps else backend
            return function(replaying, *inputs, chunk_masks)

        _, pullback = jax.vjp(run, *inputs)
        return pullback(jax.tree.map(lambda x: cut(x).swapaxes(1, 2), gradient))

    return _over_chunks(some, size, arrays, kept=kept)[0], None


_loop.defvjp(_loop_forward, _loop_backward)


def _heads_major(cut: Callable[..., Any], arrays: Any) -> list[Any]:
    return [cut(x).swapaxes(1, 2) for x in arrays]


def _cut_masks(cut: Callable[..., Any], masks: Any) -> Any:
    return jax.tree.map(lambda mask: cut(mask, heads=mask.ndim > 2), masks)


def _over_chunks(
    some: Callable[..., Any],
    size: tuple[int, int],
    arrays: tuple[Array, ...],
    keep: bool = False,
    kept: Any = None,
) -> tuple[Any, Any]:
    """`some(cut, kept)` for every chunk; heads-major results are written into token-major arrays.

    With `keep` it returns a pair, whose second half is handed back chunk by chunk in `kept` to
    another call.
    """
    batch, _, heads, _ = arrays[0].shape
    counts = batch // size[0], heads // size[1]

    def starts(index: Any) -> tuple[Any, Any]:
        return index // counts[1] * size[0], index % counts[1] * size[1]

    def chunk(index: Any, kept: Any) -> Any:
        def cut(x: Any, heads: bool = True) -> Any:
            if counts[0] > 1:
                x = jax.lax.dynamic_slice_in_dim(x, starts(index)[0], size[0], axis=0)
            if heads and counts[1] > 1:
                x = jax.lax.dynamic_slice_in_dim(x, starts(index)[1], size[1], axis=2)
            return x

        found, keeping = some(cut, kept) if keep else (some(cut, kept), None)
        return _tokens_major(found), keeping

    if counts == (1, 1):
        return chunk(0, kept)

    # Written where they belong, chunk by chunk: stacked and rearranged at the end they would be
    # there twice.
    def write(whole: Any, at: Any) -> Any:
        index, kept = at
        found, keeping = chunk(index, kept)
        entry, head = starts(index)

        def put(whole: Any, x: Any) -> Any:
            return jax.lax.dynamic_update_slice(whole, x, (entry, 0, head, 0)[: x.ndim])

        return jax.tree.map(put, whole, found), keeping

    one = jax.eval_shape(lambda kept: chunk(0, kept)[0], jax.tree.map(lambda x: x[0], kept))
    empty = jax.tree.map(
        lambda x: jnp.zeros((batch, x.shape[1], heads, *x.shape[3:]), x.dtype), one
    )
    empty = varying(empty, arrays)
    return jax.lax.scan(write, empty, (jnp.arange(counts[0] * counts[1]), kept))


def dense_part(
    backend: Backend,
    q: Float[Array, "z h n d"],
    k: Float[Array, "z h s d"],
    v: Float[Array, "z h s e"],
    keys: Bool[Array, "z s"] | None,
    *,
    scale: float,
    block_sizes: BlockSizes,
) -> Part:
    """Exact attention of any rows on any keys: one group a head."""
    batch, heads = q.shape[:2]
    backend = _informed(backend, batch)
    flat = [x.reshape(batch * heads, *x.shape[2:]) for x in (q, k, v)]
    mask = None if keys is None else jnp.repeat(keys, heads, axis=0)
    (out,), lse = backend.attend(
        flat[0], flat[1], (flat[2],), scale=scale, mask=mask, block_sizes=block_sizes
    )
    out = out.astype(v.dtype).reshape(batch, heads, *out.shape[1:])
    return Part(out, lse.reshape(out.shape[:-1]))


def monarch_part(
    backend: Backend,
    q: Float[Array, "z h a m b d"],
    k: Float[Array, "z h a m b d"],
    v: Float[Array, "z h a m b e"],
    queries: Bool[Array, "z a m b"] | None,
    keys: Bool[Array, "z a m b"] | None,
    *,
    block_sizes: BlockSizes,
    **settings: Any,
) -> Part:
    """Monarch attention of every query tile on the key tiles of its own batch entry and head.

    Every tile sees all key tiles in one softmax. `settings` are those of `monarch_tiles`.
    """
    batch, heads, tiles, m, b, _ = q.shape

    def by_head(mask):
        if mask is None:
            return None
        mask = jnp.broadcast_to(mask[:, None], (batch, heads, *mask.shape[1:]))
        return mask.reshape(batch * heads, *mask.shape[2:])

    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    queries, keys = by_head(queries), by_head(keys)
    if backend.tiled is not None and settings["steps"] == 1 and tiles > 1:
        # A padded query starts nothing: what it holds must not matter.
        first = q if queries is None else jnp.where(queries[..., None], q, 0)
        kept = {name: settings[name] for name in ("scale", "entropy_gradient")}
        if backend.informed:
            kept["entries"] = batch
        with contextlib.suppress(NotImplementedError):  # then the general way serves
            part = backend.tiled(first, k, v, keys=keys, block_sizes=block_sizes, **kept)
            return Part(*(x.reshape(batch, heads, *x.shape[1:]) for x in part))
    backend = _informed(backend, batch, settings["scale"])
    settings |= {"backend": backend, "block_sizes": block_sizes}
    k, v = (x.reshape(-1, tiles * m, b, x.shape[-1]) for x in (k, v))
    keys = None if keys is None else keys.reshape(-1, tiles * m, b)

    def some_tiles(fixed, q, queries):
        q, queries = _side_by_side(q), _side_by_side(queries)
        part = monarch_tiles(q, fixed[0], fixed[1], queries, fixed[2], **settings)
        return jax.tree.map(lambda x: _apart(x, b), part)

    if backend.loops and tiles > 1:
        # The linearised blocks of all tile pairs would be `tiles` times as large as K.
        at_once = block_sizes.scores() // (tiles * m * b * b)
        part = map_chunks(some_tiles, at_once, q, queries, shared=(k, v, keys), axis=1)
    else:
        part = some_tiles((k, v, keys), q, queries)
    return Part(*(_tiles_last(x).reshape(batch, heads, tiles, m, b, *x.shape[4:]) for x in part))


def _informed(backend: Backend, entries: int, scale: float | None = None) -> Backend:
    """The backend with kernels that know of how many entries of a batch the groups are the heads.

    From this they tell how a caller's arrays lie, and leave them there. With a `scale`, R steps
    leave aL without it, and L steps put it in.
    """
    if not backend.informed:
        return backend
    of_steps = {} if scale is None else {"unscaled": True}, {} if scale is None else {"gain": scale}
    given = {"attend": {}, "r_step": of_steps[0], "l_middle": of_steps[1], "l_last": of_steps[1]}
    kernels = {
        name: functools.partial(getattr(backend, name), entries=entries, **more)
        for name, more in given.items()
    }
    return dataclasses.replace(backend, **kernels)


def _side_by_side(x: Any) -> Any:
    """Tiles as more positions of the same blocks: `[g, a, m, b, ...] -> [g, m, a * b, ...]`."""
    if x is None:
        return None
    if x.shape[1] > 1:  # to a compiler a transpose of an axis of one looks like a copy
        x = x.swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])
    return x[:, 0]


def _apart(x: Any, b: int) -> Any:
    """The inverse, with the tiles in front: `[g, m, a * b, ...] -> [a, g, m, b, ...]`."""
    x = x.reshape(*x.shape[:2], -1, b, *x.shape[3:])
    return x[None, :, :, 0] if x.shape[2] == 1 else jnp.moveaxis(x, 2, 0)


def _tiles_last(x: Any) -> Any:
    """`[a, g, m, b, ...] -> [g, a, m, b, ...]`."""
    return x[0][:, None] if x.shape[0] == 1 else x.swapaxes(0, 1)
