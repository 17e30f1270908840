"""What is sampled: prompts from noise, or the user's own videos from a noised start."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..cli_options import caption_of, label_of
from ..config import VideoDiTConfig
from ..flow import interpolate
from .inputs import read_videos

#: Motion and photograph of each row, the clearest first.
PROMPTS = (
    ("pan_left", "coffee"),
    ("zoom_in", "chelsea"),
    ("rotate_cw", "rocket"),
    ("sprite", "retina"),
)


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What every method gets: the same start, labels and captions.

    Attributes:
      names: two lines about each row.
      x: noised videos, the start.
      t: their time; 1 is pure noise.
      noise: the noise in them.
      label: classes.
      caption: caption vectors, or `None`.
      guidance: weight of classifier-free guidance.
      videos: the user's own videos in [-1, 1], or `None`.
    """

    names: tuple[tuple[str, str], ...]
    x: Float[Array, "batch frames height width 3"]
    t: float
    noise: Float[Array, "batch frames height width 3"]
    label: Int[Array, " batch"]
    caption: Float[Array, "batch photos"] | None
    guidance: float
    videos: Float[np.ndarray, "batch frames height width 3"] | None = None


def from_prompts(config: VideoDiTConfig, rows: int, seed: int, guidance: float) -> Conditions:
    """Returns the first `rows` of `PROMPTS`, from pure noise.

    Raises:
      ValueError: the model knows other captions or motions than the project's.
    """
    prompts = PROMPTS[:rows]
    label = jnp.array([label_of(motion) for motion, _ in prompts])
    caption = np.stack([caption_of(photo) for _, photo in prompts])
    if config.caption_dim not in (0, caption.shape[1]) or config.classes <= int(label.max()):
        raise ValueError(
            f"expected a model of at least {int(label.max()) + 1} classes and captions of "
            f"{caption.shape[1]}, got {config.classes} and {config.caption_dim}"
        )
    noise = jax.random.normal(jax.random.key(seed), (rows, *config.video_shape))
    names = tuple((motion.replace("_", " "), photo) for motion, photo in prompts)
    caption = jnp.asarray(caption) if config.caption_dim else None
    return Conditions(names, noise, 1.0, noise, label, caption, guidance)


def from_input(
    config: VideoDiTConfig, path: pathlib.Path, rows: int, seed: int, strength: float
) -> Conditions:
    """Returns the videos at `path`, noised to time `strength`, without class and caption.

    Raises:
      ValueError: `strength` is outside (0, 1], or as `read_videos`.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"expected --strength in (0, 1], got {strength}")
    frames, height, width, _ = config.video_shape
    names, videos = read_videos(path, frames, height, width, most=rows)
    noise = jax.random.normal(jax.random.key(seed), videos.shape)
    x, _ = interpolate(jnp.asarray(videos), noise, jnp.full(len(videos), strength))
    # the null class: guidance would only amplify the difference between two equal predictions
    label = jnp.full(len(videos), config.classes)
    return Conditions(names, x, strength, noise, label, None, 1.0, videos)
