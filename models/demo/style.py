"""How every picture of the demo looks."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import matplotlib
from matplotlib import ticker
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from PIL import Image

from .files import replacing

#: Widths in inches of one column and of a whole page of a two-column paper.
COLUMN, PAGE = 3.4, 7.0
_DPI = 220

_STYLE = {
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
    path: pathlib.Path, width: float, height: float, *, layout: str | None = "constrained"
) -> Iterator[Figure]:
    """Gives an empty figure to draw on and writes it to `path` (PNG), and beside it as PDF.

    The figure belongs to no window and to no `pyplot` state: it needs no display and leaves no
    trace.

    Args:
      path: the PNG.
      width: inches.
      height: inches.
      layout: matplotlib's layout engine; `None` where the caller places everything.
    """
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout=layout)
        yield drawn
        with replacing(path) as partial:
            drawn.savefig(partial, dpi=_DPI)
            # 256 colours are enough for a drawing, and a third of the bytes
            with Image.open(partial) as image:
                small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            small.save(partial, optimize=True, dpi=(_DPI, _DPI))
        with replacing(path.with_suffix(".pdf")) as partial:
            drawn.savefig(partial, dpi=_DPI, metadata={"CreationDate": None})


def plain_log(axis: Axis) -> None:
    """Labels a log axis at 1, 2 and 5 of each decade, as plain numbers."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
