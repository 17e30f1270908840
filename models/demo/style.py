"""How every picture of the demo looks."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import matplotlib
from matplotlib.figure import Figure

from .files import replacing

#: Widths in inches of one column and of a whole page of a two-column paper.
COLUMN, PAGE = 3.4, 7.0

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
    path: pathlib.Path, width: float, height: float, *, vector: bool = True
) -> Iterator[Figure]:
    """Gives an empty figure to draw on and writes it to `path` (PNG), and beside it as PDF.

    The figure belongs to no window and to no `pyplot` state: it needs no display and leaves no
    trace.

    Args:
      path: the PNG.
      width: inches.
      height: inches.
      vector: also write `path` with the suffix `.pdf`.
    """
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        with replacing(path) as partial:
            drawn.savefig(partial, dpi=220, pil_kwargs={"optimize": True})
        if vector:
            with replacing(path.with_suffix(".pdf")) as partial:
                drawn.savefig(partial, dpi=220, metadata={"CreationDate": None})
