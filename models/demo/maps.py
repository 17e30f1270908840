"""True attention maps beside their Monarch approximation."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib import colors
from matplotlib.patches import Rectangle

import vmonarch_jax as vm

from ..layers import AttentionMethod
from ..pictures import to_uint8
from . import style

_CHUNK = 256  # columns of the matrix at once
_DECADES = 3.0  # that the colour scale spans
_MOST_CELLS = 256  # a side of a drawn matrix; larger ones are averaged down

#: Title of a head, and its dense and approximate attention matrices.
Head = tuple[str, Float[np.ndarray, "seq seq"], Float[np.ndarray, "seq seq"]]


def attention_matrix(
    method: AttentionMethod,
    q: Float[Array, "seq head_dim"],
    k: Float[Array, "seq head_dim"],
    grid: vm.VideoGrid,
) -> Float[np.ndarray, "seq seq"]:
    """Returns the matrix that a method multiplies the values with, in one head.

    Attention is linear in the values, so its outputs on the columns of the identity are the
    columns of the matrix, whatever the method is.
    """
    eye = jnp.eye(grid.tokens)

    @jax.jit
    def columns(value):
        return method(q[None, :, None], k[None, :, None], value[None, :, None], grid=grid)[0, :, 0]

    parts = [columns(eye[:, n : n + _CHUNK]) for n in range(0, grid.tokens, _CHUNK)]
    return np.concatenate([np.asarray(part) for part in parts], axis=1)


def pick_heads(
    gap: Float[np.ndarray, "layers batch rows heads"],
) -> list[tuple[str, int, int]]:
    """Returns `(title, layer, head)` of the heads with the lowest, middle and highest mean KL."""
    means = gap.mean((1, 2))
    order = np.argsort(means, axis=None)
    picks = dict.fromkeys((order[0], order[(len(order) - 1) // 2], order[-1]))
    words = ("closest", "median", "worst")[-len(picks) :]
    found = []
    for word, flat in zip(words, picks, strict=True):
        layer, head = (int(n) for n in np.unravel_index(flat, means.shape))
        title = f"layer {layer + 1}, head {head + 1} ({word})\nmean KL {means[layer, head]:.3f}"
        found.append((title, layer, head))
    return found


def _norms(tokens: int) -> tuple[colors.Normalize, colors.Normalize]:
    """Returns the shared log scale around uniform attention, 1 / tokens, and one for differences.

    Both end at the same value; differences below the log scale's floor fade to white.
    """
    top = min(1.0, 10.0 ** (_DECADES / 2) / tokens)
    floor = top * 10.0**-_DECADES
    return (
        colors.LogNorm(floor, top, clip=True),
        colors.SymLogNorm(10 * floor, linscale=0.5, vmin=-top, vmax=top),
    )


def _bars(figure, shown, difference, axes_shown, axes_difference, tokens: int) -> None:
    """Draws the two colour bars; ticks are decades."""
    kwargs = {"orientation": "horizontal", "aspect": 30, "pad": 0.02}
    bar = figure.colorbar(shown, ax=axes_shown, extend="both", **kwargs)
    bar.set_label(f"attention (uniform: 1/{tokens:,})")
    bar = figure.colorbar(difference, ax=axes_difference, extend="both", **kwargs)
    top = difference.norm.vmax
    decades = 10.0 ** np.floor(np.log10(top))
    ticks = [-decades, -decades / 10, 0, decades / 10, decades]
    bar.set_ticks(ticks, labels=[f"{_power(tick)}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("difference")


def _power(value: float) -> str:
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    return f"${sign}10^{{{round(np.log10(abs(value)))}}}$"


def _shrink(matrix: Float[np.ndarray, "seq seq"]) -> Float[np.ndarray, "cells cells"]:
    """Averages equal squares of the matrix, as few tokens a side as the picture can show."""
    n = len(matrix)
    side = next(s for s in range(1, n + 1) if n % s == 0 and n // s <= _MOST_CELLS)
    return matrix.reshape(n // side, side, n // side, side).mean((1, 3))


def draw_matrices(path: pathlib.Path, heads: Sequence[Head], grid: vm.VideoGrid) -> None:
    """Draws whole attention matrices: dense, Monarch and their difference, a row a head."""
    log, signed = _norms(grid.tokens)
    high = 1.9 * len(heads) + 0.75
    with style.figure(path, 5.6, high) as figure:
        axes = figure.subplots(len(heads), 3, squeeze=False, sharex=True, sharey=True)
        edges = np.linspace(0, grid.tokens, grid.frames + 1)
        ticks = edges[:: max(1, grid.frames // 4)]
        for row, (title, dense, monarch) in zip(axes, heads, strict=True):
            box = (0, grid.tokens, grid.tokens, 0)
            pictures = [_shrink(m) for m in (dense, monarch, monarch - dense)]
            for ax, picture, norm, tint in zip(
                row, pictures, (log, log, signed), ("magma", "magma", "RdBu_r"), strict=True
            ):
                image = ax.imshow(
                    picture, norm=norm, cmap=tint, extent=box, interpolation="nearest"
                )
                ax.set_xticks(ticks, [f"{n / grid.frame_tokens:.0f}" for n in ticks])
                ax.set_yticks(ticks, [f"{n / grid.frame_tokens:.0f}" for n in ticks])
                ax.tick_params(length=2)
                last = image
            row[0].set_ylabel(title + "\n\nquery frame")
        for ax, title in zip(axes[0], ("dense", "VMonarch", "VMonarch - dense"), strict=True):
            ax.set_title(title)
        for ax in axes[-1]:
            ax.set_xlabel("key frame")
        shown = axes[0, 0].images[0]
        _bars(figure, shown, last, axes[:, :2], axes[:, 2], grid.tokens)


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
    log, signed = _norms(grid.tokens)
    t, y, x = np.unravel_index(query, grid.shape)
    lines = 1 + 3 * len(heads)
    wide = style.PAGE - 1.25
    with style.figure(path, style.PAGE, wide / grid.frames * lines * 1.12 + 0.8) as figure:
        axes = figure.subplots(
            lines, grid.frames, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.08}
        )
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_linewidth(0.3)
        for n, frame in enumerate(to_uint8(video[:: max(1, len(video) // grid.frames)])):
            axes[0, n].imshow(frame, extent=(0, grid.width, grid.height, 0))
            axes[0, n].set_title(str(n), pad=2)
        _label(axes[0, 0], "video")
        for place, (_title, dense, monarch) in enumerate(heads):
            rows = [m[query].reshape(grid.shape) for m in (dense, monarch, monarch - dense)]
            names = (f"dense\n{_title}", "VMonarch", "difference")
            for kind, (maps, norm, tint) in enumerate(
                zip(rows, (log, log, signed), ("magma", "magma", "RdBu_r"), strict=True)
            ):
                line = axes[1 + 3 * place + kind]
                _label(line[0], names[kind])
                for n, ax in enumerate(line):
                    ax.imshow(maps[n], norm=norm, cmap=tint, extent=(0, grid.width, grid.height, 0))
        for line in axes:
            line[t].add_patch(
                Rectangle((x, y), 1, 1, fill=False, edgecolor="#00E5FF", linewidth=0.9)
            )
        _bars(
            figure, axes[1, 0].images[0], axes[3, 0].images[0],
            axes[:, : grid.frames * 2 // 3], axes[:, grid.frames * 2 // 3 :], grid.tokens,
        )  # fmt: skip


def _label(ax, text: str) -> None:
    ax.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=4)


def draw_gaps(
    path: pathlib.Path,
    methods: Sequence[tuple[str, str, Float[np.ndarray, "layers heads"]]],
) -> None:
    """Draws the mean KL of every head: name, colour and values of each method."""
    with style.figure(path, style.COLUMN, 2.3) as figure:
        axes = figure.subplots()
        layers, heads = methods[0][2].shape
        for n, (name, colour, means) in enumerate(methods):
            shift = (n - (len(methods) - 1) / 2) * 0.22
            inside = (np.arange(heads) - (heads - 1) / 2) * 0.05
            places = np.arange(1, layers + 1)[:, None] + shift + inside
            axes.plot(
                places.ravel(), means.ravel(), linestyle="", marker="o", markersize=3.2,
                color=colour, label=name, alpha=0.9,
            )  # fmt: skip
        axes.set(yscale="log", xlabel="layer (one dot a head)", ylabel="mean KL to dense (nats)")
        axes.set_xticks(range(1, layers + 1))
        axes.grid(axis="y", alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, handletextpad=0.2)
