"""Weights from files into modules: one tensor at a time, strictly, straight to their devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding as Placement
from jaxtyping import Array

from ...params import Params, split_params
from ..sharding import Sharding
from .detect import Found
from .entry import Entry
from .parts import PARTS, abstract_part, matches, part_entries, sizes_of
from .restore import restore_params
from .stored import Stored, Tensor

# Of a tensor's bytes copied at once: files are read forwards even where the copy transposes.
_BLOCK = 1 << 18
# XLA takes host memory over without a copy, on a CPU, where it is aligned so.
_ALIGNMENT = 64


def load_part(
    found: Found,
    part: str,
    dtype: Any = jnp.bfloat16,
    placement: Sharding | None = None,
) -> nnx.Module:
    """One part of a Wan model with its weights.

    Host memory: the weights of the part as far as they stay on the host, and one tensor (one
    parameter of all layers); on a mesh, each process reads what its devices hold.

    Args:
      found: what `detect` found.
      part: "transformer", "transformer_2", "vae", "text_encoder" or "image_encoder".
      dtype: of the arrays, or `None`: as stored. Norms, modulation and the embedding of time of
        the transformer are float32 in any case, as in Diffusers.
      placement: where they lie on a mesh, or `None`: on the default device.

    Raises:
      ValueError: the part is not there, a file is damaged, or keys are missing, unexpected or
        misshapen: all of them are named, each with our name and theirs.

    Example:
      found = detect("Wan2.1-T2V-1.3B-Diffusers")
      model = load_part(found, "transformer", placement=Sharding(make_mesh(tensor=4)))
    """
    entries = part_entries(found.config, part)
    found.require(part)
    spec = PARTS[part]

    def dtype_of(entry: Entry) -> Any:
        return jnp.float32 if matches(entry.diffusers, spec.float32) else dtype

    shardings = None if placement is None else placement.param_shardings(entries)
    if found.convention == "orbax":
        params = restore_params(found.parts[part][0], entries, dtype_of, shardings)
    else:
        stored = _checked(found, part)
        params = load_params(stored, entries, found.convention, dtype_of, shardings)
    return split_params(abstract_part(found.config, part))[0](params)


def check_files(found: Found, *parts: str) -> None:
    """Raises `ValueError` if parts ("tokenizer" too) can't be loaded; none named: a video's parts.

    That is what `load_part` would find when the part's turn comes: a part is not there, a file is
    cut short, keys are missing, unexpected or misshapen. Headers alone are read; of our own folders
    ("orbax"), which are written whole or not at all, nothing is.
    """
    parts = parts or found.required
    found.require(*parts)
    if found.convention != "orbax":
        for part in (part for part in parts if part in PARTS):
            _checked(found, part)


def _checked(found: Found, part: str) -> dict[str, Tensor]:
    """The stored tensors of a part, which are those that the model has."""
    spec, sizes = PARTS[part], sizes_of(found.config, part)
    stored = with_aliases(Stored(found.parts[part]), spec.aliases(sizes))
    where = f"{found.folder}, {part}"
    entries = part_entries(found.config, part)
    check_keys(stored, entries, found.convention, spec.ignored(sizes), where)
    return stored


def with_aliases(stored: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors by the keys of the table, where a file has another key of the same tensor."""
    tensors = dict(stored)
    for key, alias in aliases.items():
        if alias in tensors:
            tensors.setdefault(key, tensors.pop(alias))
    return tensors


def check_keys(
    stored: Mapping[str, Tensor],
    entries: Iterable[Entry],
    convention: str,
    ignored: tuple[str, ...] = (),
    where: object = "weights",
) -> None:
    """Raises one `ValueError` with every missing, unexpected and misshapen key."""
    wanted, problems = set(), []
    for entry in entries:
        shape = entry.shape_in(convention)
        for layer, key in enumerate(entry.keys(convention)):
            wanted.add(key)
            ours = f"{entry.name}[{layer}]" if entry.layers else entry.name
            if key not in stored:
                problems.append(f"missing {key} (our {ours}), expected {shape}")
            elif stored[key].shape != shape:
                problems.append(f"{key} (our {ours}): expected {shape}, got {stored[key].shape}")
            elif not jnp.issubdtype(stored[key].dtype, jnp.floating):
                problems.append(f"{key} (our {ours}): expected floats, got {stored[key].dtype}")
    for key in sorted(set(stored) - wanted):
        if not matches(key, ignored):
            problems.append(f"unexpected {key} of {stored[key].shape} (no parameter of ours)")
    if problems:
        raise ValueError(
            f"{where}: expected {len(wanted)} keys of the {convention} convention, got "
            f"{len(problems)} problems:\n  " + "\n  ".join(problems)
        )


def load_params(
    stored: Mapping[str, Tensor],
    entries: Iterable[Entry],
    convention: str,
    dtype_of: Callable[[Entry], Any] = lambda _: None,
    shardings: Mapping[str, Placement] | None = None,
) -> Params:
    """Our parameters from stored tensors that `check_keys` found complete.

    Args:
      stored: the tensors by key.
      entries: the table.
      convention: of the keys.
      dtype_of: each parameter's dtype, or `None`: as stored.
      shardings: each parameter's place by name, or `None`: the default device.
    """
    params: Params = {}
    for entry in entries:
        tensors = [stored[key] for key in entry.keys(convention)]
        dtype = jnp.dtype(dtype_of(entry) or tensors[0].dtype)
        sharding = None if shardings is None else shardings[entry.name]
        # the next tensor is not read while this one still waits on the host
        params[entry.name] = jax.block_until_ready(
            _load(entry, tensors, convention, dtype, sharding)
        )
    return params


def _load(
    entry: Entry,
    tensors: Sequence[Tensor],
    convention: str,
    dtype: np.dtype,
    sharding: Placement | None,
) -> Array:
    shares: dict[Any, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        # devices that hold the same share get the same host array
        bounds = tuple(s.indices(n) for s, n in zip(index, entry.full_shape, strict=True))
        if bounds not in shares:
            shares[bounds] = _read(entry, tensors, convention, bounds, dtype)
        return shares[bounds]

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(entry.full_shape)))
    return jax.make_array_from_callback(entry.full_shape, sharding, read)


def _read(
    entry: Entry,
    tensors: Sequence[Tensor],
    convention: str,
    bounds: tuple[tuple[int, int, int], ...],
    dtype: np.dtype,
) -> np.ndarray:
    """A share of one parameter; nothing but its share of the files is touched."""
    out = _aligned(tuple(last - first for first, last, _ in bounds), dtype)
    layers = range(*bounds[0]) if entry.layers else (0,)
    rest = bounds[1:] if entry.layers else bounds
    index = tuple(slice(first, last) for first, last, _ in rest)
    for row, layer in enumerate(layers):
        ours = entry.ours(tensors[layer].read(), convention)
        _copy(out[row] if entry.layers else out, ours[index])
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Casts and copies in the order in which the source lies, a block at a time.

    NumPy would go by the target's order: a transposed copy then jumps through the file, and misses
    the cache at every value.
    """
    if source.nbytes <= _BLOCK:
        target[...] = source
        return
    outer = int(np.argmax(source.strides))
    target, source = np.moveaxis(target, outer, 0), np.moveaxis(source, outer, 0)
    rows = max(1, _BLOCK * len(source) // source.nbytes)
    for first in range(0, len(source), rows):
        block = source[first : first + rows].astype(target.dtype, copy=False)
        target[first : first + rows] = block
