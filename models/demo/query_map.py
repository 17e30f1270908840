"""One query's attention over the frames of the video."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.patches import Rectangle

import vmonarch_jax as vm

from ..pictures import to_uint8
from . import style
from .maps import Head, draw_bar, norms, scale_name


def draw_query(
    path: pathlib.Path,
    heads: Sequence[Head],
    grid: vm.VideoGrid,
    video: Float[np.ndarray, "frames height width 3"],
    query: int,
) -> None:
    """Draws one query's attention over the frames, under the frames themselves.

    Args:
      path: the PNG.
      heads: titles and matrices.
      grid: the token grid.
      video: what the model was looking at, without noise.
      query: the query's token.
    """
    log, signed = norms(grid.tokens)
    t, y, x = (int(n) for n in np.unravel_index(query, grid.shape))
    # everything is placed in inches: rows of small maps must not drift apart
    left, gap = 1.0, 0.09
    cell = (style.PAGE - left - 0.06) / grid.frames
    row = cell * grid.height / grid.width
    high = 0.2 + row + len(heads) * (3 * row + gap) + 0.62
    extent = (0, grid.width, grid.height, 0)
    with style.figure(path, style.PAGE, high, layout=None) as figure:

        def line(top: float, name: str, pictures, **kwargs):
            for n, picture in enumerate(pictures):
                corner = (left + n * cell) / style.PAGE, 1 - (top + row) / high
                ax = figure.add_axes((*corner, 0.94 * cell / style.PAGE, 0.94 * row / high))
                image = ax.imshow(picture, extent=extent, aspect="auto", **kwargs)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_linewidth(0.3)
                if n == t:
                    box = Rectangle((x, y), 1, 1, fill=False, edgecolor="#00E5FF", linewidth=0.9)
                    ax.add_patch(box)
                if top < 0.3:
                    ax.set_title(str(n), pad=2, fontsize=7)
            figure.text(
                (left - 0.06) / style.PAGE, 1 - (top + row / 2) / high, name, ha="right",
                va="center", fontsize=7,
            )  # fmt: skip
            return image

        stride = max(1, len(video) // grid.frames)
        line(0.2, "frame", to_uint8(video[::stride][: grid.frames]))
        for n, (title, dense, monarch) in enumerate(heads):
            top = 0.2 + row + gap + n * (3 * row + gap)
            maps = [m[query].reshape(grid.shape) for m in (dense, monarch, monarch - dense)]
            shown = line(top, "dense", maps[0], norm=log, cmap="magma")
            line(top + row, "VMonarch", maps[1], norm=log, cmap="magma")
            difference = line(top + 2 * row, "difference", maps[2], norm=signed, cmap="RdBu_r")
            figure.text(
                0.06 / style.PAGE, 1 - (top + 1.5 * row) / high, title, rotation=90, ha="left",
                va="center", fontsize=6.5, linespacing=1.1,
            )  # fmt: skip
        wide = (style.PAGE - left) / style.PAGE
        for image, name, start, share in (
            (shown, scale_name(grid), 0.0, 0.56),
            (difference, "difference", 0.62, 0.36),
        ):
            place = (left / style.PAGE + start * wide, 0.42 / high, share * wide, 0.09 / high)
            draw_bar(figure, image, name, cax=figure.add_axes(place))
