"""Checkpoints of a running training: atomic, the last few kept, resumable to the bit."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from .arrays import restore_arrays
from .step import TrainState


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves by path: plain names outlive changes in optax's state classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`.

    Each is written to a temporary folder and renamed when complete, so a killed run leaves whole
    checkpoints only. Use it as a context manager.
    """

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint, or `None`."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Writes the whole state and the data iterator's `get_state()`, and waits for it."""
        step = int(state.step)
        if step == self.latest():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named(state)), data=ocp.args.JsonSave(data)
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the newest state and the data iterator's state.

        Args:
          like: a state of the same run, for its structure, shapes, dtypes and placement, which may
            be on another mesh than that it was saved from; each device reads its share.

        Raises:
          ValueError: there is no checkpoint, or it is damaged, or it is of another model.
        """
        step = self.latest()
        if step is None:
            raise ValueError(f"{self.folder}: expected a checkpoint, got none")
        where = self.folder / str(step)
        named = _named(like)
        stored = restore_arrays(
            where / "state", named, lambda name, _: (named[name].sharding, named[name].dtype)
        )
        leaves = [stored[name] for name in named]
        try:
            composite = ocp.args.Composite(data=ocp.args.JsonRestore())
            data: Any = self._manager.restore(step, args=composite)
            return jax.tree.unflatten(jax.tree.structure(like), leaves), data["data"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{where}: expected the position of the data, got {type(error).__name__}: {error}"
            ) from error
