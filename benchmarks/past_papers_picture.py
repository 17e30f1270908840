"""The study of corrected and guided attention as a picture of three panels."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

Row = dict[str, Any]

# Colours that the colour-blind can tell apart (Okabe and Ito).
BLUE, GREEN, ORANGE, RED = (
    "#0072B2", "#009E73", "#E69F00", "#D55E00"
)  # fmt: skip
METHODS = {"frames, no exact frame": ("frames", BLUE), "tubes": ("tubes", RED)}
GUIDES = {
    "true gap": ("true gap", "-", "o"), "gap of 8 before": ("gap of 8 steps before", "--", "s"),
    "mass times curvature": ("mass times curvature", "-.", "^"), "mass alone": ("mass", ":", "v"),
}  # fmt: skip
FAMILIES = {
    "corrected every": ("corrected", BLUE, "o"),
    "guided,": ("guided", GREEN, "^"),
    "dense output": ("dense output reused", "#000000", "D"),
    "": ("alone", ORANGE, "s"),
}


def draw(rows: list[Row], path: Path) -> None:
    """Writes the picture."""
    parts = {
        part: [row for row in rows if row["part"] == part]
        for part in ("corrected", "guided", "samples")
    }
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
        _ages(axes[0], parts["corrected"])
        _guides(axes[1], parts["guided"])
        _samples(axes[2], parts["samples"])
        for axis in axes:
            axis.grid(alpha=0.25, linewidth=0.5)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _ages(axis: Any, rows: list[Row]) -> None:
    """Error against the steps since the refresh; dotted: without any."""
    names = {"the dense output again": ("dense output reused", "#000000"), **METHODS}
    for method, (name, colour) in names.items():
        own = {row["age"]: row["error"] for row in rows if row["method"] == method}
        plain = own.pop(0, None)
        label = name if plain is None else f"{name}, corrected"
        axis.plot([0, *own], [0, *own.values()], "o-", color=colour, markersize=4, label=label)
        if plain is not None:
            axis.axhline(plain, color=colour, linestyle=":", label=f"{name} alone")
    axis.set(
        xlabel="denoising steps since the refresh", ylabel="relative output error of a call",
        title="corrected attention",
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=7)


def _guides(axis: Any, rows: list[Row]) -> None:
    """Error against FLOPs, a line for each way of choosing blocks."""
    for method, (name, colour) in METHODS.items():
        start = [r for r in rows if r["method"] == method and r["guide"] == "none"]
        for guide, (_, line, marker) in GUIDES.items():
            own = start + [r for r in rows if (r["method"], r["guide"]) == (method, guide)]
            axis.plot(
                [r["flops"] for r in own], [r["error"] for r in own], line, color=colour,
                marker=marker, markersize=3.5, linewidth=1,
            )  # fmt: skip
        axis.plot([], [], color=colour, linewidth=4, label=name)
    for label, line, marker in GUIDES.values():
        axis.plot([], [], line, color="#000000", marker=marker, markersize=3.5, label=label)
    axis.set(
        xlabel="matmul FLOPs, share of dense attention", ylabel="relative output error of a call",
        title="guided attention", ylim=(0, None),
    )  # fmt: skip
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    axis.legend(frameon=False, fontsize=7, ncols=2, loc="lower left")


def _samples(axis: Any, rows: list[Row]) -> None:
    """Difference of whole samples against the FLOPs of a sampling run."""
    for name, colour, marker in FAMILIES.values():
        axis.plot([], [], marker, color=colour, label=name)
    for row in rows:
        start = next(start for start in FAMILIES if row["method"].startswith(start))
        _, colour, marker = FAMILIES[start]
        face = "none" if "tubes" in row["method"] else colour
        axis.plot(
            row["flops"], row["error"], marker, color=colour, markerfacecolor=face, markersize=5,
            linestyle="none",
        )  # fmt: skip
    axis.set(
        xlabel="attention FLOPs of 50 steps, share of dense", xscale="log", ylim=(0, None),
        ylabel="relative difference of the sample", title="sampled videos (hollow: tubes)",
    )  # fmt: skip
    axis.set_xticks((0.1, 0.15, 0.2, 0.3, 0.4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False, fontsize=7, loc="lower left")
