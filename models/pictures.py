"""Videos as files: animated GIFs and strips of frames."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Videos = Float[np.ndarray, "batch frames height width 3"]


def to_uint8(video: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Maps [-1, 1] to 0..255, rounding to the nearest."""
    return np.clip(np.rint((np.asarray(video, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def _enlarge(image: UInt8[np.ndarray, "height width 3"], scale: int) -> Image.Image:
    picture = Image.fromarray(image)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_gif(path: pathlib.Path, videos: Videos, *, scale: int = 6, fps: int = 8) -> None:
    """Writes videos side by side as one looping GIF.

    Args:
      path: the file; its folder is made if needed.
      videos: in [-1, 1].
      scale: screen pixels a side of each video pixel.
      fps: frames a second.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = np.concatenate(list(to_uint8(videos)), axis=2)
    first, *rest = (_enlarge(frame, scale) for frame in wide)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def save_strip(
    path: pathlib.Path, videos: Videos, *, frames: Sequence[int] | None = None, scale: int = 3
) -> None:
    """Writes a PNG with one row a video and, from left to right, some of its frames.

    Args:
      path: the file; its folder is made if needed.
      videos: in [-1, 1].
      frames: which frames; eight evenly spaced ones if not given.
      scale: screen pixels a side of each video pixel.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    videos = to_uint8(videos)
    count = videos.shape[1]
    even = np.unique(np.linspace(0, count - 1, min(8, count)).round().astype(int))
    chosen = even if frames is None else frames
    rows = [np.concatenate([video[n] for n in chosen], axis=1) for video in videos]
    _enlarge(np.concatenate(rows, axis=0), scale).save(path)
