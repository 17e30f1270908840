"""Parameters in orbax's format: written and read by shares, onto any mesh."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding as Placement

from ...params import Params, check_params
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
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of parameters, got none")
    entries = tuple(entries)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored: dict[str, Any] = dict(handler.metadata(epath.Path(folder.absolute())).tree)
    except Exception as error:  # orbax and its storage raise many kinds; all mean the same here
        raise _damaged(folder, error) from error
    expected = {e.name: jax.ShapeDtypeStruct(e.full_shape, jnp.float32) for e in entries}
    check_params(stored, expected, folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = {
        entry.name: ocp.ArrayRestoreArgs(
            sharding=here if shardings is None else shardings[entry.name],
            dtype=dtype_of(entry) or stored[entry.name].dtype,
        )
        for entry in entries
    }
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            return dict(
                checkpointer.restore(
                    folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=places)
                )
            )
    except Exception as error:  # likewise
        raise _damaged(folder, error) from error


def _damaged(folder: pathlib.Path, error: Exception) -> ValueError:
    first = (str(error).splitlines() or [""])[0]
    return ValueError(
        f"{folder}: expected a complete set of parameters, got {type(error).__name__}: {first}"
    )
