"""A folder of videos with captions: found, and read at one size and frame rate."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import av
import av.error
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ..conditions import fit_image

VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TABLES = ("captions.json", "metadata.csv", "metadata.jsonl")

# Names that others give to the two columns of a table.
_FILE_COLUMNS = ("file_name", "file", "video", "path")
_CAPTION_COLUMNS = ("caption", "text", "prompt")
# Share of the wanted frame rate below which frames would have to be shown twice too often.
_LEAST_RATE = 0.9
_LISTED = 10  # problems in one message


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video, or a folder of its frames, and what it shows.

    Attributes:
      path: the file or the folder.
      name: its path inside the folder of data.
      caption: of the whole video.
    """

    path: pathlib.Path
    name: str
    caption: str


def find_clips(folder: str | pathlib.Path) -> tuple[Clip, ...]:
    """The videos of a folder and of the folders in it, by name.

    A video is a file of `VIDEOS`, or a folder of numbered images (`frame_0001.png`). Its caption is
    in a text file beside it (`clip.txt` of `clip.mp4` or of the folder `clip`), or in a table at
    the top: `captions.json` (`{"clip.mp4": "a red fox"}`, or a list of rows), `metadata.csv` or
    `metadata.jsonl` with columns such as `file_name` and `caption`. The text file comes first.

    Raises:
      ValueError: there are no videos, captions are missing or empty, a table is damaged or names
        videos that are not there; all of them are named.

    Example:
      clips = find_clips("videos")
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of videos with captions, got none")
    paths = {path.relative_to(folder).as_posix(): path for path in _videos(folder)}
    if not paths:
        raise ValueError(
            f"{folder}: expected videos ({', '.join(VIDEOS)}) or folders of numbered images, "
            "found none"
        )
    table = _tables(folder, paths)
    clips, missing = [], []
    for name, path in sorted(paths.items()):
        beside = _beside(path)
        try:
            caption = beside.read_text("utf-8") if beside.is_file() else table.get(name, "")
        except UnicodeDecodeError as error:
            raise ValueError(f"{beside}: expected text in UTF-8, got {error}") from error
        if caption.strip():
            clips.append(Clip(path, name, caption.strip()))
        else:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{folder}: expected a caption for each of {len(paths)} videos, got none for "
            f"{_list(missing)}; put it beside the video ({_beside(paths[missing[0]]).name}) or "
            f"into {TABLES[0]}"
        )
    return tuple(clips)


def _videos(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            if _images(path):
                yield path
        elif path.suffix.lower() in VIDEOS:
            yield path


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Numbered images in the order of their numbers."""
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGES and re.search(r"\d", path.stem)
    ]
    return sorted(found, key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path))


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.parent / ((path.name if path.is_dir() else path.stem) + ".txt")


def _tables(folder: pathlib.Path, paths: Mapping[str, pathlib.Path]) -> dict[str, str]:
    """Captions of all tables by name; a name may lack its suffix."""
    short = {str(pathlib.PurePosixPath(name).with_suffix("")): name for name in paths}
    captions, unknown = {}, []
    for path in (folder / name for name in TABLES):
        if not path.is_file():
            continue
        for name, caption in _rows(path):
            name = name.replace("\\", "/").removeprefix("./").rstrip("/")
            known = name if name in paths else short.get(name)
            if known is None:
                unknown.append(f"{name} ({path.name})")
            else:
                captions.setdefault(known, caption)
    if unknown:
        raise ValueError(f"{folder}: expected captions of videos that are there, got one of "
                         f"{_list(unknown)}")  # fmt: skip
    return captions


def _rows(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".json":
            found: Any = json.loads(text)
            if isinstance(found, dict):
                found = [{"file_name": name, "caption": value} for name, value in found.items()]
        elif path.suffix == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = list(csv.DictReader(text.splitlines()))
        if not isinstance(found, list):
            raise ValueError(f"a {type(found).__name__}")
        for row in found:
            yield _cell(row, _FILE_COLUMNS), _cell(row, _CAPTION_COLUMNS)
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(
            f"{path}: expected a file name and a caption in each row, got {error}"
        ) from error


def _cell(row: Mapping[str, Any], names: Sequence[str]) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(value, str):
        raise ValueError(f"a row without text in any of {', '.join(names)}: {row!r:.80}")
    return value


def check_clips(clips: Sequence[Clip], frames: int, fps: float) -> None:
    """Raises `ValueError` that names all clips that are too short, too slow or damaged.

    Decodes one frame of each; the lengths come from the containers, whose packets are counted.
    """
    problems = []
    for clip in clips:
        try:
            _check(clip, frames, fps)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"expected {frames} frames of each of {len(clips)} videos, "
            f"got {len(problems)} without:\n  "
            + "\n  ".join(problems[:_LISTED])
            + (f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else "")
        )


def _check(clip: Clip, frames: int, fps: float) -> None:
    if clip.path.is_dir():
        images = _images(clip.path)
        if len(images) < frames:
            raise ValueError(f"{clip.name}: expected at least {frames} images, got {len(images)}")
        _open_image(images[0], clip)
        return
    times = packet_times(clip)
    next(_decoded(clip))
    if frames == 1:
        return
    span = times[-1] - times[0]
    interval = span / (len(times) - 1) if len(times) > 1 else 0.0
    # the last frame is shown for an interval, too; half of one is lost to rounding
    if span + interval / 2 < (frames - 1) / fps:
        raise ValueError(
            f"{clip.name}: expected at least {(frames - 1) / fps:.2f} seconds "
            f"({frames} frames at {fps:g} a second), got {span:.2f}"
        )
    if interval * fps * _LEAST_RATE > 1:
        raise ValueError(
            f"{clip.name}: expected about {fps:g} frames a second or more, got {1 / interval:.3g}; "
            "leave it out, or choose a lower rate for all (--fps)"
        )


def packet_times(clip: Clip) -> list[float]:
    """Time of each frame of a video in seconds, from its packets: nothing is decoded.

    Raises:
      ValueError: the file is no video, or is damaged.
    """
    try:
        with av.open(str(clip.path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            stamps = [p.pts if p.pts is not None else p.dts for p in packets]
            known = [stamp for stamp in stamps if stamp is not None]
            base = float(stream.time_base or 0)
    except (av.error.FFmpegError, IndexError) as error:
        raise _unreadable(clip, error) from error
    if not packets:
        raise _unreadable(clip, "no frames")
    if base and len(known) == len(stamps):
        return sorted(stamp * base for stamp in known)
    if not rate:
        raise _unreadable(clip, "frames without times")
    return [n / rate for n in range(len(packets))]


def _unreadable(clip: Clip, error: object) -> ValueError:
    return ValueError(f"{clip.name}: expected a readable video, got {error}")


def _decoded(clip: Clip) -> Iterator[tuple[float, Image.Image]]:
    """Frames of a video with their times in seconds, upright."""
    try:
        with av.open(str(clip.path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or 0)
            for n, frame in enumerate(container.decode(stream)):
                if frame.time is None and not rate:
                    raise _unreadable(clip, "frames without times")
                time = n / rate if frame.time is None else frame.time
                pixels = frame.to_ndarray(format="rgb24")
                turns = round(getattr(frame, "rotation", 0) / 90)
                yield time, Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
    except (av.error.FFmpegError, IndexError) as error:
        raise _unreadable(clip, error) from error


def _open_image(path: pathlib.Path, clip: Clip) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{clip.name}: expected a readable image {path.name}, got {error}"
        ) from error


def read_clip(
    clip: Clip, frames: int, size: tuple[int, int], fps: float
) -> UInt8[np.ndarray, "frames height width 3"]:
    """The first frames of a clip, scaled to cover the size and cut in the middle.

    Of a video, frame n is the one that is shown nearest to `n / fps` seconds after the first; of a
    folder of images, the n-th.

    Args:
      clip: the clip.
      frames: how many.
      size: width and height in pixels.
      fps: frames a second.

    Raises:
      ValueError: it is too short or damaged.
    """
    if clip.path.is_dir():
        images = _images(clip.path)[:frames]
        found = [fit_image(_open_image(path, clip), size) for path in images]
    else:
        found = []
        for image, times in _nearest(clip, frames, fps):
            found += [fit_image(image, size)] * times
    if len(found) < frames:
        raise ValueError(f"{clip.name}: expected {frames} frames, got {len(found)}")
    return np.stack(found)


def _nearest(clip: Clip, frames: int, fps: float) -> Iterator[tuple[Image.Image, int]]:
    """Frames that are nearest to the wanted times, and to how many of them each is."""
    wanted, before = 0, None
    for time, image in _decoded(clip):
        if before is None:
            start = time
        else:
            middle = (before[0] + time) / 2 - start
            # a wanted time right in the middle goes to the earlier frame, whatever rounding says
            end = min(frames, int(np.floor(middle * fps + 1e-6)) + 1)
            if end > wanted:
                yield before[1], end - wanted
                wanted = end
            if wanted == frames:
                return
        interval = time - before[0] if before else 0.0
        before = time, image
    if before is not None:
        end = min(frames, int(np.floor((before[0] + interval / 2 - start) * fps + 1e-6)) + 1)
        if end > wanted:
            yield before[1], end - wanted


def content_hash(clip: Clip) -> str:
    """SHA-256 of a video's bytes, or of the names and bytes of a folder's images."""
    total = hashlib.sha256()
    for path in _images(clip.path) if clip.path.is_dir() else [clip.path]:
        if clip.path.is_dir():
            total.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
