"""True attention maps beside their Monarch approximation."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib import colors

import vmonarch_jax as vm

from ..layers import AttentionMethod
from . import style

_CHUNK = 256  # columns of the matrix at once
_DECADES = 3.0  # that the colour scale spans
_MOST_CELLS = 128  # a side of a drawn matrix; larger ones are averaged down

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
    parts = [
        np.asarray(_columns(method, grid, q, k, eye[:, n : n + _CHUNK]))
        for n in range(0, grid.tokens, _CHUNK)
    ]
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _columns(method, grid, q, k, value):
    q, k, value = (x[None, :, None] for x in (q, k, value))
    return method(q, k, value, grid=grid)[0, :, 0]


def pick_heads(
    gap: Float[np.ndarray, "layers batch rows heads"],
) -> list[tuple[str, int, int]]:
    """Returns `(title, layer, head)` of the heads with the lowest, middle and highest mean KL."""
    means = np.asarray(gap).mean((1, 2))
    order = np.argsort(means, axis=None)
    # in this order, so that of two heads one is the closest and one the worst
    picks = {order[(len(order) - 1) // 2]: "median", order[-1]: "worst", order[0]: "closest"}
    found = []
    for flat, word in sorted(picks.items(), key=lambda item: means.flat[item[0]]):
        layer, head = (int(n) for n in np.unravel_index(flat, means.shape))
        title = f"layer {layer + 1}, head {head + 1} ({word})\nmean KL {means[layer, head]:.3f}"
        found.append((title, layer, head))
    return found


def norms(tokens: int) -> tuple[colors.Normalize, colors.Normalize]:
    """Returns the shared log scale around uniform attention, 1 / tokens, and one for differences.

    Both end at the same value; differences below the log scale's floor fade to white.
    """
    top = min(1.0, 10.0 ** (_DECADES / 2) / tokens)
    floor = top * 10.0**-_DECADES
    return (
        colors.LogNorm(floor, top, clip=True),
        colors.SymLogNorm(10 * floor, linscale=0.5, vmin=-top, vmax=top),
    )


def draw_bar(figure, image, label: str, **where) -> None:
    """Draws a colour bar below the pictures; of a difference only the ends and zero have ticks."""
    bar = figure.colorbar(image, orientation="horizontal", extend="both", **where)
    bar.set_label(label, labelpad=1)
    norm = image.norm
    if isinstance(norm, colors.SymLogNorm) and norm.vmax is not None:
        power = int(np.floor(np.log10(norm.vmax)))
        names = [f"$-10^{{{power}}}$", "0", f"$10^{{{power}}}$"]
        bar.set_ticks([-(10.0**power), 0, 10.0**power], labels=names)
        bar.minorticks_off()


def _shrink(matrix: Float[np.ndarray, "seq seq"]) -> Float[np.ndarray, "cells cells"]:
    """Averages equal squares of the matrix, as few tokens a side as the picture can show."""
    n = len(matrix)
    side = next(s for s in range(1, n + 1) if n % s == 0 and n // s <= _MOST_CELLS)
    return matrix.reshape(n // side, side, n // side, side).mean((1, 3))


def draw_matrices(path: pathlib.Path, heads: Sequence[Head], grid: vm.VideoGrid) -> None:
    """Draws whole attention matrices: dense, Monarch and their difference, a row a head."""
    log, signed = norms(grid.tokens)
    high = 1.62 * len(heads) + 0.85
    with style.figure(path, 5.6, high, maps=("magma", "RdBu_r")) as figure:
        axes = figure.subplots(len(heads), 3, squeeze=False, sharex=True, sharey=True)
        edges = np.linspace(0, grid.tokens, grid.frames + 1)
        ticks = edges[:: max(1, grid.frames // 4)]
        for row, (title, dense, monarch) in zip(axes, heads, strict=True):
            box = (0, grid.tokens, grid.tokens, 0)
            pictures = [_shrink(m) for m in (dense, monarch, monarch - dense)]
            for ax, picture, norm, tint in zip(
                row, pictures, (log, log, signed), ("magma", "magma", "RdBu_r"), strict=True
            ):
                ax.imshow(picture, norm=norm, cmap=tint, extent=box, interpolation="nearest")
                ax.set_xticks(ticks, [f"{n / grid.frame_tokens:.0f}" for n in ticks])
                ax.set_yticks(ticks, [f"{n / grid.frame_tokens:.0f}" for n in ticks])
                ax.tick_params(length=2)
            row[0].set_ylabel(title + "\n\nquery frame")
        for ax, title in zip(axes[0], ("dense", "VMonarch", "VMonarch − dense"), strict=True):
            ax.set_title(title)
        for ax in axes[-1]:
            ax.set_xlabel("key frame")
        where = {"pad": 0.02, "aspect": 30}
        draw_bar(figure, axes[0, 0].images[0], scale_name(grid), ax=axes[:, :2], **where)
        draw_bar(
            figure, axes[0, 2].images[0], "difference", ax=axes[:, 2], **where | {"aspect": 15}
        )


def scale_name(grid: vm.VideoGrid) -> str:
    """Returns the label of the shared colour bar."""
    return f"attention (uniform: 1/{grid.tokens:,})"
