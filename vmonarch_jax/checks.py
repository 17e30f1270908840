"""The caller's mistakes, found before any work: `ValueError` with the expected and the got."""

import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes

from .grid import VideoGrid, positive_int

LAYOUT = "[batch, seq, heads, head_dim]"


def method_value(method: Any) -> Any:
    """The method, if it can be called on arrays: not a class, whose fields have no values yet."""
    if isinstance(method, type) or not callable(method):
        raise ValueError(f"`method` must be a method value such as vm.VMonarch(), got {method!r}")
    return method


def rotated(rotate: Any, array: Any) -> Any:
    """`rotate(array)`, if that keeps its shape."""
    turned = rotate(array)
    if jnp.shape(turned) != array.shape:
        raise ValueError(
            f"`rotate` must keep the shape {array.shape} of what it turns, got {jnp.shape(turned)}"
        )
    return turned


def attention_inputs(query: Any, key: Any, value: Any, same_length: bool) -> tuple[Any, Any, Any]:
    """The three arrays, if they belong together."""
    arrays = {"query": query, "key": key, "value": value}
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ValueError(f"`{name}` must be {LAYOUT}, got shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"`{name}` must have a floating dtype, got {array.dtype}")
        if 0 in array.shape:
            raise ValueError(f"`{name}` must have no empty axis, got shape {array.shape}")
    query, key, value = arrays.values()
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"`query`, `key` and `value` must share one dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    expected = (query.shape[0], key.shape[1], query.shape[2], query.shape[3])
    if key.shape != expected:
        raise ValueError(
            f"`key` must match the batch, heads and head_dim of `query`: expected "
            f"{expected}, got {key.shape}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"`value` must match the batch, seq and heads of `key`: expected "
            f"{(*key.shape[:3], 'any')}, got {value.shape}"
        )
    if same_length and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"`query` and `key` must have the same seq, got {query.shape[1]} and {key.shape[1]}"
        )
    return query, key, value


def grid_of(grid: Any, seq: int) -> VideoGrid:
    """The grid, if it has `seq` tokens."""
    grid = VideoGrid.of(grid)
    if seq != grid.tokens:
        raise ValueError(f"`seq` must equal frames*height*width = {grid.tokens}, got {seq}")
    return grid


def mask_of(name: str, mask: Any, batch: int, seq: int) -> Any:
    """A boolean `[batch, seq]` mask, or `None`."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"`{name}` must be boolean (True: attended to), got {mask.dtype}")
    if mask.shape != (batch, seq):
        raise ValueError(f"`{name}` must be [batch, seq] = {(batch, seq)}, got {mask.shape}")
    return mask


def scale_of(scale: Any, head_dim: int) -> float:
    """The scale of the logits: `head_dim**-0.5` unless given."""
    if scale is None:
        return head_dim**-0.5
    return finite("scale", scale)


def finite(name: str, value: Any, least: float | None = None) -> float:
    """A finite Python float, at least `least`."""
    expected = "a finite number" if least is None else f"a finite number of at least {least:g}"
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}") from error
    if not math.isfinite(number) or (least is not None and number < least):
        raise ValueError(f"`{name}` must be {expected}, got {value!r}")
    return number


def whole(name: str, value: Any) -> int:
    """A Python int of at least 0.

    Raises:
        ValueError: if it is none.
    """
    try:
        if not isinstance(value, bool) and operator.index(value) >= 0:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"`{name}` must be an integer of at least 0, got {value!r}")


def steps_of(steps: Any) -> int:
    """The number of iterations, at least 1."""
    return positive_int("steps", steps)


def frames_of(frames: Any, grid: VideoGrid) -> tuple[int, ...]:
    """The frame indices that `recompute_frames` names: a number of first frames, or indices."""
    name, count = "recompute_frames", grid.frames
    if isinstance(frames, (int, np.integer)) and not isinstance(frames, bool):
        if not 0 <= frames <= count:
            raise ValueError(f"`{name}` must lie in 0..{count} (frames), got {frames}")
        return tuple(range(int(frames)))
    if not isinstance(frames, (tuple, list)) or any(
        isinstance(f, bool) or not isinstance(f, (int, np.integer)) for f in frames
    ):
        raise ValueError(
            f"`{name}` must be a number of first frames or a tuple of frame indices, got {frames!r}"
        )
    indices = tuple(sorted({int(f) for f in frames}))
    if indices and not (0 <= indices[0] and indices[-1] < count):
        raise ValueError(f"`{name}` must hold indices in 0..{count - 1}, got {frames!r}")
    return indices


def block_sizes_of(block_sizes: Any) -> BlockSizes:
    """The block sizes, or the default ones."""
    if block_sizes is None:
        return BlockSizes()
    if not isinstance(block_sizes, BlockSizes):
        raise ValueError(f"`block_sizes` must be a vm.BlockSizes or None, got {block_sizes!r}")
    return block_sizes
