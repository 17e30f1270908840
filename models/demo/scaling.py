"""Measured time against tokens, beside what the FLOPs predict."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

import vmonarch_jax as vm

from .measure import median_seconds
from .progress import phase

HEAD_DIM = 64
_REPEATS, _ENOUGH = 7, 4.0  # calls, and seconds after which no more begin
#: Latents of five seconds of video (21 frames) at growing resolution.
GRIDS = tuple(vm.VideoGrid(21, *size) for size in ((7, 7), (7, 14), (10, 20), (15, 26), (21, 38)))
QUICK_GRIDS = (vm.VideoGrid(4, 8, 8),)


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
        (grid, curve.key): vm.flops.attention(curve.method, grid, heads=1, head_dim=HEAD_DIM)
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
    q, k, v = (jax.random.normal(key, (1, grid.tokens, 1, HEAD_DIM)) for key in keys)
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
