"""Flow matching: the straight path from a video to noise, and what the model learns on it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

#: `velocity(x, t, label, caption)`, as `VideoDiT` computes it.
Velocity = Callable[..., Any]


def shift_time(t: Float[Array, " *shape"], shift: float) -> Float[Array, " *shape"]:
    """Moves times towards the noise: `shift t / (1 + (shift - 1) t)`.

    A video repeats itself from frame to frame, so it survives more noise than one picture would;
    `shift > 1` spends more of training and of sampling where it is really being destroyed.
    """
    return shift * t / (1 + (shift - 1) * t)


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """How training draws times and hides conditions.

    Attributes:
      shift: `shift_time` of the drawn times.
      logit_mean: mean of the normal whose sigmoid a time is.
      logit_std: its standard deviation.
      label_dropout: share of samples that see the null class.
      caption_dropout: share of samples that see no caption.

    Raises:
      ValueError: a shift or deviation is not positive, or a share is outside [0, 1].
    """

    shift: float = 2.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    label_dropout: float = 0.1
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.shift <= 0 or self.logit_std <= 0:
            raise ValueError(
                f"expected shift > 0 and logit_std > 0, got {self.shift} and {self.logit_std}"
            )
        for name in ("label_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in [0, 1], got {getattr(self, name)}")


def interpolate(
    video: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *shape"],
    t: Float[Array, " batch"],
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
    """Returns `x_t = (1 - t) video + t noise` and its velocity, `noise - video`."""
    weight = t.reshape(-1, *[1] * (video.ndim - 1))
    return (1 - weight) * video + weight * noise, noise - video


def sample_times(
    key: Key[Array, ""], batch: int, config: FlowConfig, span: tuple[float, float] = (0.0, 1.0)
) -> Float[Array, " batch"]:
    """Draws shifted logit-normal times, one from each of `batch` slices of equal probability.

    Each time alone has exactly that distribution; together they always cover all of it, which
    takes much of the noise out of the gradient of a small batch.

    Args:
      key: of the draw.
      batch: how many.
      config: the distribution.
      span: least and greatest time; the distribution is that of the times between them.
    """
    u = (jnp.arange(batch) + jax.random.uniform(key, (batch,), minval=1e-6)) / batch
    if span != (0.0, 1.0):
        low, high = (_share_below(time, config) for time in span)
        u = low + (high - low) * u
    normal = jax.scipy.special.ndtri(jnp.minimum(u, 1 - 1e-6))
    t = jax.nn.sigmoid(config.logit_mean + config.logit_std * normal)
    return shift_time(t, config.shift)


def _share_below(time: float, config: FlowConfig) -> float:
    """The share of the drawn times that are below one."""
    if not 0 < time < 1:
        return float(time >= 1)
    even = time / (config.shift - (config.shift - 1) * time)  # the inverse of shift_time
    logit = math.log(even / (1 - even))
    return statistics.NormalDist(config.logit_mean, config.logit_std).cdf(logit)


def flow_loss(
    velocity: Velocity,
    video: Float[Array, "batch frames height width channels"],
    label: Int[Array, " batch"],
    caption: Float[Array, "batch caption_dim"] | None,
    key: Key[Array, ""],
    *,
    null_label: int,
    config: FlowConfig,
) -> Float[Array, ""]:
    """Returns the mean squared error of the velocity at random times, in float32.

    Args:
      velocity: the model, called as `velocity(x, t, label, caption)`.
      video: clean videos in [-1, 1].
      label: their classes.
      caption: their captions, or `None`.
      key: draws times, noise and which samples lose their condition.
      null_label: the label of the null class.
      config: how they are drawn.
    """
    key_time, key_noise, key_label, key_caption = jax.random.split(key, 4)
    batch = video.shape[:1]
    t = sample_times(key_time, batch[0], config)
    x, target = interpolate(video, jax.random.normal(key_noise, video.shape), t)
    hidden = jax.random.uniform(key_label, batch) < config.label_dropout
    label = jnp.where(hidden, null_label, label)
    if caption is not None:
        hidden = jax.random.uniform(key_caption, batch) < config.caption_dropout
        caption = jnp.where(hidden[:, None], 0.0, caption)
    return jnp.mean(jnp.square(velocity(x, t, label, caption) - target))


def guide(velocity: Velocity, guidance: float | Float[Array, ""], null_label: int) -> Velocity:
    """Returns the velocity under classifier-free guidance.

    Formula: `v = v_null + guidance (v_cond - v_null)`, both from one call on a doubled batch, where
    null means the null class and no caption. `guidance = 1` is the conditional model itself and
    costs a single batch.

    Keywords are passed on. With `attention_state` among them, that of the doubled batch, `velocity`
    returns a velocity and a state, and so does what is returned here.
    """

    def guided(x, t, label, caption, **memory):
        if isinstance(guidance, (int, float)) and guidance == 1:
            return velocity(x, t, label, caption, **memory)
        labels = jnp.concatenate([label, jnp.full_like(label, null_label)])
        if caption is not None:
            caption = jnp.concatenate([caption, jnp.zeros_like(caption)])
        doubled = jnp.concatenate([x, x]), jnp.concatenate([t, t]), labels, caption
        found = velocity(*doubled, **memory)
        both, state = found if "attention_state" in memory else (found, None)
        conditional, null = jnp.split(both, 2)
        v = null + guidance * (conditional - null)
        return (v, state) if "attention_state" in memory else v

    return guided
