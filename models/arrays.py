"""Named arrays on disk: read back as NumPy or onto any devices, wherever they were written."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding
from jaxtyping import Array

from .params import check_params


def write_arrays(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, of any dtype that JAX has, to a new folder."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        host = {name: np.asarray(value) for name, value in arrays.items()}
        checkpointer.save(folder, args=ocp.args.PyTreeSave(host))
    # both only say where and on what device they were written, and reading needs neither
    for name in ("commit_success.txt", "_sharding"):
        (folder / name).unlink(missing_ok=True)


def read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a folder.

    Raises:
      ValueError: the folder is missing, incomplete or damaged.
    """
    # without this, arrays would go to the devices they came from, which may not be here
    to_host = ocp.RestoreArgs(restore_type=np.ndarray)
    return _restore(folder, lambda stored: dict.fromkeys(stored, to_host), "arrays")


def restore_arrays(
    folder: pathlib.Path,
    expected: Mapping[str, Any],
    place_of: Callable[[str, Any], tuple[Sharding, Any]],
    what: str = "arrays",
) -> dict[str, Array]:
    """Reads arrays onto devices, wherever they were written; each device reads its share.

    Args:
      folder: of the arrays.
      expected: anything with a `shape`, by name.
      place_of: `place_of(name, stored)` is the sharding and the dtype of an array, of which
        `stored` knows the dtype on disk.
      what: they are, for messages.

    Raises:
      ValueError: the folder is missing, incomplete or damaged, or has other names or shapes.
    """

    def places(stored: Mapping[str, Any]) -> dict[str, ocp.RestoreArgs]:
        check_params(stored, expected, folder)
        found = {name: place_of(name, stored[name]) for name in expected}
        return {
            name: ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype)
            for name, (sharding, dtype) in found.items()
        }

    return _restore(folder, places, what)


def _restore(
    folder: pathlib.Path, places: Callable[[Mapping[str, Any]], dict[str, Any]], what: str
) -> dict[str, Any]:
    folder = folder.absolute()
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of {what}, got none")
    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored = dict(handler.metadata(epath.Path(folder)).tree)
    except Exception as error:  # orbax and its storage raise many kinds; all mean the same here
        raise _damaged(folder, what, error) from error
    restore_args = places(stored)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            args = ocp.args.PyTreeRestore(restore_args=restore_args)
            return dict(checkpointer.restore(folder, args=args))
    except Exception as error:  # likewise
        raise _damaged(folder, what, error) from error


def _damaged(folder: pathlib.Path, what: str, error: Exception) -> ValueError:
    first = (str(error).splitlines() or [""])[0]
    return ValueError(
        f"{folder}: expected a complete set of {what}, got {type(error).__name__}: {first}"
    )
