"""The user's own videos and photographs, as small clips."""

from __future__ import annotations

import itertools
import pathlib

import av
import av.error
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

#: Frames that are read of a video at most, about ten seconds; the clip is spread over them.
MOST_FRAMES = 300
_TRAVEL = 0.3  # of a pan, in sides of its square: about what the models were trained on


def read_videos(
    path: pathlib.Path, frames: int, height: int, width: int, *, most: int = 4
) -> tuple[tuple[tuple[str, str], ...], Float[np.ndarray, "batch frames height width 3"]]:
    """Reads a video, a photograph, or a folder of them.

    A video gives evenly spaced frames of its first `MOST_FRAMES`, cropped about the centre. A
    photograph becomes a pan over it, along its longer side. Both are resized with antialiasing.

    Args:
      path: a file, or a folder whose first `most` readable files are taken in order of name.
      frames: frames of each clip.
      height: rows of pixels.
      width: columns of pixels.
      most: clips at most.

    Returns:
      Two lines about each clip, and the clips, in [-1, 1].

    Raises:
      ValueError: there is no such path, no readable file, or a video has too few frames.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: expected a video, an image or a folder of them, got no file")
    if not path.is_dir():
        clips = [(path, _read(path, frames, (width, height)))]
    else:
        clips, reason = [], "no files"
        for file in sorted(f for f in path.iterdir() if f.is_file() and f.name[0] != "."):
            try:
                clips.append((file, _read(file, frames, (width, height))))
            except ValueError as error:
                reason = str(error)
            if len(clips) == most:
                break
        if not clips:
            raise ValueError(f"{path}: expected videos or images in the folder, got {reason}")
    names = tuple((_short(file.stem), kind) for file, (kind, _) in clips)
    videos = np.stack([clip for _, (_, clip) in clips]).astype(np.float32) / 127.5 - 1
    return names, videos


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _read(file: pathlib.Path, frames: int, size: tuple[int, int]) -> tuple[str, np.ndarray]:
    """Returns "video" or "photograph" and a clip of 0..255, or raises `ValueError`."""
    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) == 1:
                return "photograph", _pan(ImageOps.exif_transpose(image), frames, size)
            found = (f.convert("RGB") for f in ImageSequence.Iterator(image))
            return "video", _spread(file, found, frames, size)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        pass  # no picture; perhaps a video
    except (OSError, SyntaxError) as error:  # what Pillow raises where a picture is damaged
        raise ValueError(f"{file}: expected a readable image, got {error}") from error
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise ValueError(f"{file}: expected a video stream, got none")
            found = (frame.to_image() for frame in container.decode(video=0))
            return "video", _spread(file, found, frames, size)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{file}: expected a readable video or image, got {error}") from error


def _spread(file, found, frames: int, size: tuple[int, int]) -> np.ndarray:
    # only the small pictures are kept, so a long video in 4K needs little memory
    clip = [_cut(image, size, 0.5) for image in itertools.islice(found, MOST_FRAMES)]
    if len(clip) < frames:
        raise ValueError(f"{file}: expected at least {frames} frames, got {len(clip)}")
    wanted = np.linspace(0, len(clip) - 1, frames).round().astype(int)
    return np.stack([clip[n] for n in wanted])


def _pan(image: Image.Image, frames: int, size: tuple[int, int]) -> np.ndarray:
    image = image.convert("RGB")
    return np.stack([_cut(image, size, p, 1 - _TRAVEL / 2) for p in np.linspace(0, 1, frames)])


def _cut(image: Image.Image, size: tuple[int, int], place: float, part: float = 1) -> np.ndarray:
    """Returns a rectangle of the shape of `size` out of the picture, resized to it.

    It is `part` of the largest one that fits; `place` in [0, 1] is where it lies along the axis
    that has more room. On that axis it moves by `_TRAVEL` of its side at most.
    """
    unit = part * min(image.width / size[0], image.height / size[1])
    box = np.array([size[0] * unit, size[1] * unit])
    room = np.array([image.width, image.height]) - box
    corner = room / 2
    axis = int(np.argmax(room))
    corner[axis] += (place - 0.5) * min(room[axis], _TRAVEL * box[axis])
    # rounding must not push the box over the edge by a part of a pixel
    corner = np.clip(corner, 0, room)
    edges = (*corner, *np.minimum(corner + box, [image.width, image.height]))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=edges))
