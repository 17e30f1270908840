"""How every picture of the demo looks."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from PIL import Image

from .files import replacing

#: Widths in inches of one column and of a whole page of a two-column paper.
COLUMN, PAGE = 3.4, 7.0
_DPI = 220

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # embedded TrueType, which publishers ask for
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def figure(
    path: pathlib.Path,
    width: float,
    height: float,
    *,
    layout: Literal["constrained"] | None = "constrained",
    maps: Sequence[str] = (),
) -> Iterator[Figure]:
    """Gives an empty figure to draw on and writes it to `path` (PNG), and beside it as PDF.

    The figure belongs to no window and to no `pyplot` state: it needs no display and leaves no
    trace.

    Args:
      path: the PNG.
      width: inches.
      height: inches.
      layout: matplotlib's layout engine; `None` where the caller places everything.
      maps: where only these colour maps and greys are drawn, their names: a palette of them makes
        the PNG a third as large.
    """
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout=layout)
        yield drawn
        with replacing(path) as partial:
            drawn.savefig(partial, dpi=_DPI)
            with Image.open(partial) as image:
                small = image.convert("RGB")
            if maps:
                small = small.quantize(palette=_palette(maps), dither=Image.Dither.NONE)
            small.save(partial, optimize=True, dpi=(_DPI, _DPI))
        with replacing(path.with_suffix(".pdf")) as partial:
            drawn.savefig(partial, dpi=_DPI, metadata={"CreationDate": None})


def _palette(maps: Sequence[str]) -> Image.Image:
    """Returns 32 greys and as many colours of each map as then have room."""
    greys = np.repeat(np.linspace(0, 255, 32).round().astype(int), 3)
    room = (256 - 32) // len(maps)
    shades = [matplotlib.colormaps[name](np.linspace(0, 1, room))[:, :3] for name in maps]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*greys, *(np.concatenate(shades).ravel() * 255).round().astype(int)])
    return palette


def plain_log(axis: Axis) -> None:
    """Labels a log axis at 1, 2 and 5 of each decade, as plain numbers."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
