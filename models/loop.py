"""The training loop of a run folder, whatever is trained: resumable at any moment."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from .checkpoint import Checkpoints
from .metrics import MetricsCSV, plot_losses
from .step import TrainConfig, TrainState

#: What decides the outcome of a run, in its folder.
SETTINGS_FILE = "run.json"


class Interrupted(RuntimeError):
    """Training was asked to stop; its state is saved and the same call goes on from there."""


def run_steps(
    folder: pathlib.Path,
    config: TrainConfig,
    state: TrainState,
    step: Callable[..., tuple[TrainState, dict[str, Any]]],
    data: Any,
    export: Callable[[TrainState], None],
    *,
    inputs: Sequence[Any] = (),
    workers: int = 0,
    progress: bool = True,
) -> TrainState:
    """Runs the steps that a run has left; returns the state after the last one.

    The folder gets `checkpoints/`, `metrics.csv` and `loss.png`.

    Args:
      folder: of the run.
      config: its settings.
      state: before the first step; a checkpoint in the folder takes its place.
      step: what `make_update` returned.
      data: an iterator of batches with `get_state()` and `set_state(state)`.
      export: called with the state after each checkpoint is complete.
      inputs: what the step takes after the batch, the same at every step.
      workers: processes behind `data`; part of its position.
      progress: whether to show a progress bar.

    Raises:
      ValueError: a damaged checkpoint, or one of another run.
      Interrupted: Ctrl-C, or SIGTERM; a checkpoint of the last finished step has been saved.
    """
    with Checkpoints(folder / "checkpoints", config.keep) as checkpoints, stop_signals() as stop:
        if checkpoints.latest() is not None:
            state, position = checkpoints.restore(state)
            if position["workers"] != workers:
                raise ValueError(
                    f"expected workers = {position['workers']}, as this run was started, "
                    f"got {workers}"
                )
            data.set_state(position["state"])
        start = int(state.step)
        metrics_path = folder / "metrics.csv"
        metrics = MetricsCSV(metrics_path, ("loss", "grad_norm", "learning_rate", "seconds"), start)

        def save() -> None:
            checkpoints.save(state, {"workers": workers, "state": data.get_state()})
            plot_losses({folder.name: metrics_path}, folder / "loss.png")
            export(state)

        bar = tqdm(
            range(start, config.steps), initial=start, total=config.steps, disable=not progress
        )
        for number in bar:
            began = time.perf_counter()
            state, values = step(state, next(data), *inputs)
            values = {name: float(value) for name, value in values.items()}
            metrics.write(number + 1, values | {"seconds": time.perf_counter() - began})
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            if stop():
                save()
                raise Interrupted(f"stopped after step {number + 1} of {config.steps}")
            if (number + 1) % config.save_every == 0 or number + 1 == config.steps:
                save()
    return state


def claim(folder: pathlib.Path, **parts: Any) -> None:
    """Writes `run.json` into a run's folder, or checks that the run that is there is the same.

    Args:
      folder: of the run.
      **parts: what decides the outcome, as plain values; `train` are the fields of a `TrainConfig`.

    Raises:
      ValueError: another run is there; the message says in which settings it differs.
    """
    wanted = json.loads(json.dumps(parts))
    path = folder / SETTINGS_FILE
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text())
        for settings in (found["train"], wanted["train"]):
            # how often to save decides nothing about the outcome and may change between resumes
            del settings["save_every"], settings["keep"]
        changed = list(_changes({part: found[part] for part in wanted}, wanted))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the settings of a run, got {error!r}") from error
    if changed:
        raise ValueError(
            f"{path}: expected the run that is there, {', '.join(changed)}; "
            "choose another folder for another run"
        )


def _changes(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Each setting that is another, such as `train.steps = 4, got 8`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*found, *wanted]):
            below = f"{name}.{key}" if name else key
            yield from _changes(found.get(key), wanted.get(key), below)
    elif found != wanted:
        yield f"{name} = {found}, got {wanted}"


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts as it always does."""
    asked = []
    before = {}

    def note(number, frame):
        asked.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, where signals cannot be caught: run without
        before.clear()
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
