"""The plots: time against tokens, and the certificate of every head."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import ticker

from . import style
from .scaling import CURVES, HEAD_DIM


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
    with style.figure(path, style.COLUMN, 3.0) as figure:
        axes = figure.subplots()
        line: dict[str, Any] = {"linestyle": (0, (3, 2)), "linewidth": 0.8}
        dashed = []
        for curve in CURVES:
            if curve.key not in dense and not dashed:
                # here, so that the legend's first column is dense attention and its prediction
                dashed = axes.plot(
                    [], [], color="#555555", label="FLOPs at dense attention's rate", **line
                )
            own = [row for row in rows if row["curve"] == curve.key]
            done = [row for row in own if row["seconds"]]
            name = curve.name
            if curve.key in last and curve.key not in dense:
                name += f" ({best / last[curve.key]:.1f}x as fast)"
            axes.plot(
                [row["tokens"] for row in done], [1e3 * row["seconds"] for row in done],
                marker=curve.marker, color=curve.colour, label=name, zorder=3,
            )  # fmt: skip
            if curve.key != "library":
                axes.plot(
                    [row["tokens"] for row in own], [1e3 * row["flops"] / rate for row in own],
                    color=curve.colour, **line,
                )  # fmt: skip
        ticks = sorted({row["tokens"] for row in rows})
        axes.set(xscale="log", yscale="log", ylabel="milliseconds")
        axes.set_xlabel(f"tokens\nforward, 1 head of {HEAD_DIM}, float32, {device}")
        axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axes.yaxis.set_major_locator(ticker.LogLocator())
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.grid(alpha=0.25, linewidth=0.5, which="major")
        figure.legend(
            loc="outside upper center", ncols=2, frameon=False, handlelength=1.6, fontsize=6.5,
            labelspacing=0.3, columnspacing=0.8,
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)


def draw_gaps(
    path: pathlib.Path,
    methods: Sequence[tuple[str, str, Float[np.ndarray, "layers heads"]]],
) -> None:
    """Draws the mean KL of every head: name, colour and values of each method."""
    with style.figure(path, style.COLUMN, 2.3) as figure:
        axes = figure.subplots()
        layers, heads = methods[0][2].shape
        for n, (name, colour, means) in enumerate(methods):
            shift = (n - (len(methods) - 1) / 2) * 0.66 / len(methods)
            inside = (np.arange(heads) - (heads - 1) / 2) * 0.15 / len(methods)
            places = np.arange(1, layers + 1)[:, None] + shift + inside
            axes.plot(
                places.ravel(), means.ravel(), linestyle="", marker="o", markersize=3.2,
                color=colour, label=name, alpha=0.9,
            )  # fmt: skip
        axes.set(yscale="log", xlabel="layer (one dot a head)", ylabel="mean KL to dense (nats)")
        axes.set_xticks(range(1, layers + 1))
        style.plain_log(axes.yaxis)
        axes.grid(axis="y", alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, handletextpad=0.2)
