"""The study as a picture: FLOPs against error and against PSNR, one colour a family."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg", force=False)
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

#: Where a point is, its label and its colour.
Point = tuple[float, float, str, str]

# Colours that the colour-blind can tell apart (Okabe and Ito), and a shape for print.
FAMILIES = {
    "steps": ("VMonarch, first frame exact", "#0072B2", "o"),
    "no exact frame": ("VMonarch, no exact frame", "#56B4E9", "o"),
    "block of 2 frames": ("two frames a block", "#CC79A7", "s"),
    "rows": ("rows (1, 1, W)", "#E69F00", "D"),
    "tubes": ("tubes (T, 1, 1)", "#D55E00", "^"),
    "tiled": ("tiled Monarch", "#009E73", "v"),
    "exact key frames": ("exact key frames merged", "#000000", "P"),
    "tuned": ("tuned to VMonarch", "#0072B2", "*"),
}
JOINED = ("steps", "no exact frame", "rows")  # families of one setting: a line through them


def draw(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes the picture; rows without a label are left out."""
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.6), layout="constrained")
        panels = {"error": "relative output error", "psnr": "PSNR to dense samples (dB)"}
        rows = [row for row in rows if row["label"]]
        points = []
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            # Samples of other weights are apart from the dense model's for another reason.
            same = [row for row in rows if key == "error" or row["group"] != "tuned"]
            points.append(_panel(axis, same, key))
            axis.set(xlabel="matmul FLOPs, share of dense attention", ylabel=title, xscale="log")
            ticks = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
            axis.set_xticks(ticks)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.margins(0.09, 0.08)
            axis.set_xlim(min(r["flops"] for r in rows) / 1.2, 0.8)
        axes[0].set_ylim(bottom=0, top=1.08 * max(r["error"] for r in rows))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        # Labels look for room in the final layout, so that comes first.
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for axis, found in zip(axes, points, strict=True):
            label_points(axis, found)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]], key: str) -> list[Point]:
    """Draws the points of one panel and returns them."""
    points = []
    for group, (name, colour, marker) in FAMILIES.items():
        own = [r for r in rows if r["group"] == group and math.isfinite(r.get(key, math.inf))]
        if not own:
            continue
        x, y = [r["flops"] for r in own], [r[key] for r in own]
        line = "-" if group in JOINED else "none"
        size = 9 if marker == "*" else 5
        face = "none" if group == "tuned" else colour
        axis.plot(
            x, y, color=colour, marker=marker, linestyle=line, linewidth=0.8, markersize=size,
            markerfacecolor=face, label=name,
        )  # fmt: skip
        points += [(px, py, r["label"], colour) for px, py, r in zip(x, y, own, strict=True)]
    return points


def label_points(axis: Any, points: list[Point]) -> None:
    """Each point's label at the first place around it where nothing else is."""
    renderer = axis.figure.canvas.get_renderer()
    half = 3.2 * axis.figure.dpi / 72
    taken = []
    for x, y, _, _ in points:
        px, py = axis.transData.transform((x, y))
        taken.append(Bbox.from_bounds(px - half, py - half, 2 * half, 2 * half))
    taken += [_segment(axis, line, i) for line in axis.lines for i in range(_PIECES)]
    taken = [box for box in taken if box is not None]
    around = [(a * r, b * r) for r in (1, 1.5, 2.2, 3, 4, 5) for a, b in _PLACES]
    for x, y, text, colour in points:
        best = None
        for dx, dy in around:
            horizontal = "left" if dx > 0 else "right" if dx < 0 else "center"
            vertical = "bottom" if dy > 0 else "top" if dy < 0 else "center"
            note = axis.annotate(
                text, (x, y), (5 * dx, 4.2 * dy), textcoords="offset points", color=colour,
                ha=horizontal, va=vertical, fontsize=6.5,
            )  # fmt: skip
            box = note.get_window_extent(renderer)
            hits = sum(box.overlaps(other) for other in taken)
            inside = axis.bbox.containsx(box.x1) and axis.bbox.containsx(box.x0)
            inside = inside and axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1
            hits += 0 if inside else 5
            if best is None or hits < best[0]:
                if best is not None:
                    best[1].remove()
                best = (hits, note, box)
            else:
                note.remove()
            if not hits:
                break
        assert best is not None
        _, note, box = best
        taken.append(box)
        if max(abs(place) for place in note.xyann) > 12:  # points: too far to be seen as its own
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0}
            axis.annotate("", (x, y), note.xyann, textcoords="offset points", arrowprops=line)


def _segment(axis: Any, line: Any, piece: int) -> Bbox | None:
    """The box around one of the short pieces that a drawn line is cut into."""
    if line.get_linestyle() == "None":
        return None
    points = axis.transData.transform(line.get_xydata())
    place = np.linspace(0, len(points) - 1, _PIECES + 1)[piece : piece + 2]
    x, y = (np.interp(place, np.arange(len(points)), points[:, n]) for n in (0, 1))
    return Bbox([[x.min(), y.min()], [x.max(), y.max()]])


_PIECES = 60
_PLACES = ((1, 0), (-1, 0), (0, 1.2), (0, -1.2), (1, 1), (1, -1), (-1, 1), (-1, -1))
