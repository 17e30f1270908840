"""What an interrupted run leaves behind: a folder from which it goes on, bit for bit."""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...demo.files import replacing, write_json
from ..conditions import Conditions
from ..memory import Memory
from ..pipeline import Progress
from ..samplers import Sampler

# Writing that takes longer is done more rarely: after so many times its own duration.
_SECONDS, _RARELY = 1.0, 20


class Partial:
    """The folder `<out>.partial` of a run.

    Args:
      folder: the folder.
      identity: JSON values on which the result depends; a folder of other values is not gone on
        from.

    Raises:
      ValueError: the folder is of another run, or is there and `resume` is not set.
    """

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any], resume: bool) -> None:
        self.folder = folder
        self._kept, self._seconds = -math.inf, 0.0  # when a step was kept, and how long it took
        self.identity = json.loads(json.dumps(identity))
        # a name that begins with a dot is that of a file that is not whole
        if not [path for path in folder.glob("*.npz") if path.name[0] != "."]:
            return  # nothing was finished that could be lost
        if not resume:
            raise ValueError(
                f"{folder} is left of an interrupted run: expected --resume to go on from there, "
                "or no such folder to begin anew"
            )
        stored = _read_json(folder / "run.json")
        other = sorted(
            name
            for name in self.identity.keys() | stored.keys()
            if self.identity.get(name) != stored.get(name)
        )
        if other:
            settings = "; ".join(
                f"{name} of {stored.get(name)!r}, got {self.identity.get(name)!r}" for name in other
            )
            raise ValueError(f"{folder} is left of another run: expected {settings}")

    def begin(self) -> None:
        """Makes the folder; called when the slow work begins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "run.json", self.identity)

    def conditions(self) -> Conditions | None:
        """What `keep_conditions` kept, or `None`."""
        arrays = _read(self.folder / "conditions.npz")
        return None if arrays is None else Conditions(**_on_device(arrays))

    def keep_conditions(self, conditions: Conditions) -> None:
        """Keeps the states of texts and image."""
        arrays = conditions._asdict().items()
        _write(
            self.folder / "conditions.npz", {n: np.asarray(a) for n, a in arrays if a is not None}
        )

    def progress(
        self,
        name: str,
        sampler: Sampler,
        remembered: Callable[[int], tuple[Memory, ...]],
    ) -> tuple[int, Progress] | None:
        """The step and the progress that `keep_progress` kept last, or `None`.

        Args:
          name: of the video.
          sampler: of the run.
          remembered: gives the shapes of what attention remembers after a step.
        """
        arrays = _read(self.folder / f"{name}.npz")
        if arrays is None:
            return None
        step = int(arrays.pop("step"))
        leaves, tree = jax.tree.flatten(remembered(step))
        # the host's: on a mesh each device then takes its share
        kept = [arrays.pop(f"attention_{n}").view(leaf.dtype) for n, leaf in enumerate(leaves)]
        state = type(sampler.init(jnp.zeros(1)))(**_on_device(arrays))
        return step, Progress(state, jax.tree.unflatten(tree, kept))

    def keep_progress(self, name: str, step: int, progress: Progress, last: bool = False) -> None:
        """Keeps the progress after a step; the last one is there until this one is whole.

        What attention remembers may be many gigabytes. Where writing takes seconds, steps are left
        out, so that a run spends a twentieth of its time on it at most; the `last` one never is.
        """
        began = time.monotonic()
        rarely = self._seconds > _SECONDS and began - self._kept < _RARELY * self._seconds
        if rarely and not last:
            return
        arrays = {n: np.asarray(array) for n, array in progress.sampler._asdict().items()}
        for n, leaf in enumerate(jax.tree.leaves(progress.attention)):
            arrays[f"attention_{n}"] = _storable(np.asarray(leaf))
        _write(self.folder / f"{name}.npz", {"step": np.array(step), **arrays})
        self._kept = time.monotonic()
        self._seconds = self._kept - began

    def certificate(self) -> list[dict[str, float | None]]:
        """What `keep_certificate` kept, or none."""
        path = self.folder / "certificate.json"
        return list(json.loads(path.read_text("utf-8"))) if path.is_file() else []

    def keep_certificate(self, certificate: list[dict[str, float | None]]) -> None:
        """Keeps the certificate of each layer."""
        write_json(self.folder / "certificate.json", certificate)

    def remove(self) -> None:
        """Removes the folder, when the video is there.

        At once for whoever looks: half of it would seem to be left of an interrupted run.
        """
        gone = self.folder.with_name(f".{self.folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        shutil.rmtree(gone)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the settings of a run, got none") from error


def _read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected kept arrays, got a damaged file") from error


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    with replacing(path) as partial:
        save: Any = np.savez  # its keywords are names of arrays, which its types do not say
        save(partial, **arrays)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # before it gets its name: a machine may be gone at any time


def _storable(array: np.ndarray) -> np.ndarray:
    """The same bytes in a dtype that NumPy can store: it knows neither bfloat16 nor float8."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")


def _on_device(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}
