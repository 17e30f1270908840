"""The training loop: a run folder in, a trained model out, resumable at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from flax import nnx
from tqdm import tqdm

from .checkpoint import Checkpoints
from .config import VideoDiTConfig
from .dit import VideoDiT
from .export import export_params
from .layers import AttentionMethod
from .metrics import MetricsCSV, plot_losses
from .params import Params, check_params, split_params
from .pipeline import MotionVideos, batches
from .step import TrainConfig, TrainState, init_state, make_step


class Interrupted(RuntimeError):
    """Training was asked to stop; its state is saved and the same call goes on from there."""


def train(
    folder: pathlib.Path,
    model_config: VideoDiTConfig,
    config: TrainConfig,
    *,
    attention: AttentionMethod | Sequence[AttentionMethod],
    initial: Params | None = None,
    workers: int = 0,
    progress: bool = True,
    on_checkpoint: Callable[[TrainState], None] | None = None,
) -> Params:
    """Trains a model in `folder`, or goes on with the run that is there.

    The folder gets `run.json` (both configurations), `checkpoints/`, `metrics.csv`, `loss.png` and,
    at every checkpoint, `export/`: the averaged weights, ready for `load_model`.

    Args:
      folder: of this run.
      model_config: the model's sizes.
      config: the run's settings.
      attention: the method, or methods, to train under.
      initial: parameters to start from (fine-tuning); `None` draws new ones.
      workers: processes that render videos; 0 uses threads of this one.
      progress: whether to show a progress bar.
      on_checkpoint: called with the state after each checkpoint is complete.

    Returns:
      The averaged parameters after the last step.

    Raises:
      ValueError: the folder holds another run, a damaged checkpoint, or `initial` does not fit.
      Interrupted: Ctrl-C, or SIGTERM; a checkpoint of the last finished step has been saved.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, model_config, config, attention)

    def create() -> VideoDiT:
        return VideoDiT(model_config, attention=attention, rngs=nnx.Rngs(config.seed))

    model = nnx.eval_shape(create)
    if initial is None:
        params = jax.jit(lambda: split_params(create())[1])()
    else:
        check_params(initial, split_params(model)[1], "initial parameters")
        params = dict(initial)
    state = init_state(params, config)
    source = MotionVideos(config.seed, frames=model_config.frames, size=model_config.height)
    data = batches(source, batch_size=config.batch_size, seed=config.seed, workers=workers)
    step = make_step(model, config)
    with Checkpoints(folder / "checkpoints", config.keep) as checkpoints, _stop_signals() as stop:
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
            export_params(folder / "export", model_config, state.ema, note=str(attention))
            plot_losses({folder.name: metrics_path}, folder / "loss.png")
            if on_checkpoint:
                on_checkpoint(state)

        bar = tqdm(
            range(start, config.steps), initial=start, total=config.steps, disable=not progress
        )
        for number in bar:
            began = time.perf_counter()
            state, values = step(state, next(data))
            values = {name: float(value) for name, value in values.items()}
            metrics.write(number + 1, values | {"seconds": time.perf_counter() - began})
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            if stop():
                save()
                raise Interrupted(f"stopped after step {number + 1} of {config.steps}")
            if (number + 1) % config.save_every == 0 or number + 1 == config.steps:
                save()
    return state.ema


def _claim(folder, model_config, config, attention) -> None:
    """Writes `run.json`, or checks that the run that is there is the same one."""
    wanted = {
        "model": dataclasses.asdict(model_config),
        "train": dataclasses.asdict(config),
        "attention": str(attention),
    }
    wanted = json.loads(json.dumps(wanted))
    path = folder / "run.json"
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text())
        for settings in (found["train"], wanted["train"]):
            # how often to save decides nothing about the outcome and may change between resumes
            del settings["save_every"], settings["keep"]
        changed = [part for part in wanted if found[part] != wanted[part]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the settings of a run, got {error!r}") from error
    for part in changed:
        raise ValueError(
            f"{path}: expected the run that is there, {part} = {found[part]}, "
            f"got {wanted[part]}; choose another folder for another run"
        )


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
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
