"""Videos side by side: labelled GIFs, and strips of frames for paper."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import font_manager
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..pictures import to_uint8
from .files import replacing

Videos = Float[np.ndarray, "batch frames height width 3"]
#: A column: two lines of title, their colour, and the videos, one a row.
Column = tuple[tuple[str, str], str, Videos]

_SIDE = 160  # screen pixels of a video's longer side, at least
_GUTTER = 6
_INK, _GREY = "#222222", "#777777"
_MILLISECONDS = 120  # a frame
_LAST = 500  # of the last frame, so that the eye sees where the loop begins


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib carries this font, so every machine draws the same picture
    wanted = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(wanted), size)


def _text(draw, x: float, y: float, lines: tuple[str, str], colour: str, anchor: str) -> None:
    """Writes a bold line and a smaller grey one about the height `y`."""
    draw.text((x, y - 2), lines[0], colour, _font(14, bold=True), anchor=anchor + "d")
    draw.text((x, y + 2), lines[1], _GREY, _font(12), anchor=anchor + "a")


def _canvas(names, columns: Sequence[Column], width: int, height: int) -> Image.Image:
    """Draws titles and row names, and leaves places of `width x height` for the videos."""
    left, top = _margin(names), 50
    size = left + len(columns) * (width + _GUTTER), top + len(names) * (height + _GUTTER)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for n, (title, colour, _) in enumerate(columns):
        x = left + n * (width + _GUTTER)
        _text(draw, x + width / 2, 22, title, colour, "m")
        draw.rectangle((x, top - 7, x + width - 1, top - 4), fill=colour)
    for n, lines in enumerate(names):
        _text(draw, left - 10, top + n * (height + _GUTTER) + height / 2, lines, _INK, "r")
    return canvas


def _margin(names) -> int:
    widest = max(max(_font(14, True).getlength(a), _font(12).getlength(b)) for a, b in names)
    return 20 + round(widest)


def _scale(videos: Videos) -> int:
    return max(1, -(-_SIDE // max(videos.shape[2:4])))


def save_comparison(
    path: pathlib.Path, names: Sequence[tuple[str, str]], columns: Sequence[Column]
) -> None:
    """Writes a looping GIF with one column a method and one row a video.

    Args:
      path: the file.
      names: two lines about each row.
      columns: title, colour and videos of each column.
    """
    scale = _scale(columns[0][2])
    frames, height, width = (n for n in columns[0][2].shape[1:4])
    height, width = height * scale, width * scale
    canvas = _canvas(names, columns, width, height)
    left, top = _margin(names), 50
    drawn = []
    for t in range(frames):
        frame = canvas.copy()
        for n, (_, _, videos) in enumerate(columns):
            for row, video in enumerate(videos):
                small = Image.fromarray(to_uint8(video[t]))
                big = small.resize((width, height), Image.Resampling.NEAREST)
                frame.paste(big, (left + n * (width + _GUTTER), top + row * (height + _GUTTER)))
        drawn.append(frame)
    # no dithering: its noise would triple the file and crawl over the still parts
    palette = _palette(columns)
    first, *rest = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in drawn)
    durations = [_MILLISECONDS] * (frames - 1) + [_LAST]
    with replacing(path) as partial:
        first.save(
            partial, save_all=True, append_images=rest, duration=durations, loop=0, optimize=False
        )


def _palette(columns: Sequence[Column]) -> Image.Image:
    """Returns 256 colours for all frames, white and the colours of the titles among them.

    One palette serves all frames: with one each, still colours would flicker.
    """
    shades = [(n, n, n) for n in (255, 34, 119, 76, 160, 208)]
    shades += [ImageColor.getrgb(colour)[:3] for _, colour, _ in columns]
    pixels = np.concatenate([to_uint8(videos).ravel() for _, _, videos in columns])
    sample = Image.fromarray(pixels.reshape(1, -1, 3))
    # without k-means the rare colours of a small sprite would go to the nearest title's
    cut = sample.quantize(256 - len(shades), Image.Quantize.MEDIANCUT, kmeans=3)
    found = cut.getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([n for shade in shades for n in shade] + found)
    return palette


def save_strip(
    path: pathlib.Path,
    rows: Sequence[tuple[tuple[str, str], str, Float[np.ndarray, "frames height width 3"]]],
    *,
    most: int = 8,
) -> None:
    """Writes a PNG of rows of frames, from left to right in time.

    Args:
      path: the file.
      rows: two lines about each row, their colour, and the video.
      most: frames of each, evenly spaced.
    """
    frames, height, width = rows[0][2].shape[:3]
    scale = max(1, -(-112 // max(height, width)))
    shown = np.unique(np.linspace(0, frames - 1, min(most, frames)).round().astype(int))
    left = _margin([lines for lines, _, _ in rows])
    wide, high = width * scale, height * scale
    canvas = Image.new("RGB", (left + len(shown) * (wide + 3) - 3, len(rows) * (high + 6) - 6))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, *canvas.size), fill="white")
    for row, (lines, colour, video) in enumerate(rows):
        y = row * (high + 6)
        _text(draw, left - 10, y + high / 2, lines, colour, "r")
        for n, t in enumerate(shown):
            small = Image.fromarray(to_uint8(video[t]))
            big = small.resize((wide, high), Image.Resampling.NEAREST)
            canvas.paste(big, (left + n * (wide + 3), y))
    with replacing(path) as partial:
        canvas.save(partial, optimize=True)
