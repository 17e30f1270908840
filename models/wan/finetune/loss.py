"""What tuning minimises: the error of the velocity at random times."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ...flow import FlowConfig, interpolate, sample_times
from ..config import WanConfig


def times_of(config: WanConfig, part: str) -> tuple[float, float]:
    """Least and greatest time, from 0 to 1, that a part of the model sees when it samples."""
    if config.boundary is None:
        return 0.0, 1.0
    return (config.boundary, 1.0) if part == "transformer" else (0.0, config.boundary)


class Noised(NamedTuple):
    """What the model is shown, and what it should say.

    Attributes:
      x: noised latents, with mask and image behind their channels where the model has them.
      time: 0 to 1000, of each sample or of each of its frames.
      text: text states.
      target: the velocity.
      judged: 0 for frames that are given, 1 for all others.
    """

    x: Float[Array, "batch t h w inputs"]
    time: Float[Array, " batch"] | Float[Array, "batch t"]
    text: Float[Array, "batch length text_dim"]
    target: Float[Array, "batch t h w channels"]
    judged: Float[Array, "batch t"]


def noised(
    batch: dict[str, Array],
    empty: Float[Array, "length text_dim"],
    key: Key[Array, ""],
    *,
    flow: FlowConfig,
    span: tuple[float, float] = (0.0, 1.0),
    first_frame_share: float = 0.0,
) -> Noised:
    """Videos at random times.

    Formula: `(1 - t) x + t noise`, whose velocity is `noise - x`, t shifted logit-normal.

    Args:
      batch: as `CachedClips` gives it, with the batch in front.
      empty: text states of a sample that loses its caption.
      key: draws times, noise, and which samples lose their caption or are given a frame.
      flow: how they are drawn; `caption_dropout` is the share without a caption.
      span: least and greatest time.
      first_frame_share: share of the samples whose first latent frame is given, at time 0, as when
        a video is made from an image (TI2V-5B); what the model says there is not judged.
    """
    key_time, key_noise, key_text, key_first = jax.random.split(key, 4)
    latents = batch["latents"]
    count, frames = latents.shape[:2]
    t = sample_times(key_time, count, flow, span)
    x, target = interpolate(latents, jax.random.normal(key_noise, latents.shape), t)
    hidden = jax.random.uniform(key_text, (count,)) < flow.caption_dropout
    text = jnp.where(hidden[:, None, None], empty[None].astype(batch["text"].dtype), batch["text"])
    time, judged = 1000 * t, jnp.ones((count, frames))
    if first_frame_share:
        given = jax.random.uniform(key_first, (count,)) < first_frame_share
        fixed = given[:, None] & (jnp.arange(frames) == 0)
        x = jnp.where(fixed[..., None, None, None], latents, x)
        time, judged = jnp.where(fixed, 0.0, time[:, None]), 1.0 - fixed
    if "beside" in batch:
        x = jnp.concatenate([x, batch["beside"]], axis=-1)
    return Noised(x, time, text, target, judged)


def error_sum(velocity, shown: Noised, image: Array | None) -> Float[Array, ""]:
    """Sum over the judged frames of the mean squared error of the velocity, in float32.

    Formula: `|v((1 - t) x + t noise, 1000 t, text) - (noise - x)|^2`.

    Args:
      velocity: the model, called as `velocity(latents, time, text, image)`.
      shown: videos at their times; the mean over `shown.judged` is the loss of a batch.
      image: states of their first frames, where the model takes them.
    """
    error = velocity(shown.x, shown.time, shown.text, image) - shown.target
    return jnp.sum(jnp.square(error).mean((2, 3, 4)) * shown.judged)
