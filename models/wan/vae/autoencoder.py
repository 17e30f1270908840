"""The whole autoencoder: video in [-1, 1] to normalised latents and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..config import VAEConfig
from ..sharding import Sharding
from .decoder import Decoder
from .encoder import Encoder
from .layers import Types
from .picture import Picture, on_mesh
from .stream import Cache, stream

# Bounds of the log variance, so that its exponential is finite.
_LOG_VARIANCE = (-30.0, 20.0)


class WanVAE(nnx.Module):
    """The causal 3-D autoencoder of Wan2.1, or of Wan2.2-5B, as the configuration says.

    A latent frame sees its own 4 frames of pixels and those before, never later ones; the first
    frame of a video is a latent frame by itself. So both directions run a few frames at a time and
    carry what the convolutions remember, two frames a layer: the memory needed beside input and
    output is the same for any number of frames.

    Arithmetic is in `config.dtype`, norms in float32. "float32" matmuls on a TPU are those that
    `jax.default_matmul_precision` asks for.

    Args:
      config: the sizes.
      rngs: keys of the initial weights.
      param_dtype: of the parameters.

    Raises:
      ValueError: the widths do not fit the shortcuts of Wan2.2.

    Example:
      vae = WanVAE(VAEConfig(), rngs=nnx.Rngs(0))
      latents = vae.encode(video)          # [1, 81, 480, 832, 3] -> [1, 21, 60, 104, 16]
      video = vae.decode(latents)

    Source: Wan (arXiv:2503.20314), section 4.1; equal to Diffusers' `AutoencoderKLWan`.
    """

    def __init__(
        self, config: VAEConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ) -> None:
        types = Types(config.compute_dtype, jnp.dtype(param_dtype))
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, types=types, rngs=rngs)
        self.quant = nnx.Linear(2 * channels, 2 * channels, **types.kwargs(), rngs=rngs)
        self.post_quant = nnx.Linear(channels, channels, **types.kwargs(), rngs=rngs)
        self.decoder = Decoder(config, types=types, rngs=rngs)

    def encode(
        self,
        video: Float[Array, "batch frames height width 3"],
        *,
        sample: Array | None = None,
        chunk: int = 1,
        sharding: Sharding | None = None,
    ) -> Float[Array, "batch t h w channels"]:
        """The latents of a video, with zero mean and unit deviation over the training videos.

        `(mu - mean) / std`, or `(mu + exp(log_variance / 2) * noise - mean) / std` with a key.

        Args:
          video: in [-1, 1]; `4 n + 1` frames, or 1; sides that the configuration's strides divide.
          sample: a random key to draw from the posterior, or `None`: its mean.
          chunk: latent frames at a time.
          sharding: splits rows and columns over a mesh; `None`: one device.

        Returns:
          Latents in float32, of `config.latent_size(frames, height, width)`; whole on each device.

        Raises:
          ValueError: the video has a shape that has no latents, or `chunk` is below 1.
        """
        config = self.config
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(
                f"expected a video [batch, frames, height, width, 3], got {video.shape}"
            )
        _, *sides = config.latent_size(*video.shape[1:4])
        _check_chunk(chunk)

        def run(vae: WanVAE, video: Array, picture: Picture) -> Array:
            def part(frames: Array, cache: Cache) -> Array:
                return vae.quant(vae.encoder(frames, cache)).astype(jnp.float32)

            stride = config.strides[0]
            return stream(part, video, chunk=chunk, stride_in=stride, picture=picture)

        moments = on_mesh(sharding, self, run, video, sides, config.strides[1], 1)
        if sharding is not None:
            moments = jax.lax.with_sharding_constraint(moments, sharding.placed())
        latents, log_variance = jnp.split(moments, 2, axis=-1)
        if sample is not None:
            deviation = jnp.exp(0.5 * jnp.clip(log_variance, *_LOG_VARIANCE))
            latents = latents + deviation * jax.random.normal(sample, latents.shape)
        return (latents - jnp.array(config.mean)) / jnp.array(config.std)

    def decode(
        self,
        latents: Float[Array, "batch t h w channels"],
        *,
        chunk: int = 1,
        sharding: Sharding | None = None,
    ) -> Float[Array, "batch frames height width 3"]:
        """The video of normalised latents, `4 t - 3` frames in float32, clipped to [-1, 1].

        Args:
          latents: as `encode` returns them.
          chunk: latent frames at a time; more are not faster on a device that one fills.
          sharding: splits rows and columns over a mesh; `None`: one device.

        Raises:
          ValueError: the latents have another shape than `encode` makes, or `chunk` is below 1.
        """
        config = self.config
        if latents.ndim != 5 or latents.shape[-1] != config.latent_channels:
            raise ValueError(
                f"expected latents [batch, t, h, w, {config.latent_channels}], got {latents.shape}"
            )
        if min(latents.shape[1:4]) < 1:
            raise ValueError(f"expected t, h and w of at least 1, got {latents.shape[1:4]}")
        _check_chunk(chunk)

        def run(vae: WanVAE, latents: Array, picture: Picture) -> Array:
            def part(frames: Array, cache: Cache) -> Array:
                z = frames.astype(jnp.float32) * jnp.array(config.std) + jnp.array(config.mean)
                return jnp.clip(vae.decoder(vae.post_quant(z), cache).astype(jnp.float32), -1, 1)

            stride = config.strides[0]
            return stream(part, latents, chunk=chunk, stride_out=stride, picture=picture)

        return on_mesh(sharding, self, run, latents, latents.shape[2:4], 1, config.strides[1])


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"expected a chunk of at least 1 latent frame, got {chunk}")
