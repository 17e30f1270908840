"""What of a Wan model is trained, what is frozen, and the gradient of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from ...flow import FlowConfig
from ...params import Params, split_params
from ...step import TrainConfig
from ..config import TransformerConfig, WanConfig
from ..linear_branch import BRANCH, add_linear_branches
from ..sharding import Sharding
from ..transformer import Methods, WanTransformer
from ..weights.detect import Found
from ..weights.load import check_files, load_part
from ..weights.parts import PARTS, abstract_part, matches, part_entries
from .adapters import LoRA, adapt, chosen_projections, split_adapters
from .loss import error_sum, noised, times_of

# Where the settings of a run differ from `TrainConfig`'s own; thin adapters take larger steps.
_DEFAULTS: dict[str, Any] = {"steps": 1000, "batch_size": 1}
_LORA_DEFAULTS: dict[str, Any] = _DEFAULTS | {"learning_rate": 1e-4}
_FULL_DEFAULTS: dict[str, Any] = _DEFAULTS | {"learning_rate": 1e-5, "ema_decay": 0.0}


def train_config(full: bool | None = False, **given: Any) -> TrainConfig:
    """The settings of a run, of all weights or of adapters, where none are given."""
    return TrainConfig(**(_FULL_DEFAULTS if full else _LORA_DEFAULTS) | given)


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

    @property
    def frozen_dtype(self) -> Any:
        """Of weights as they are loaded, but norms, modulation and time, which are float32."""
        return jnp.dtype(self.dtype) if self.lora is not None else jnp.float32

    def computing(self, config: WanConfig) -> WanConfig:
        """The model with the dtype and the recomputation of tuning."""
        sizes = dataclasses.replace(config.transformer, dtype=self.dtype, remat=self.remat)
        return dataclasses.replace(config, transformer=sizes)

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
    check_files(found, tuning.part)
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


def prepare(
    found: Found, tuning: Tuning, seed: int, sharding: Sharding | None = None
) -> tuple[WanTransformer, Params, Params]:
    """`(model, trained, frozen)`: the model without values, and the parameters of either kind."""
    config = tuning.computing(found.config)
    found = dataclasses.replace(found, config=config)
    params = split_params(load_part(found, tuning.part, tuning.frozen_dtype, sharding))[1]
    sizes = config.transformer
    if tuning.linear_branch:
        sizes, params = add_linear_branches(sizes, params, placement=sharding)
    lora = tuning.lora
    if lora is None:
        return _model(sizes, None, seed)[0], params, {}
    model, adapters = _model(sizes, lora, seed)
    trained = jax.jit(adapters, out_shardings=_thin(sharding))()
    own, frozen = _branches_of(tuning, params)
    trained |= {name: value.astype(jnp.float32) for name, value in own.items()}
    return model, trained, frozen


def abstract(
    config: WanConfig, tuning: Tuning, sharding: Sharding | None = None
) -> tuple[WanTransformer, Params, Params]:
    """What `prepare` returns, as shapes with their places: reads no weights, makes no array.

    Example:
      model, trained, frozen = abstract(MODELS["wan2.1-t2v-1.3B"], Tuning(vm.VMonarch()))
    """
    config = tuning.computing(tuning.config_of(config))
    entries = part_entries(config, tuning.part)
    places: Any = {} if sharding is None else sharding.param_shardings(entries)
    params: Any = {
        entry.name: jax.ShapeDtypeStruct(
            entry.full_shape,
            jnp.float32
            if matches(entry.diffusers, PARTS[tuning.part].float32)
            else tuning.frozen_dtype,
            sharding=places.get(entry.name),
        )
        for entry in entries
    }
    model, adapters = _model(config.transformer, tuning.lora, 0)
    if tuning.lora is None:
        return model, params, {}
    trained, frozen = _branches_of(tuning, params)
    trained |= jax.eval_shape(adapters)
    thin = _thin(sharding)
    placed: Any = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=places.get(name, thin))
        for name, x in trained.items()
    }
    return model, placed, frozen


def _model(
    sizes: TransformerConfig, lora: LoRA | None, seed: int
) -> tuple[WanTransformer, Callable[[], Params]]:
    """The model without values, and what makes its adapters."""

    def create() -> WanTransformer:
        rngs = nnx.Rngs(seed)
        model = WanTransformer(sizes, rngs=rngs)
        return model if lora is None else adapt(model, lora, rngs=rngs)

    return nnx.eval_shape(create), lambda: split_adapters(split_params(create())[1])[0]


def _thin(sharding: Sharding | None) -> NamedSharding | None:
    """Where adapters lie: they are thin, and every device holds all of them."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def _branches_of(tuning: Tuning, params: Params) -> tuple[Params, Params]:
    """The linear branches that are tuned as a whole beside adapters, and all else."""
    own = {n for n in params if tuning.linear_branch and n.startswith(BRANCH)}
    return (
        {name: params[name] for name in params if name in own},
        {name: params[name] for name in params if name not in own},
    )


def gradient_of(
    config: WanConfig,
    model: WanTransformer,
    flow: FlowConfig,
    tuning: Tuning,
    sharding: Sharding | None = None,
    parts: int = 1,
) -> Callable[..., tuple[Array, Params]]:
    """Loss and gradient as `make_update` takes them.

    They are called as `gradient(trained, key, batch, frozen, empty)`. Times and noise are drawn for
    the whole batch, and its loss is one mean; so nothing but rounding depends on the parts.

    Args:
      config: of the model.
      model: without values, from `prepare`.
      flow: how times and noise are drawn.
      tuning: what is tuned.
      sharding: where activations lie on a mesh, or `None`: one device.
      parts: in which the batch goes through the model, one after another: the memory of
        activations is that of one part. Part p has the videos p, p + parts, ..., so that a batch
        that is split along the mesh stays where it is.
    """
    rebuild, _ = split_params(model)

    def gradient(trained: Params, key: Array, batch: Any, frozen: Params, empty: Array) -> Any:
        shown = noised(
            batch, empty, key, flow=flow, span=times_of(config, tuning.part),
            first_frame_share=tuning.first_frame_share,
        )  # fmt: skip
        count = jnp.maximum(shown.judged.sum(), 1)

        def loss(trained: Params, shown: Any, image: Array | None) -> Array:
            module = rebuild(frozen | trained)

            def velocity(latents, time, text, image):
                return module(
                    latents, time, text, image, attention=tuning.attention, sharding=sharding
                )

            return error_sum(velocity, shown, image) / count

        if parts == 1:
            return jax.value_and_grad(loss)(trained, shown, batch.get("image"))

        def one(total: Any, some: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trained, *some)), None

        split = jax.tree.map(
            lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1),
            (shown, batch.get("image")),
        )
        start = jnp.float32(0), jax.tree.map(jnp.zeros_like, trained)
        return jax.lax.scan(one, start, split)[0]

    return gradient
