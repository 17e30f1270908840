"""Tuning: cached clips and a folder of weights in, a LoRA file or a whole model out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ...loop import SETTINGS_FILE, claim, run_steps
from ...params import Params
from ...pipeline import batches
from ...step import TrainConfig, TrainState, init_state, make_update
from ..linear_branch import BRANCH
from ..sharding import Sharding
from ..weights.detect import NOTE, STEMS, Found
from ..weights.lora import save_lora
from ..weights.parts import part_entries
from ..weights.save import export_weights, save_weights
from ..weights.stored import Stored
from .adapters import deltas_of
from .cache import ClipCache, fingerprint
from .prepare import Tuning, check_tuning, gradient_of, prepare

#: What a run leaves in its folder: the adapter, or the whole model.
LORA_FILE, MODEL_FOLDER = "lora.safetensors", "model"


def tune(
    folder: pathlib.Path,
    cache: ClipCache,
    config: TrainConfig,
    tuning: Tuning,
    *,
    sharding: Sharding | None = None,
    parts: int = 1,
    progress: bool = True,
    on_checkpoint: Callable[[TrainState], None] | None = None,
) -> pathlib.Path:
    """Tunes a Wan model to an attention method, or goes on with the run that is in `folder`.

    The folder gets `run.json`, `checkpoints/`, `metrics.csv`, `loss.png`, and `lora.safetensors`
    (PEFT's format, as Diffusers reads it) at every checkpoint, or `model/` at the end: the folder
    of weights with the tuned transformer in it.

    Args:
      folder: of this run.
      cache: the clips; what is missing is encoded first.
      config: the run's settings; `flow.shift` is usually the model's.
      tuning: what is tuned.
      sharding: places parameters and activations on a mesh, or `None`: one device.
      parts: in which a batch goes through the model, one after another; nothing but rounding
        depends on them, and a run may go on with others.
      progress: whether to show progress bars.
      on_checkpoint: called with the state after each checkpoint is complete.

    Returns:
      The LoRA file, or the folder of the whole model.

    Raises:
      ValueError: the folder holds another run, there are fewer clips than a batch, or a video is
        damaged.
      Interrupted: Ctrl-C, or SIGTERM; all that is done is saved, and the same call goes on.

    Example:
      cache = ClipCache(found, find_clips("videos"), ClipSettings(81, (832, 480), 16), "cache")
      tune("run", cache, TrainConfig(steps=1000, batch_size=1), Tuning(vm.VMonarch()))

    Reference: VMonarch (arXiv 2601.22275): 800 to 1500 steps of tuning.
    """
    check_run(cache, config, tuning, sharding, parts)
    found, folder = cache.found, pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": {"name": found.config.name, "weights": fingerprint(found.parts[tuning.part])},
        "train": dataclasses.asdict(config),
        "attention": str(tuning.attention),
        "tuning": {
            "lora": None if tuning.lora is None else dataclasses.asdict(tuning.lora),
            "part": tuning.part,
            "dtype": tuning.dtype,
            "first_frame_share": tuning.first_frame_share,
            **({"linear_branch": True} if tuning.linear_branch else {}),
        },
        "data": {"clips": len(cache.clips), "sha256": cache.key},
    }
    # a folder is the run's only when every video was found good: until then they may be mended
    if (folder / SETTINGS_FILE).exists():
        claim(folder, **settings)
    source = cache.fill(progress=progress)
    claim(folder, **settings)
    data = batches(source, batch_size=config.batch_size, seed=config.seed)
    model, trained, frozen = prepare(found, tuning, config.seed, sharding)
    # what the branches were, where they are not new; new ones were zero
    known = bool(found.config.transformer.linear_layers)
    before = {n: np.asarray(v) for n, v in trained.items() if known and n.startswith(BRANCH)}
    state = init_state(trained, config)
    del trained  # the state has a copy of its own
    gradient = gradient_of(found.config, model, config.flow, tuning, sharding, parts)
    step = make_update(gradient, config)
    tuned = dataclasses.replace(found, config=tuning.config_of(found.config))
    entries = part_entries(tuned.config, tuning.part)
    note = {
        "base_model": found.config.name,
        "attention": str(tuning.attention),
        "part": tuning.part,
    }

    def write(state: TrainState) -> pathlib.Path:
        if tuning.lora is not None:
            deltas = deltas_of(state.averaged)
            partial = folder / f".{LORA_FILE}.partial.safetensors"
            whole = {
                name: value - before[name] if name in before else value
                for name, value in state.averaged.items()
                if name.startswith(BRANCH)
            }
            save_lora(partial, deltas, entries, tuning.lora.scale, metadata=note, whole=whole)
            os.replace(partial, folder / LORA_FILE)
            return folder / LORA_FILE
        save_model(folder / MODEL_FOLDER, tuned, tuning.part, state.averaged)
        return folder / MODEL_FOLDER

    def export(state: TrainState) -> None:
        if tuning.lora is not None:  # whole models are large: only the last one
            write(state)
        if on_checkpoint:
            on_checkpoint(state)

    inputs = (frozen, jnp.asarray(source.empty_text()))
    state = run_steps(folder, config, state, step, data, export, inputs=inputs, progress=progress)
    # once more, because a run may have been killed between its last checkpoint and the file
    return write(state)


def check_run(
    cache: ClipCache,
    config: TrainConfig,
    tuning: Tuning,
    sharding: Sharding | None = None,
    parts: int = 1,
) -> None:
    """Raises `ValueError` if `tune` can't do with these arguments; reads no weights."""
    found = cache.found
    check_tuning(found, tuning)
    if len(cache.clips) < config.batch_size:
        raise ValueError(
            f"expected at least batch_size = {config.batch_size} videos, got {len(cache.clips)}"
        )
    if parts < 1 or config.batch_size % parts:
        raise ValueError(
            f"expected parts (--accumulate) that divide batch_size = {config.batch_size}, "
            f"got {parts}"
        )
    if sharding is None:
        return
    model = tuning.config_of(found.config)
    sharding.param_shardings(part_entries(model, tuning.part))
    for what, size, ways in (
        ("heads", model.transformer.heads, sharding.ways("heads") * sharding.ways("seq")),
        ("videos at a time", config.batch_size // parts, sharding.ways("batch")),
    ):
        if size % ways:
            raise ValueError(f"expected a mesh whose {ways} shares divide the {size} {what}")


def save_model(folder: pathlib.Path, found: Found, part: str, params: Params) -> None:
    """Writes a folder of weights with one part replaced, in the layout of the one it came from.

    `found.config` is that of the new model: it may have linear branches that the old one had not.

    All other files are linked to the originals where the file system can, and copied elsewhere.
    Tensors have the dtypes that they were stored with ("orbax": float32). The folder appears when
    it is complete.

    Raises:
      ValueError: parameters are missing or misshapen.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.unfinished")
    replaced = {path.resolve() for path in found.parts[part]}
    if found.convention == "orbax":
        save_weights(partial, found.config, {part: params}, overwrite=True)
    else:
        params = _as_stored(found, part, params)
        export_weights(partial, found.config, {part: params}, found.convention, overwrite=True)
        index = f"{STEMS[part]}.safetensors.index.json"
        replaced |= {path.parent.resolve() / index for path in found.parts[part]}
    for path in sorted(found.folder.rglob("*")):
        below = path.relative_to(found.folder)
        real = path.resolve()
        hidden = any(name.startswith(".") for name in below.parts)
        if (
            hidden
            or str(below) == NOTE
            or not real.is_file()
            or not replaced.isdisjoint((real, *real.parents))
        ):
            continue
        target = partial / below
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(real, target)
        except OSError:
            shutil.copy2(real, target)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _as_stored(found: Found, part: str, params: Params) -> Params:
    """The parameters in the dtypes of the files that they were read from."""
    stored = Stored(found.parts[part])
    dtypes = {
        entry.name: stored[key].dtype
        for entry in part_entries(found.config, part)
        if (key := entry.keys(found.convention)[0]) in stored
    }
    return {name: value.astype(dtypes.get(name, value.dtype)) for name, value in params.items()}
