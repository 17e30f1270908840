"""Short videos made of a photograph and a camera motion.

A camera view is a square of the photograph: centre `(y, x)` and `side`, in short sides of the
photograph, and an `angle` in radians. A motion moves that square from frame to frame.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from .labels import MOTIONS, PHOTOS
from .photos import TEXTURES, Pyramid, load

_PAN = {"pan_left": (0, 1), "pan_right": (0, -1), "pan_up": (1, 0), "pan_down": (-1, 0)}
#: Height of the subject where it is not the middle: the astronaut's face is near the top.
_SUBJECT_Y = {"astronaut": 0.42}


@dataclasses.dataclass(frozen=True)
class View:
    """The square of the photograph that one frame shows."""

    y: float
    x: float
    side: float
    angle: float = 0.0


def render(photo: Pyramid, view: View, size: int) -> Float[np.ndarray, "size size 3"]:
    """Returns what the camera sees, `size x size` pixels in [-1, 1]."""
    offsets = ((np.arange(size) + 0.5) / size - 0.5) * view.side
    dy, dx = np.meshgrid(offsets, offsets, indexing="ij")
    cos, sin = np.cos(view.angle), np.sin(view.angle)
    return photo.sample(
        view.y + cos * dy + sin * dx, view.x + cos * dx - sin * dy, view.side / size
    )


def _views(motion: str, photo: Pyramid, frames: int, rng: np.random.Generator) -> list[View]:
    """Draws a path of the camera that shows `motion` and stays near the photograph's middle."""
    progress = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    side = rng.uniform(0.66, 0.78)
    # the middle of the photograph is where its subject is: a large, recognisable part stays in view
    y = photo.height * _SUBJECT_Y.get(photo.name, 0.5) + rng.uniform(-0.04, 0.04)
    x = photo.width / 2 + rng.uniform(-0.08, 0.08)
    if motion in _PAN:
        travel = rng.uniform(0.28, 0.38)
        dy, dx = (travel * sign for sign in _PAN[motion])
        return [View(y + dy * p, x + dx * p, side) for p in progress]
    if motion in ("zoom_in", "zoom_out"):
        ratio = rng.uniform(1.6, 1.9) ** (-1 if motion == "zoom_in" else 1)
        return [View(y, x, side * ratio**p) for p in progress]
    if motion in ("rotate_cw", "rotate_ccw"):
        turn = np.deg2rad(rng.uniform(45, 75)) * (1 if motion == "rotate_cw" else -1)
        return [View(y, x, side, turn * p) for p in progress]
    return [View(y, x, side)] * frames


def _add_sprite(video: Float[np.ndarray, "frames size size 3"], rng: np.random.Generator) -> None:
    """Draws, in place, a textured disc or square that crosses the picture in a straight line."""
    frames, size = video.shape[:2]
    texture = load(TEXTURES[rng.integers(len(TEXTURES))])
    radius = rng.uniform(0.16, 0.22) * size
    centre = View(texture.height / 2, texture.width / 2, rng.uniform(0.3, 0.6))
    patch = render(texture, centre, 2 * int(np.ceil(radius)) + 3)
    tint = rng.uniform(-0.6, 0.6, 3).astype(np.float32)
    disc = rng.random() < 0.5
    heading = rng.uniform(0, 2 * np.pi)
    middle = (size - 1) / 2 + rng.uniform(-0.1, 0.1, 2) * size
    travel = 0.6 * size * np.array([np.sin(heading), np.cos(heading)])
    rows, cols = np.mgrid[:size, :size]
    for n, p in enumerate(np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)):
        dy, dx = (axis - at for axis, at in zip((rows, cols), middle + p * travel, strict=True))
        distance = np.hypot(dy, dx) if disc else np.maximum(abs(dy), abs(dx))
        # coverage falls from 1 to 0 over one pixel, so the edge moves smoothly between pixels
        alpha = np.clip(radius + 0.5 - distance, 0, 1)[..., None].astype(np.float32)
        half = (patch.shape[0] - 1) / 2
        where = [np.clip(np.rint(d + half), 0, 2 * half).astype(int) for d in (dy, dx)]
        colour = np.clip(patch[tuple(where)] + tint, -1, 1)
        video[n] = alpha * colour + (1 - alpha) * video[n]


def make_video(
    motion: int, subject: int, rng: np.random.Generator, *, frames: int = 16, size: int = 32
) -> tuple[Float[np.ndarray, "frames size size 3"], Float[np.ndarray, " photos"]]:
    """Returns one video in [-1, 1] and its caption vector.

    Args:
      motion: index into `MOTIONS`.
      subject: index into `PHOTOS`.
      rng: draws the speed, the place, the sprite and, for a cut, the second photograph.
      frames: frames of the video.
      size: height and width in pixels.

    Returns:
      The video, and the caption: 1 at the subject; a cut also has 0.5 at the photograph that it
      cuts to, so the order of the two can be told.

    Raises:
      ValueError: `motion` or `subject` is out of range.
    """
    if not 0 <= motion < len(MOTIONS):
        raise ValueError(f"expected a motion in [0, {len(MOTIONS)}), got {motion}")
    if not 0 <= subject < len(PHOTOS):
        raise ValueError(f"expected a subject in [0, {len(PHOTOS)}), got {subject}")
    name, photo = MOTIONS[motion], load(PHOTOS[subject])
    caption = np.zeros(len(PHOTOS), np.float32)
    caption[subject] = 1.0
    views = _views(name, photo, frames, rng)
    still = name in ("cut", "sprite")
    if still:
        video = np.repeat(render(photo, views[0], size)[None], frames, 0)
    else:
        video = np.stack([render(photo, view, size) for view in views])
    if name == "cut":
        second = (subject + 1 + rng.integers(len(PHOTOS) - 1)) % len(PHOTOS)
        after = load(PHOTOS[second])
        first = int(rng.integers(frames // 4, frames - frames // 4)) if frames > 3 else frames // 2
        video[first:] = render(after, _views(name, after, frames, rng)[0], size)
        caption[second] = 0.5
    if name == "sprite":
        _add_sprite(video, rng)
    return np.clip(video, -1, 1).astype(np.float32), caption
