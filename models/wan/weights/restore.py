"""Parameters in orbax's format: written and read by shares, onto any mesh."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Sharding as Placement

from ...arrays import restore_arrays
from ...params import Params
from .entry import Entry


def write_params(folder: pathlib.Path, params: Mapping[str, Any]) -> None:
    """Writes parameters to a new folder; every process of the mesh calls it."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = {name: jnp.asarray(value) for name, value in params.items()}
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays))


def restore_params(
    folder: pathlib.Path,
    entries: Iterable[Entry],
    dtype_of: Callable[[Entry], Any] = lambda _: None,
    shardings: Mapping[str, Placement] | None = None,
) -> Params:
    """Reads parameters that `write_params` wrote, each device its share of them.

    Args:
      folder: of one part.
      entries: the table of its parameters.
      dtype_of: each parameter's dtype, or `None`: as stored.
      shardings: each parameter's place by name, whatever it was when written, or `None`: the
        default device.

    Raises:
      ValueError: the folder is missing, incomplete or damaged, or is of other parameters.
    """
    table = {entry.name: entry for entry in entries}
    expected = {n: jax.ShapeDtypeStruct(e.full_shape, jnp.float32) for n, e in table.items()}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place_of(name: str, stored: Any) -> tuple[Placement, Any]:
        place = here if shardings is None else shardings[name]
        return place, dtype_of(table[name]) or stored.dtype

    return restore_arrays(folder, expected, place_of, "parameters")
