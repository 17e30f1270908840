"""The steps of making a Wan video, full-size and without weights, ready to be compiled."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from vmonarch_jax.models.flow import FlowConfig
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.step import abstract_state, make_update
from vmonarch_jax.models.wan import presets
from vmonarch_jax.models.wan.collectives import Announced, announced_pictures
from vmonarch_jax.models.wan.finetune.adapters import LoRA
from vmonarch_jax.models.wan.finetune.prepare import (
    Tuning,
    abstract,
    gradient_of,
    train_config,
)
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.linear_branch import with_linear_layers
from vmonarch_jax.models.wan.sharding import Sharding
from vmonarch_jax.models.wan.transformer import WanTransformer
from vmonarch_jax.models.wan.umt5 import UMT5Encoder
from vmonarch_jax.models.wan.vae import WanVAE

import vmonarch_jax as vm

# Frames, height and width in pixels.
SIZES = {"480p": (81, 480, 832), "704p": (121, 704, 1280), "720p": (81, 720, 1280)}
METHODS = {
    "dense": vm.Dense(),
    "vmonarch": vm.VMonarch(),
    "tiled": vm.TiledMonarch(),
    "salad": vm.Salad(),
}
MODELS = {"1.3B": "wan2.1-t2v-1.3B", "14B": "wan2.1-t2v-14B"}


@dataclasses.dataclass(frozen=True)
class Step:
    """A function of parameters and inputs.

    Attributes:
        function: called as `function(params, *inputs)`.
        params: shapes by name, placed; of tuning, those of its state and of frozen weights.
        inputs: shapes, placed.
        unsplit: elements on one device of the largest activation that no token splits.
        announced: the collectives that it may hold; `None`: those of a transformer.
    """

    function: Callable[..., Any]
    params: dict[str, Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    unsplit: int = 0
    announced: tuple[Announced, ...] | None = None

    @property
    def weights(self) -> int:
        """Bytes of the parameters on one device."""
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(self.params)
            if x.sharding is not None
        )


def denoising(
    part: str,
    video: tuple[int, int, int],
    batch: int,
    attention: str,
    sharding: Sharding,
    layers: int | None = None,
) -> Step:
    """One call of a transformer; weights, products and text states in bfloat16.

    Under "salad" every layer has its linear branch. With `layers` it has so many, not all of them.
    """
    wan = presets.MODELS[MODELS[part]]
    config = dataclasses.replace(wan.transformer, dtype="bfloat16")
    config = dataclasses.replace(config, layers=layers or config.layers)
    if attention == "salad":
        config = with_linear_layers(config, range(config.layers))
    rebuild, params = _abstract(
        lambda: WanTransformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    )
    places = sharding.param_shardings(transformer_entries(config))
    latents = (batch, *wan.vae.latent_size(*video), config.in_channels)
    text = (batch, config.text_length, config.text_dim)
    # Alone, a device needs no `shard_map`.
    mesh = sharding if sharding.mesh.size > 1 else None

    def function(params: Any, latents: Any, time: Any, text: Any) -> Any:
        model = rebuild(params)
        return model(latents, time, text, attention=METHODS[attention], sharding=mesh)

    return Step(
        function,
        {name: _placed(x, places[name]) for name, x in params.items()},
        (
            _input(sharding, latents, jnp.float32),
            _input(sharding, (batch,), jnp.float32),
            _input(sharding, text, jnp.bfloat16),
        ),
        unsplit=batch // sharding.ways("batch") * config.text_length * config.dim,
    )


def tuning(
    part: str,
    video: tuple[int, int, int],
    batch: int,
    attention: str,
    sharding: Sharding,
    how: str = "lora",
    parts: int = 1,
) -> Step:
    """The step of `vmonarch finetune` with its defaults: "lora" adapters or the "full" model.

    Its parameters are the frozen weights and the whole state, which it gives back anew in place.
    """
    wan = presets.MODELS[MODELS[part]]
    kind = LoRA() if how == "lora" else None
    tuned = Tuning(METHODS[attention], kind, linear_branch=attention == "salad")
    mesh = sharding if sharding.mesh.size > 1 else None
    model, trained, frozen = abstract(wan, tuned, sharding)
    flow = FlowConfig(shift=wan.shift)
    config = train_config(kind is None, batch_size=batch, flow=flow)
    update = make_update(gradient_of(wan, model, flow, tuned, mesh, parts), config)
    sizes = wan.transformer
    text = (sizes.text_length, sizes.text_dim)
    latents = (batch, *wan.vae.latent_size(*video), wan.vae.latent_channels)

    def function(params: Any, latents: Any, text: Any, empty: Any) -> Any:
        state, metrics = update.__wrapped__(
            params["state"], {"latents": latents, "text": text}, params["frozen"], empty
        )
        return {"state": state}, metrics

    return Step(
        function,
        {"state": abstract_state(trained, config), "frozen": frozen},
        (
            _input(sharding, latents, jnp.float32),
            _input(sharding, (batch, *text), jnp.bfloat16),
            _placed(jax.ShapeDtypeStruct(text, jnp.bfloat16), sharding.placed()),
        ),
        unsplit=batch // parts // sharding.ways("batch") * sizes.text_length * sizes.dim,
    )


def text(batch: int, sharding: Sharding) -> Step:
    """The text encoder on prompts of full length, in bfloat16."""
    wan = presets.MODELS[MODELS["1.3B"]]
    rebuild, params = _abstract(
        lambda: UMT5Encoder(wan.text, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    )
    whole = sharding.placed()

    def function(params: Any, tokens: Any, mask: Any) -> Any:
        return rebuild(params)(tokens, mask)

    tokens = _input(sharding, (batch, wan.transformer.text_length), jnp.int32)
    placed = {name: _placed(x, whole) for name, x in params.items()}
    return Step(function, placed, (tokens, tokens))


def autoencoding(
    version: str, encode: bool, video: tuple[int, int, int], sharding: Sharding
) -> Step:
    """Latents to the video, or back, in float32, a latent frame at a time.

    Only the weights of this direction are among the parameters.
    """
    config = {"2.1": presets.VAE_2_1, "2.2": presets.VAE_2_2}[version]
    rebuild, params = _abstract(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    whole = sharding.placed()
    names = ("encoder", "quant") if encode else ("post_quant", "decoder")
    used = {k: x for k, x in params.items() if k.split(".")[0] in names}

    def function(used: Any, x: Any) -> Any:
        others = {k: jnp.zeros(x.shape, x.dtype) for k, x in params.items() if k not in used}
        vae = rebuild({**others, **used})
        return (vae.encode if encode else vae.decode)(x, sharding=sharding)

    latents = config.latent_size(*video)
    shape = (1, *video, 3) if encode else (1, *latents, config.latent_channels)
    pictures = sharding.placed(None, None, "rows", "columns", None)
    return Step(
        function,
        {name: _placed(x, whole) for name, x in used.items()},
        (_placed(jax.ShapeDtypeStruct(shape, jnp.float32), pictures),),
        announced=announced_pictures(sharding, config, latents),
    )


def _abstract(make: Callable[[], nnx.Module]) -> Any:
    return split_params(nnx.eval_shape(make))


def _placed(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _input(sharding: Sharding, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    split = sharding.placed("batch", *[None] * (len(shape) - 1))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=split)
