"""Real inputs of the study: q, k, v of the trained video DiT on held-out videos, and samples."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from vmonarch_jax.models import MOTIONS, PHOTOS, VideoDiT, capture_qkv, interpolate, sample
from vmonarch_jax.models.pipeline import MotionVideos

HELD_OUT = 9_001  # a seed that no training run of this project uses
PROMPTS = (("pan_left", "coffee"), ("zoom_in", "chelsea"), ("rotate_cw", "rocket"),
           ("sprite", "astronaut"))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Noised:
    """Held-out videos at every noise level: `x [level, video, ...]`, and the velocity to hit."""

    x: Any
    target: Any
    levels: tuple[float, ...]
    label: Any
    caption: Any


def noised_videos(model: VideoDiT, levels: tuple[float, ...], count: int) -> Noised:
    """`count` videos that the model was not trained on, each with one noise for all levels."""
    config = model.config
    source = MotionVideos(HELD_OUT, length=4096, frames=config.frames, size=config.height)
    # 11 is prime to the numbers of motions and of photographs: both vary from video to video.
    items = [source[11 * n] for n in range(count)]
    video = jnp.stack([item["video"] for item in items])
    noise = jax.random.normal(jax.random.key(1), video.shape)
    pairs = [interpolate(video, noise, jnp.full(count, t)) for t in levels]
    return Noised(
        x=jnp.stack([x for x, _ in pairs]),
        target=pairs[0][1],
        levels=levels,
        label=jnp.stack([item["label"] for item in items]),
        caption=jnp.stack([item["caption"] for item in items]) if config.caption_dim else None,
    )


def captured(model: VideoDiT, noised: Noised) -> tuple[Any, Any, Any]:
    """q, k and v, each `[level * layer * video, seq, heads, head_dim]` in that order."""
    capture = jax.jit(lambda x, t: capture_qkv(model, x, t, noised.label, noised.caption))
    count = noised.label.shape
    layers = [
        layer
        for x, t in zip(noised.x, noised.levels, strict=True)
        for layer in capture(x, jnp.full(count, t))
    ]
    q, k, v = (jnp.concatenate(arrays) for arrays in zip(*layers, strict=True))
    return q, k, v


def velocity_errors(model: VideoDiT, noised: Noised, method: Any) -> Any:
    """Mean squared error of the model's velocity under `method`, one for each noise level."""

    @jax.jit
    def error(x, t):
        velocity = model(x, t, noised.label, noised.caption, attention=method)
        return jnp.mean(jnp.square(velocity - noised.target))

    count = noised.label.shape
    return np.array([error(x, jnp.full(count, t)) for x, t in zip(noised.x, noised.levels)])  # noqa: B905


def samples(model: VideoDiT, method: Any, steps: int, guidance: float, prompts: int) -> Any:
    """Videos of the first prompts from a fixed noise, `[prompt, frames, height, width, 3]`."""
    key, (label, caption) = jax.random.key(2), conditions(model, prompts)
    return np.asarray(
        sample(model, key, label, caption, steps=steps, guidance=guidance, attention=method)
    )


def conditions(model: VideoDiT, prompts: int) -> tuple[Any, Any]:
    """Labels and captions of the first prompts; no captions for a model that takes none."""
    chosen = PROMPTS[:prompts]
    label = jnp.array([MOTIONS.index(motion) for motion, _ in chosen])
    if not model.config.caption_dim:
        return label, None
    return label, jnp.eye(len(PHOTOS))[jnp.array([PHOTOS.index(photo) for _, photo in chosen])]
