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
from .salad import merge_tuned, split_for_tuning
from .step import TrainConfig, TrainState, init_state, make_step, trained_alone


def train(
    folder: pathlib.Path,
    model_config: VideoDiTConfig,
    config: TrainConfig,
    *,
    attention: AttentionMethod | Sequence[AttentionMethod],
    initial: Params | None = None,
    adapter_rank: int | None = None,
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
      adapter_rank: trains low-rank adapters of the attention's projections and the linear branches
        alone, and merges the adapters into what it exports; `None`: all parameters.
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
        **({} if adapter_rank is None else {"adapter_rank": adapter_rank}),
    )

    def create() -> VideoDiT:
        return VideoDiT(model_config, attention=attention, rngs=nnx.Rngs(config.seed))

    model = nnx.eval_shape(create)
    if initial is None:
        params = jax.jit(lambda: split_params(create())[1])()
    else:
        check_params(initial, split_params(model)[1], "initial parameters")
        params = dict(initial)
    whole, inputs = trained_alone, ()
    if adapter_rank is not None:
        params, frozen = split_for_tuning(params, adapter_rank, config.seed)
        whole, inputs = merge_tuned, (frozen,)
    state = init_state(params, config)
    source = MotionVideos(config.seed, frames=model_config.frames, size=model_config.height)
    data = batches(source, batch_size=config.batch_size, seed=config.seed, workers=workers)

    def export(state: TrainState) -> None:
        params = whole(state.averaged, *inputs)
        export_params(folder / "export", model_config, params, note=str(attention))
        if on_checkpoint:
            on_checkpoint(state)

    step = make_step(model, config, whole)
    state = run_steps(
        folder, config, state, step, data, export,
        inputs=inputs, workers=workers, progress=progress,
    )  # fmt: skip
    return whole(state.averaged, *inputs)
