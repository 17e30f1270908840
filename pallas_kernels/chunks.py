"""Doing a large thing a chunk at a time, forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def chunk_length(length: int, most: int) -> int:
    """The chunk to cut `length` into: at most `most`, a divisor of `length` where a good one is.

    A divisor leaves no remainder to be compiled and concatenated apart; one of less than half
    the allowed size would cost more in lost parallelism than the remainder does.
    """
    most = max(1, min(most, length))
    for size in range(most, most // 2, -1):
        if length % size == 0:
            return size
    return most


def map_chunks(
    function: Callable[..., Any], most: int, *arrays: Any, shared: Any = (), axis: int = 0
) -> Any:
    """`function(shared, *arrays)`, computed over chunks of at most `most` along `axis`.

    `arrays` are pytrees (`None` included) whose leaves have the length of the first leaf along
    `axis`, 0 or 1; `function` treats the entries of that axis apart from each other, and its
    results carry it in front. Every chunk sees all of `shared`. Chunks along axis 1 are cut where
    the arrays lie, so no copy of them in another order is made.

    Nothing but the inputs and outputs of a chunk outlives it: the backward pass runs each chunk
    again, and adds up the gradients of `shared`. (JAX's own gradient of a loop keeps a stacked
    copy of each chunk's inputs.)
    """
    length = jax.tree.leaves(arrays)[0].shape[axis]
    size = chunk_length(length, most)
    if size == length:
        return jax.checkpoint(function)(shared, *arrays)
    whole = length // size * size
    if whole == length:
        return _map(function, size, axis, shared, arrays)

    def part(start: int, stop: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, stop, axis=axis), arrays)

    most_of_it = _map(function, size, axis, shared, part(0, whole))
    rest = jax.checkpoint(function)(shared, *part(whole, length))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), most_of_it, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _map(function: Any, size: int, axis: int, shared: Any, arrays: Any) -> Any:
    count = jax.tree.leaves(arrays)[0].shape[axis] // size

    def chunk(index: Any) -> Any:
        return function(shared, *_cut(arrays, index, size, axis))

    return _unstack(jax.lax.map(chunk, jnp.arange(count)), 0)


def _map_forward(function, size, axis, shared, arrays):
    return _map(function, size, axis, shared, arrays), (shared, arrays)


def _map_backward(function, size, axis, saved, gradient):
    shared, arrays = saved
    count = jax.tree.leaves(arrays)[0].shape[axis] // size
    shared_floats = _floats(shared)

    def chunk(total: Any, index: Any) -> Any:
        some = _cut(arrays, index, size, axis)

        def run(shared_floats: list[Any], some_floats: list[Any]) -> Any:
            return function(_replace(shared, shared_floats), *_replace(some, some_floats))

        _, pullback = jax.vjp(run, shared_floats, _floats(some))
        of_shared, of_chunk = pullback(_cut(gradient, index, size, 0))
        return jax.tree.map(jnp.add, total, of_shared), of_chunk

    zeros = jax.tree.map(jnp.zeros_like, shared_floats)
    total, stacked = jax.lax.scan(chunk, zeros, jnp.arange(count))
    of_arrays = _unstack(stacked, axis)
    return _replace(shared, total, masks=False), _replace(arrays, of_arrays, masks=False)


_map.defvjp(_map_forward, _map_backward)


def _cut(tree: Any, index: Any, size: int, axis: int) -> Any:
    """Chunk `index` of every leaf."""

    def cut(x: Any) -> Any:
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

    return jax.tree.map(cut, tree)


def _unstack(tree: Any, axis: int) -> Any:
    """`[chunks, size, ...]` (or `[chunks, n, size, ...]` for axis 1) as one array."""

    def whole(x: Any) -> Any:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jax.tree.map(whole, tree)


def _floats(tree: Any) -> list[Any]:
    """The leaves that have gradients; masks have none."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def _replace(tree: Any, floats: list[Any], masks: bool = True) -> Any:
    """`tree` with other floating leaves, and with its masks or with `None` in their place."""
    leaves, structure = jax.tree.flatten(tree)
    fresh = iter(floats)
    leaves = [
        next(fresh) if jnp.issubdtype(x.dtype, jnp.floating) else (x if masks else None)
        for x in leaves
    ]
    return jax.tree.unflatten(structure, leaves)
