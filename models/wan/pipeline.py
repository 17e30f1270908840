"""From a prompt to a video: text, image, denoising, decoding, one large part at a time."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from ..attention_schedule import Attention, AttentionSchedule
from ..params import split_params
from .conditions import (
    Conditions,
    beside_channels,
    check_image,
    check_texts,
    first_frame,
    image_states,
    rebuild_vae,
    text_states,
)
from .config import WanConfig, with_dtype
from .guidance import guided
from .linear_branch import add_linear_branches, with_linear_layers
from .memory import EMPTY, Memory, begin, calls_of, let_go
from .request import Request
from .sharding import Sharding
from .tokenizer import WanTokenizer
from .transformer import WanTransformer
from .weights.detect import Found, detect
from .weights.load import check_files, load_part
from .weights.lora import check_lora, linear_layers_of, merge_lora
from .weights.parts import abstract_part, part_entries

#: Gives a part by name: "transformer", "transformer_2", "vae", "text_encoder", "image_encoder".
Loader = Callable[[str], nnx.Module]


class Progress(NamedTuple):
    """All that denoising carries from step to step.

    Attributes:
      sampler: the sampler's state.
      attention: what attention remembers, for each call of the transformer in a step: one, or two
        under guidance in two calls. None before the first step of an expert and after its last.
    """

    sampler: Any
    attention: tuple[Memory, ...] = ()

    @property
    def x(self) -> Array:
        """The noised latents."""
        return self.sampler.x


#: `on_step(n, progress)` after step n, from 1 on.
OnStep = Callable[[int, Progress], None]


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """A LoRA that is merged onto a transformer.

    Attributes:
      path: the safetensors file.
      part: "transformer", or "transformer_2": the expert of low noise.
      strength: factor of its difference.
    """

    path: pathlib.Path
    part: str = "transformer"
    strength: float = 1.0


class WanPipeline:
    """A Wan model with all its parts, of which at most one is held at a time.

    The text encoder is freed before the transformer is loaded, and the expert of high noise before
    that of low noise, so a device needs the memory of the largest part and not of all of them.

    Args:
      config: the model.
      parts: the parts by name, or what loads one. Models that are given stay alive with the
        caller, so only loading frees memory.
      tokenizer: `WanTokenizer`; may be `None` where text states are given.
      placement: where parts and activations lie on a mesh, or `None`: on one device.

    Example:
      pipeline = WanPipeline.open("Wan2.1-T2V-1.3B-Diffusers")
      request = Request.of(pipeline.config, prompt="A cat on a sofa", seed=1)
      schedule = AttentionSchedule(vm.VMonarch(), warmup_steps=10)
      video = pipeline(request, attention=schedule)       # [1, 81, 480, 832, 3] in [-1, 1]

    Source: `WanPipeline` and `WanImageToVideoPipeline` of Diffusers, to which it is equal in
    float32, given the same noise.
    """

    def __init__(
        self,
        config: WanConfig,
        parts: Loader | Mapping[str, nnx.Module],
        tokenizer: Any = None,
        placement: Sharding | None = None,
    ) -> None:
        self.config = config
        self.placement = placement
        self.tokenizer = tokenizer
        self._load: Loader = parts.__getitem__ if isinstance(parts, Mapping) else parts
        self._held: dict[str, nnx.Module] = {}

    @classmethod
    def open(
        cls,
        found: Found | str | pathlib.Path,
        dtype: str = "bfloat16",
        placement: Sharding | None = None,
        lora: Sequence[LoRAFile] = (),
    ) -> WanPipeline:
        """The pipeline of a folder of weights; a part is read when it is needed.

        Args:
          found: the folder, or what `detect` found in it.
          dtype: "bfloat16" or "float32", of the weights and matmuls of transformers and encoders;
            the autoencoder is float32 in any case, where bfloat16 would be seen.
          placement: where arrays lie on a mesh; `None`: one device.
          lora: files that are merged onto the transformers as these are read; where one has linear
            branches, both experts get them, of zeros in the other.

        Raises:
          ValueError: the folder lacks something that making a video takes, a file is damaged or
            of another model, or a LoRA is.
        """
        found = found if isinstance(found, Found) else detect(found)
        check_files(found)
        found = dataclasses.replace(found, config=with_dtype(found.config, dtype))
        text_length = found.config.transformer.text_length
        tokenizer = WanTokenizer.load(found.tokenizer or found.folder, text_length)

        for one in lora:
            found.require(one.part)
        branches = {layer for one in lora for layer in linear_layers_of(one.path)}
        transformer = with_linear_layers(found.config.transformer, branches)
        config = dataclasses.replace(found.config, transformer=transformer)
        for one in lora:
            check_lora(one.path, part_entries(config, one.part))

        def load(part: str) -> nnx.Module:
            kept = jnp.float32 if part == "vae" else jnp.dtype(dtype)
            module: Any = load_part(found, part, kept, placement)
            if branches and isinstance(module, WanTransformer):
                params = split_params(module)[1]
                params = add_linear_branches(module.config, params, branches, placement)[1]
                module = split_params(abstract_part(config, part))[0](params)
            for one in (one for one in lora if one.part == part):
                rebuild, params = split_params(module)
                entries = part_entries(config, part)
                module = rebuild(merge_lora(params, one.path, entries, one.strength))
            return module

        return cls(config, load, tokenizer, placement)

    def part(self, name: str) -> Any:
        """A part; the one that was held before is let go first."""
        if name not in self._held:
            self.free()
            self._held[name] = self._load(name)
        return self._held[name]

    def free(self) -> None:
        """Lets go of the part that is held."""
        self._held.clear()

    def __call__(
        self,
        request: Request,
        *,
        image: UInt8[np.ndarray, "height width 3"] | None = None,
        last_image: UInt8[np.ndarray, "height width 3"] | None = None,
        attention: Attention | None = None,
        batched: bool = True,
        on_step: OnStep | None = None,
    ) -> Float[Array, "batch frames height width 3"]:
        """Returns videos in [-1, 1].

        Args:
          request: what to make.
          image: the first frame, at the request's size (`fit_image`).
          last_image: the last frame, likewise; for FLF2V and I2V-A14B.
          attention: of every layer, of each layer, or an `AttentionSchedule`; `None`: dense.
          batched: guidance in one call on a doubled batch, or in two calls and half the memory.
          on_step: called after each denoising step.

        Raises:
          ValueError: the model can't do that.
        """
        request.grid(self.config)
        conditions = self.conditions(request, image, last_image)
        latents = self.denoise(
            request, conditions, self.noise(request), attention=attention, batched=batched,
            on_step=on_step,
        )  # fmt: skip
        return self.decode(latents)

    def conditions(
        self,
        request: Request,
        image: UInt8[np.ndarray, "height width 3"] | None = None,
        last_image: UInt8[np.ndarray, "height width 3"] | None = None,
    ) -> Conditions:
        """Encodes prompts and images; the encoders are freed afterwards.

        Raises:
          ValueError: a prompt is too long, an image has another size than the request, or there
            are no two frames for two images.
        """
        check_image(self.config, image, last_image)
        width, height = request.size
        images = [pixels for pixels in (image, last_image) if pixels is not None]
        for pixels in images:
            if pixels.shape != (height, width, 3):
                raise ValueError(f"expected an image of {(height, width, 3)}, got {pixels.shape}")
        if len(images) > request.frames:
            raise ValueError(f"expected frames >= 2 between two images, got {request.frames}")
        text, negative = self._text(request)
        batch = len(text)
        states = beside = first = None
        if image is not None and self.config.image is not None:
            fit = request.image_fit
            states = image_states(self.part("image_encoder"), *images, fit=fit)
            states = self._repeat(states, batch)
        if image is not None and self.config.first_frame:
            first = self._repeat(first_frame(self.part("vae"), image, self.placement), batch)
        elif image is not None:
            given = image, request.frames, last_image
            beside = beside_channels(self.part("vae"), *given, sharding=self.placement)
            beside = self._repeat(beside, batch)
        self.free()
        return Conditions(text, negative, states, beside, first)

    def noise(self, request: Request) -> Float[Array, "batch t h w channels"]:
        """The latents to start from: standard normal, of JAX's generator and the request's seed."""
        return jax.random.normal(jax.random.key(request.seed), request.latent_shape(self.config))

    def denoise(
        self,
        request: Request,
        conditions: Conditions,
        noise: Float[Array, "batch t h w channels"],
        *,
        attention: Attention | None = None,
        batched: bool = True,
        start: tuple[int, Progress] | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Array, "batch t h w channels"]:
        """The latents of the video.

        The steps run one by one on the host, so that they can be watched, kept and gone on from;
        a step is one compiled program for each distinct tuple of methods.

        Methods that remember something get the number of the step in the whole schedule. Of two
        experts each has a memory of its own: what the first one remembers is let go with it, and
        what the second one's methods should know by then they find out in its first step.

        Args:
          request: what to make.
          conditions: as `conditions` returns them.
          noise: the latents to start from.
          attention: as `__call__`.
          batched: as `__call__`.
          start: `(n, progress)` as `on_step` had them: goes on after step n, bit for bit.
          on_step: called as `on_step(n, progress)` after step n of `request.steps`. The next step
            works in place on what attention remembers, which `on_step` must copy to keep, and so
            does the first one on that of `start`.
        """
        done, progress = (0, self.begin(request, noise)) if start is None else start
        for n in range(done, request.steps):
            progress = self.step(
                request, conditions, n, progress, attention=attention, batched=batched,
                in_place=True,
            )  # fmt: skip
            if on_step is not None:
                on_step(n + 1, progress)
        return _with_first(progress.x, conditions.first)

    @staticmethod
    def begin(request: Request, noise: Float[Array, "batch t h w channels"]) -> Progress:
        """The progress before the first step."""
        return Progress(request.sampler_value().init(noise))

    def step(
        self,
        request: Request,
        conditions: Conditions,
        index: int,
        progress: Progress,
        *,
        attention: Attention | None = None,
        batched: bool = True,
        in_place: bool = False,
        forget: bool = True,
    ) -> Progress:
        """The progress after step `index`, counted from 0, given that before it.

        With `in_place` what attention remembers is not there twice; that of `progress` is used up.
        With `forget` nothing is remembered behind the last step of an expert.
        """
        part, guidance = request.experts(self.config)[index]
        model = self.part(part)
        graph, weights = nnx.split(model)
        if isinstance(attention, AttentionSchedule):
            attention = attention.at(index, request.steps, self.config.transformer.layers)
        methods = model.methods(attention)
        calls, batch = calls_of(request, guidance, batched)
        state = jax.tree.map(jnp.asarray, progress.sampler)
        known = progress.attention or (EMPTY,) * calls
        if self.placement is not None:
            known = jax.device_put(known, self.placement.state_shardings(known))
        sizes = self.config.transformer, request.grid(self.config), batch, methods
        memory = tuple(
            begin(*sizes, jax.tree.map(jnp.asarray, one), self.placement) for one in known
        )
        seen = conditions if guidance > 1 else conditions._replace(negative=None)
        state, memory = (_step_in_place if in_place else _step)(
            graph, methods, request.sampler_value(), batched, self.placement, weights, state, seen,
            jnp.int32(index), jnp.float32(guidance), memory,
        )  # fmt: skip
        gone = forget and let_go(self.config, request, index)
        return Progress(state, () if gone else memory)

    def decode(
        self, latents: Float[Array, "batch t h w channels"]
    ) -> Float[Array, "batch frames height width 3"]:
        """The video of some latents, in [-1, 1]; one video of the batch at a time.

        On a mesh all devices share in each video, and each holds its part of the pictures.
        """
        vae = self.part("vae")
        params = split_params(vae)[1]
        videos = [_decode(vae.config, self.placement, params, one[None]) for one in latents]
        return videos[0] if len(videos) == 1 else jnp.concatenate(videos)

    def _text(self, request: Request) -> tuple[Array, Array | None]:
        texts = [*request.prompt, *([request.negative_prompt] if request.guided else [])]
        check_texts(self.tokenizer, texts)  # before the encoder is loaded
        states = text_states(self.part("text_encoder"), self.tokenizer, texts)
        count = len(request.prompt)
        if not request.guided:
            return states, None
        return states[:count], self._repeat(states[count:], count)

    @staticmethod
    def _repeat(array: Array, batch: int) -> Array:
        return jnp.broadcast_to(array, (batch, *array.shape[1:]))


def _with_first(x: Array, first: Array | None) -> Array:
    return x if first is None else x.at[:, :1].set(first)


def _denoise(
    graph, methods, sampler, batched, placement, weights, state, conditions, index, guidance, memory
):  # fmt: skip
    """One denoising step, compiled once for each tuple of methods, each sampler and each shape."""
    model = nnx.merge(graph, weights)
    frames = state.x.shape[1] // model.config.patch[0]
    time = jnp.full(state.x.shape[:1], jnp.asarray(sampler.times)[index])
    if conditions.first is not None:
        # the given frame is no noise: its tokens are at time 0
        time = jnp.broadcast_to(time[:, None], (len(time), frames)).at[:, 0].set(0)
    x = _with_first(state.x, conditions.first)
    if conditions.beside is not None:
        x = jnp.concatenate([x, conditions.beside], axis=-1)

    def velocity(x, time, image, text, memory):
        return model(
            x, time, text, image, attention=methods, sharding=placement, memory=memory, step=index
        )

    v, memory = guided(
        velocity, (x, time, conditions.image), conditions.text, conditions.negative, guidance,
        batched=batched, memory=memory,
    )  # fmt: skip
    return sampler.step(state, v, index), memory


_step = jax.jit(_denoise, static_argnums=(0, 1, 2, 3, 4))
_step_in_place = jax.jit(_denoise, static_argnums=(0, 1, 2, 3, 4), donate_argnames=("memory",))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(config, sharding, params, latents):
    return rebuild_vae(config, params).decode(latents, sharding=sharding)
