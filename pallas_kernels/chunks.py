"""Doing a large thing a chunk at a time."""

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


def map_slices(function: Callable[..., Any], most: int, *arrays: Any) -> Any:
    """Like `map_chunks` along the second axis of `arrays`, which `function` moves to the front.

    Slices are cut where the arrays lie, so no second copy of them in another order is made.
    """
    function = jax.checkpoint(function)
    length = jax.tree.leaves(arrays)[0].shape[1]
    size = chunk_length(length, most)
    if size == length:
        return function(*arrays)

    def at(start: Any, size: int) -> Any:
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1
        )
        return function(*jax.tree.map(cut, arrays))

    count = length // size
    result = jax.lax.map(lambda index: at(index * size, size), jnp.arange(count))
    result = jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:]), result)
    if count * size == length:
        return result
    rest = at(count * size, length - count * size)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), result, rest)


def map_chunks(function: Callable[..., Any], most: int, *arrays: Any) -> Any:
    """`function(*arrays)`, computed over chunks of at most `most` along the leading axis.

    `function` must treat the entries of the leading axis apart from each other. `arrays` are
    pytrees (`None` included) whose leaves share that axis, and so are the results. Nothing but
    the inputs and outputs of a chunk outlives it, in the forward and in the backward pass.
    """
    function = jax.checkpoint(function)
    length = jax.tree.leaves(arrays)[0].shape[0]
    size = chunk_length(length, most)
    if size == length:
        return function(*arrays)
    if size == 1:
        # Without an axis of one entry: to the compiler a transpose of it would be a copy.
        def entry(arrays: Any) -> Any:
            result = function(*jax.tree.map(lambda x: x[None], arrays))
            return jax.tree.map(lambda x: x[0], result)

        return jax.lax.map(entry, arrays)
    count = length // size
    body = jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), arrays)
    result = jax.lax.map(lambda chunk: function(*chunk), body)
    result = jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:]), result)
    if count * size == length:
        return result
    rest = function(*jax.tree.map(lambda x: x[count * size :], arrays))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), result, rest)
