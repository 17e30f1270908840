"""What a video is conditioned on: states of the texts, and what an image adds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageOps

from ..params import Params, split_params
from .clip import FITS, preprocess_image
from .config import VAEConfig, WanConfig
from .sharding import Sharding
from .umt5 import embed_text
from .vae import WanVAE


class Conditions(NamedTuple):
    """All that the denoising steps see beside latents and time; float32, `None` where not used.

    Attributes:
      text: states of the prompts.
      negative: states of the negative prompt, one for each; `None`: no guidance.
      image: states of the image encoder (Wan2.1).
      beside: channels beside the latents' own: which frames are given, and the latents of a video
        that starts with the image, goes on in grey, and may end with a last image.
      first: the first latent frame, which is held fixed at time 0 (TI2V-5B).
    """

    text: Float[Array, "batch length text_dim"]
    negative: Float[Array, "batch length text_dim"] | None = None
    image: Float[Array, "batch n image_dim"] | None = None
    beside: Float[Array, "batch t h w extra"] | None = None
    first: Float[Array, "batch 1 h w channels"] | None = None


def text_states(
    encoder: Any, tokenizer: Any, texts: Sequence[str]
) -> Float[Array, "batch length text_dim"]:
    """The states of some texts, zero behind each one's end.

    Raises:
      ValueError: a text is too long; nothing is cut off.
    """
    check_texts(tokenizer, texts)
    tokens, mask = tokenizer.encode(texts)
    return _embed(*nnx.split(encoder), tokens, mask)


def check_texts(tokenizer: Any, texts: Sequence[str]) -> None:
    """Raises `ValueError` if a text is longer than the text encoder takes."""
    for text in texts:
        try:
            tokenizer.check(text)
        except ValueError as error:
            raise ValueError(f"{text[:40]!r}...: {error}") from error


def image_states(
    encoder: Any, *images: UInt8[np.ndarray, "height width 3"], fit: str = FITS[0]
) -> Float[Array, "1 n image_dim"]:
    """The states of an image, or of several, one after the other; `fit` as `preprocess_image`."""
    squares = np.stack([preprocess_image(pixels, encoder.config.size, fit) for pixels in images])
    states = _apply(*nnx.split(encoder), squares)
    return states.reshape(1, -1, states.shape[-1])


def size_like(config: WanConfig, image: Image.Image) -> tuple[int, int]:
    """Width and height of a video of an image's shape and of the model's usual area.

    The sides are rounded down to what the model can make, as in the original repository and in
    Diffusers' examples.
    """
    shape = ImageOps.exif_transpose(image).size
    area = config.size[0] * config.size[1]
    sides = [p * s for p, s in zip(config.transformer.patch, config.vae.strides, strict=True)]
    width, height = (
        max(1, int(math.sqrt(area * one / other) / side)) * side
        for one, other, side in zip(shape, shape[::-1], sides[:0:-1], strict=True)
    )
    return width, height


def fit_image(image: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    """The image at a size: scaled to cover it, and cut in the middle where its shape is another.

    A photograph is turned as its camera was held (EXIF), and what is transparent becomes white.
    """
    width, height = size
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    scale = max(width / image.width, height / image.height)
    wide, high = (max(low, round(n * scale)) for n, low in zip(image.size, size, strict=True))
    image = image.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - width) // 2, (high - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def first_frame(
    vae: Any, pixels: UInt8[np.ndarray, "height width 3"], sharding: Sharding | None = None
) -> Array:
    """The latent frame of an image: `[1, 1, h, w, channels]`; `sharding` as `beside_channels`."""
    return _encode(vae.config, 1, sharding, split_params(vae)[1], _normalised(pixels)[None])


def beside_channels(
    vae: Any,
    pixels: UInt8[np.ndarray, "height width 3"],
    frames: int,
    last: UInt8[np.ndarray, "height width 3"] | None = None,
    sharding: Sharding | None = None,
) -> Float[Array, "1 t h w extra"]:
    """Mask and latents of a video of which the first frame is given, and maybe the last one.

    The mask has a channel for each frame of pixels in a latent frame: ones in the first latent
    frame, zeros after, but for a last frame that is given. The other frames are grey, which is
    zero.

    Args:
      vae: the autoencoder.
      pixels: the first frame.
      frames: of the video.
      last: its last frame, or `None`: not given.
      sharding: the mesh that splits the autoencoder's pictures; `None`: one device.
    """
    ends = np.stack([_normalised(one) for one in (pixels, last) if one is not None])
    latents = _encode(vae.config, frames, sharding, split_params(vae)[1], ends)
    mask = jnp.zeros((*latents.shape[:-1], vae.config.strides[0])).at[:, 0].set(1)
    if last is not None:
        mask = mask.at[:, -1, ..., -1].set(1)
    return jnp.concatenate([mask, latents], axis=-1)


def rebuild_vae(config: VAEConfig, params: Params) -> WanVAE:
    """The autoencoder of some parameters; Flax's convolutions make no hashable graph to go by."""
    abstract = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    return split_params(abstract)[0](params)


def check_image(config: WanConfig, image: object, last: object = None) -> None:
    """Raises `ValueError` if the model needs images and has none, or has no use for them."""
    if image is None and config.needs_image:
        raise ValueError(f"{config.name} makes a video from an image: expected one, got none")
    if image is not None and not config.takes_image:
        raise ValueError(f"{config.name} makes videos from text alone: expected no image, got one")
    if last is None and config.needs_last_image:
        raise ValueError(
            f"{config.name} makes a video between two images: expected a last image, got none"
        )
    if last is not None and not config.takes_last_image:
        raise ValueError(f"{config.name} knows of no last image: expected none, got one")


def _normalised(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(
    config: VAEConfig, frames: int, sharding: Sharding | None, params: Params, ends: Array
) -> Array:
    """Of a video with a first frame, and a last one if there are two, in grey otherwise."""
    grey = jnp.zeros((frames - len(ends), *ends.shape[1:]))
    video = jnp.concatenate([ends[:1], grey, ends[1:]])
    return rebuild_vae(config, params).encode(video[None], sharding=sharding)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: Any, state: Any, tokens: Array, mask: Array) -> Array:
    return embed_text(nnx.merge(graph, state), tokens, mask).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: Any, state: Any, pixels: Array) -> Array:
    return nnx.merge(graph, state)(pixels).astype(jnp.float32)
