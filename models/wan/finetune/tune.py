"""Tuning: cached clips and a folder of weights in, a LoRA file or a whole model out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from ...loop import claim, run_steps
from ...params import Params, split_params
from ...pipeline import batches
from ...step import TrainConfig, TrainState, init_state, make_update
from ..config import WanConfig
from ..linear_branch import BRANCH, add_linear_branches
from ..sharding import Sharding
from ..transformer import Methods, WanTransformer
from ..weights.detect import NOTE, STEMS, Found
from ..weights.load import load_part
from ..weights.lora import save_lora
from ..weights.parts import abstract_part, part_entries
from ..weights.save import export_weights, save_weights
from ..weights.stored import Stored
from .adapters import LoRA, adapt, chosen_projections, deltas_of, split_adapters
from .cache import ClipCache, fingerprint
from .loss import times_of, velocity_loss

#: What a run leaves in its folder: the adapter, or the whole model.
LORA_FILE, MODEL_FOLDER = "lora.safetensors", "model"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is tuned, beside how (`TrainConfig`) and on what (`ClipCache`).

    Attributes:
      attention: the method, or one a layer.
      lora: the adapters, or `None`: all weights of the transformer.
      part: "transformer", or "transformer_2": the expert of low noise.
      dtype: "bfloat16" or "float32" of the matmuls, and of frozen weights. What is trained is
        float32.
      remat: what the backward pass recomputes: "none", "dots" (all but matmuls) or "full".
      first_frame_share: share of samples that are given their first frame (TI2V-5B).
      linear_branch: whether all layers get SALAD's linear branch, which is then tuned as a whole,
        also beside adapters.
    """

    attention: Methods
    lora: LoRA | None = LoRA()  # noqa: RUF009 (frozen)
    part: str = "transformer"
    dtype: str = "bfloat16"
    remat: str = "full"
    first_frame_share: float = 0.0
    linear_branch: bool = False

    def config_of(self, config: WanConfig) -> WanConfig:
        """The model once it is tuned."""
        if not self.linear_branch:
            return config
        layers = tuple(range(config.transformer.layers))
        transformer = dataclasses.replace(config.transformer, linear_layers=layers)
        return dataclasses.replace(config, transformer=transformer)


def check_tuning(found: Found, tuning: Tuning) -> None:
    """Raises `ValueError` if a model can't be tuned so; reads no weights."""
    config = found.config
    expected = ["transformer", *(["transformer_2"] if config.boundary is not None else [])]
    if tuning.part not in expected:
        raise ValueError(f"{config.name}: expected a part of {expected}, got {tuning.part!r}")
    found.require(tuning.part)
    if not 0 <= tuning.first_frame_share <= 1:
        raise ValueError(f"expected first_frame_share in [0, 1], got {tuning.first_frame_share}")
    if tuning.first_frame_share and not config.first_frame:
        raise ValueError(f"{config.name} is given no first frame: expected first_frame_share = 0")
    if config.transformer.image_positions:
        raise ValueError(
            f"{config.name} makes a video between a first and a last image, "
            "which is not supported: expected a model of one image"
        )
    if tuning.linear_branch and tuning.lora is None and len(expected) > 1:
        raise ValueError(
            f"{config.name}: expected adapters beside linear branches, because a whole model has "
            "them in both experts or in none, and each is tuned alone; got all weights of one"
        )
    model: Any = abstract_part(tuning.config_of(config), tuning.part)
    model.methods(tuning.attention)
    if tuning.lora is not None:
        chosen_projections(model, tuning.lora.projections)


def tune(
    folder: pathlib.Path,
    cache: ClipCache,
    config: TrainConfig,
    tuning: Tuning,
    *,
    sharding: Sharding | None = None,
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
    found, folder = cache.found, pathlib.Path(folder)
    check_tuning(found, tuning)
    if sharding is not None:
        _check_mesh(tuning.config_of(found.config), tuning.part, config.batch_size, sharding)
    if len(cache.clips) < config.batch_size:
        raise ValueError(
            f"expected at least batch_size = {config.batch_size} videos, got {len(cache.clips)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    claim(
        folder,
        model={"name": found.config.name, "weights": fingerprint(found.parts[tuning.part])},
        train=dataclasses.asdict(config),
        attention=str(tuning.attention),
        tuning={
            "lora": None if tuning.lora is None else dataclasses.asdict(tuning.lora),
            "part": tuning.part,
            "dtype": tuning.dtype,
            "first_frame_share": tuning.first_frame_share,
            **({"linear_branch": True} if tuning.linear_branch else {}),
        },
        data={"clips": len(cache.clips), "sha256": cache.key},
    )
    source = cache.fill(progress=progress)
    data = batches(source, batch_size=config.batch_size, seed=config.seed)
    model, trained, frozen = prepare(found, tuning, config.seed, sharding)
    # what the branches were, where they are not new; new ones were zero
    known = bool(found.config.transformer.linear_layers)
    before = {n: np.asarray(v) for n, v in trained.items() if known and n.startswith(BRANCH)}
    state = init_state(trained, config)
    del trained  # the state has a copy of its own
    step = make_update(loss_of(found, model, config, tuning, sharding), config)
    tuned = dataclasses.replace(found, config=tuning.config_of(found.config))
    entries = part_entries(tuned.config, tuning.part)
    note = {
        "base_model": found.config.name,
        "attention": str(tuning.attention),
        "part": tuning.part,
    }

    def export(state: TrainState) -> None:
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
        if on_checkpoint:
            on_checkpoint(state)

    inputs = (frozen, jnp.asarray(source.empty_text()))
    state = run_steps(folder, config, state, step, data, export, inputs=inputs, progress=progress)
    if tuning.lora is not None:
        return folder / LORA_FILE
    save_model(folder / MODEL_FOLDER, tuned, tuning.part, state.averaged)
    return folder / MODEL_FOLDER


def _check_mesh(model: WanConfig, part: str, batch: int, sharding: Sharding) -> None:
    sharding.param_shardings(part_entries(model, part))
    heads = model.transformer.heads
    for what, size, ways in (
        ("heads", heads, sharding.ways("heads") * sharding.ways("seq")),
        ("videos a batch", batch, sharding.ways("batch")),
    ):
        if size % ways:
            raise ValueError(f"expected a mesh whose {ways} shares divide the {size} {what}")


def prepare(
    found: Found, tuning: Tuning, seed: int, sharding: Sharding | None = None
) -> tuple[WanTransformer, Params, Params]:
    """`(model, trained, frozen)`: the model without values, and the parameters of either kind."""
    sizes = dataclasses.replace(found.config.transformer, dtype=tuning.dtype, remat=tuning.remat)
    found = dataclasses.replace(found, config=dataclasses.replace(found.config, transformer=sizes))
    dtype = jnp.dtype(tuning.dtype) if tuning.lora is not None else jnp.float32
    params = split_params(load_part(found, tuning.part, dtype, sharding))[1]
    if tuning.linear_branch:
        sizes, params = add_linear_branches(sizes, params, placement=sharding)
        config = dataclasses.replace(found.config, transformer=sizes)
        found = dataclasses.replace(found, config=config)
    lora = tuning.lora
    if lora is None:
        model: Any = abstract_part(found.config, tuning.part)
        return model, params, {}

    def create() -> WanTransformer:
        rngs = nnx.Rngs(seed)
        return adapt(WanTransformer(sizes, rngs=rngs), lora, rngs=rngs)

    def adapters() -> Params:
        return split_adapters(split_params(create())[1])[0]

    if sharding is None:
        trained = jax.jit(adapters)()
    else:
        # thin matrices: every device holds all of them
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        trained = jax.jit(adapters, out_shardings=whole)()
    if tuning.linear_branch:
        own = {name: value for name, value in params.items() if name.startswith(BRANCH)}
        params = {name: value for name, value in params.items() if name not in own}
        trained |= {name: value.astype(jnp.float32) for name, value in own.items()}
    return nnx.eval_shape(create), trained, params


def loss_of(
    found: Found,
    model: WanTransformer,
    config: TrainConfig,
    tuning: Tuning,
    sharding: Sharding | None = None,
) -> Callable[..., Array]:
    """The loss as `make_update` takes it: `loss(trained, key, batch, frozen, empty)`."""
    rebuild, _ = split_params(model)

    def loss(trained: Params, key: Array, batch: Any, frozen: Params, empty: Array) -> Array:
        module = rebuild(frozen | trained)

        def velocity(latents, time, text, image):
            return module(latents, time, text, image, attention=tuning.attention, sharding=sharding)

        return velocity_loss(
            velocity,
            batch,
            empty,
            key,
            flow=config.flow,
            span=times_of(found.config, tuning.part),
            first_frame_share=tuning.first_frame_share,
        )

    return loss


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
