"""Named arrays on disk: read back as NumPy, whatever device they were written on."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
import orbax.checkpoint as ocp
from etils import epath


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
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of arrays, got none")
    try:
        handler = ocp.PyTreeCheckpointHandler()
        names = dict(handler.metadata(epath.Path(folder)).tree)
        # without this, arrays would go to the devices they came from, which may not be here
        to_host = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        with ocp.Checkpointer(handler) as checkpointer:
            return dict(
                checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=to_host))
            )
    except Exception as error:  # orbax and its storage raise many kinds; all mean the same here
        lines = str(error).splitlines() or [""]
        raise ValueError(
            f"{folder}: expected a complete set of arrays, got {type(error).__name__}: {lines[0]}"
        ) from error
