"""Measured time against tokens, beside what the FLOPs predict."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from matplotlib import ticker

import vmonarch_jax as vm

from . import style
from .measure import median_seconds
from .progress import phase

_HEAD_DIM = 64
_REPEATS, _ENOUGH = 7, 4.0  # calls, and seconds after which no more begin
#: Latents of five seconds of video (21 frames) at growing resolution.
GRIDS = tuple(vm.VideoGrid(21, *size) for size in ((7, 7), (7, 14), (10, 20), (15, 26), (21, 38)))
QUICK_GRIDS = (vm.VideoGrid(4, 4, 4), vm.VideoGrid(4, 8, 8))


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of the plot: a function of q, k, v and grid, and the method that it computes."""

    key: str
    name: str
    method: Any
    call: Callable[..., Any]
    colour: str
    marker: str


def _library(q, k, v, *, grid):
    return jax.nn.dot_product_attention(q, k, v)


CURVES = (
    Curve("library", "jax.nn.dot_product_attention", vm.Dense(), _library, "#999999", "s"),
    Curve("dense", "vm.dense_attention", vm.Dense(), vm.Dense(), "#333333", "o"),
    Curve("tiled", "tiled Monarch", vm.TiledMonarch(), vm.TiledMonarch(), "#009E73", "^"),
    Curve("vmonarch", "VMonarch", vm.VMonarch(), vm.VMonarch(), "#0072B2", "D"),
)


def measure_scaling(
    grids: Sequence[vm.VideoGrid], report: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Times every curve on every grid: one head of 64, float32, forward, median of a few runs.

    Args:
      grids: from the smallest to the largest.
      report: is given all rows so far, after each grid.

    Returns:
      A row for each grid and curve: `tokens`, `grid`, `curve`, `flops` and `seconds`, which is
      `None` where this machine has too little memory for the library's quadratic attention.
    """
    counts = {
        (grid, curve.key): vm.flops.attention(curve.method, grid, heads=1, head_dim=_HEAD_DIM)
        for grid in grids
        for curve in CURVES
    }
    rows: list[dict[str, Any]] = []
    with phase("time against tokens", sum(counts.values())) as bar:
        for grid in grids:
            for curve in CURVES:
                count = counts[grid, curve.key]
                seconds = _time(curve, grid)
                rows.append(
                    {
                        "tokens": grid.tokens,
                        "grid": "x".join(map(str, grid.shape)),
                        "curve": curve.key,
                        "flops": count,
                        "seconds": seconds,
                    }
                )
                bar.update(count)
            report(rows)
    return rows


def _time(curve: Curve, grid: vm.VideoGrid) -> float | None:
    keys = jax.random.split(jax.random.key(grid.tokens), 3)
    q, k, v = (jax.random.normal(key, (1, grid.tokens, 1, _HEAD_DIM)) for key in keys)
    compiled = jax.jit(lambda q, k, v: curve.call(q, k, v, grid=grid)).lower(q, k, v).compile()
    memory = compiled.memory_analysis()
    needed = getattr(memory, "temp_size_in_bytes", 0)
    if jax.default_backend() == "cpu" and needed > _memory_bytes() / 2:
        return None
    return median_seconds(lambda: compiled(q, k, v), _REPEATS, _ENOUGH)


def _memory_bytes() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not every system tells
        return float("inf")


def draw_scaling(path: pathlib.Path, rows: Sequence[dict[str, Any]], device: str) -> None:
    """Draws the measured times and, dashed, what each method's FLOPs predict.

    The prediction counts every FLOP at the rate that the fastest dense attention reaches on the
    largest grid: where a line and its markers meet, the structure costs no efficiency.
    """
    known = [row for row in rows if row["seconds"]]
    largest = max(row["tokens"] for row in known)
    dense = ("library", "dense")
    rate = max(
        row["flops"] / row["seconds"]
        for row in known
        if row["tokens"] == largest and row["curve"] in dense
    )
    last = {row["curve"]: row["seconds"] for row in known if row["tokens"] == largest}
    best = min(last[key] for key in dense if key in last)
    with style.figure(path, style.COLUMN, 2.9) as figure:
        axes = figure.subplots()
        for curve in CURVES:
            own = [row for row in rows if row["curve"] == curve.key]
            done = [row for row in own if row["seconds"]]
            name = curve.name
            if curve.key in last and curve.key not in dense:
                name += f" ({best / last[curve.key]:.1f}x faster)"
            axes.plot(
                [row["tokens"] for row in done], [1e3 * row["seconds"] for row in done],
                marker=curve.marker, color=curve.colour, label=name, zorder=3,
            )  # fmt: skip
            if curve.key != "library":
                axes.plot(
                    [row["tokens"] for row in own], [1e3 * row["flops"] / rate for row in own],
                    color=curve.colour, linestyle=(0, (3, 2)), linewidth=0.8,
                )  # fmt: skip
        axes.plot([], [], color="#555555", linestyle=(0, (3, 2)), linewidth=0.8,
                  label="FLOPs at dense attention's rate")  # fmt: skip
        ticks = sorted({row["tokens"] for row in rows})
        axes.set(xscale="log", yscale="log", ylabel="milliseconds")
        axes.set_xlabel(f"tokens   (forward, 1 head of {_HEAD_DIM}, float32, {device})")
        axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.grid(alpha=0.25, linewidth=0.5, which="major")
        axes.legend(loc="upper left", frameon=False, handlelength=1.8, labelspacing=0.3)
        axes.spines[["top", "right"]].set_visible(False)
