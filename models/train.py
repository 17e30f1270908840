"""Training a video DiT: a run folder in, a trained model out, resumable at any moment."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from .config import VideoDiTConfig
from .dit import VideoDiT
from .export import export_params
from .layers import AttentionMethod
from .loop import claim, run_steps
from .params import Params, check_params, split_params
from .pipeline import MotionVideos, batches
from .step import TrainConfig, TrainState, init_state, make_step


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
    claim(
        folder,
        model=dataclasses.asdict(model_config),
        train=dataclasses.asdict(config),
        attention=str(attention),
    )

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

    def export(state: TrainState) -> None:
        export_params(folder / "export", model_config, state.averaged, note=str(attention))
        if on_checkpoint:
            on_checkpoint(state)

    step = make_step(model, config)
    state = run_steps(folder, config, state, step, data, export, workers=workers, progress=progress)
    return state.averaged
