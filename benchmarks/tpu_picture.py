"""Draws `docs/images/tpu_dataflow.png`: `python -m benchmarks.tpu_picture`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

OUT = Path(__file__).parent.parent / "docs" / "images" / "tpu_dataflow.png"
HBM, VMEM, UNIT, LINE = "#e8eef7", "#fdf3e1", "#ffffff", "#3b4a5e"


def box(axes, x, y, width, height, text, color=UNIT, size=8.5, bold=False):
    """A rounded box with centred text."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height,
            boxstyle="round,pad=0.02,rounding_size=0.08", fc=color, ec=LINE, lw=0.9,
        )
    )  # fmt: skip
    axes.text(
        x + width / 2, y + height / 2, text,
        ha="center", va="center", size=size, color="#1c2733", weight="bold" if bold else "normal",
    )  # fmt: skip


def arrow(axes, start, stop, text="", offset=(0.0, 0.12), curve=0.0):
    """An arrow with a label above its middle."""
    axes.add_patch(
        FancyArrowPatch(
            start, stop, arrowstyle="-|>", mutation_scale=10, lw=1.1, color=LINE,
            connectionstyle=f"arc3,rad={curve}", shrinkA=1, shrinkB=1,
        )
    )  # fmt: skip
    if text:
        x, y = (start[0] + stop[0]) / 2 + offset[0], (start[1] + stop[1]) / 2 + offset[1]
        axes.text(x, y, text, ha="center", va="center", size=7.8, color=LINE)


def main() -> None:
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(11, 7.6), gridspec_kw={"height_ratios": [1, 1.5]}
    )
    whole_call(top)
    inside(bottom)
    for axes in (top, bottom):
        axes.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.97, bottom=0.01, hspace=0.08)
    figure.savefig(OUT, dpi=130, facecolor="white")


def whole_call(axes) -> None:
    """VMonarch with two steps, as kernels and what passes between them."""
    axes.set_xlim(0, 16.4)
    axes.set_ylim(0, 4.1)
    title = (
        "One call of VMonarch: five kernels; what passes between them is [heads, T, b, d] in HBM"
    )
    axes.set_title(title, size=10.5, loc="left")
    axes.add_patch(Rectangle((0.05, 0.15), 16.3, 0.75, fc=HBM, ec="none"))
    axes.text(0.2, 0.52, "HBM:  q   K   V   (read by every kernel that needs them, once)",
              va="center", size=9, color="#1c2733")  # fmt: skip
    kernels = [
        (0.3, "R step\nof q on K", "attention\ninside a frame"),
        (3.6, "L step, middle", "attention\nbetween frames,\neach pixel"),
        (6.9, "R step\nof q̃ on [K | V]", "attention\ninside a frame"),
        (10.2, "L step, last", "attention\nbetween frames,\neach pixel"),
    ]
    for x, name, what in kernels:
        box(axes, x, 1.75, 2.1, 1.2, name, VMEM, 9, bold=True)
        axes.text(x + 1.05, 3.42, what, ha="center", va="center", size=7.5, color=LINE)
        arrow(axes, (x + 1.05, 0.92), (x + 1.05, 1.73))
    for x, label in ((2.42, "aL, cL"), (5.72, "q̃"), (9.02, "aL, cL, Y")):
        arrow(axes, (x, 2.35), (x + 1.16, 2.35), label, (0, 0.2))
    box(axes, 13.9, 2.55, 2.3, 0.75, "out, lse", HBM, 9, bold=True)
    arrow(axes, (12.32, 2.45), (13.88, 2.85))
    box(axes, 13.9, 1.3, 2.3, 0.75, "dense rows\n(first frame)", VMEM, 8.5, bold=True)
    arrow(axes, (15.05, 0.92), (15.05, 1.28))
    arrow(axes, (15.05, 2.07), (15.05, 2.53), "replaces\nits frame", (0.68, 0.0))


def inside(axes) -> None:
    """What one grid step of each kernel holds in VMEM."""
    axes.set_xlim(0, 16.4)
    axes.set_ylim(0, 6.0)
    title = "One grid step in VMEM; meanwhile the next step's blocks arrive, the last one's leave"
    axes.set_title(title, size=10.5, loc="left")
    panels = (
        (0.05, 5.3, "R step, dense rows"),
        (5.55, 5.3, "L step (packed)"),
        (11.05, 5.3, "tiled Monarch (fused)"),
    )
    for x, width, name in panels:
        axes.add_patch(Rectangle((x, 0.1), width, 5.5, fc=VMEM, ec="none"))
        axes.text(x + 0.12, 5.35, name, size=9.5, weight="bold", color="#1c2733", va="center")
    x = 0.05
    box(axes, x + 0.2, 4.25, 2.2, 0.7, "q̃ rows [b, d]")
    box(axes, x + 2.9, 4.25, 2.2, 0.7, "K, [K | V] [b, ·]")
    box(axes, x + 1.3, 3.05, 2.7, 0.7, "x = q̃ Kᵀ, straight into\np = 2ˣ (no maximum)")
    box(axes, x + 1.3, 1.85, 2.7, 0.7, "l = Σ p ,  p [K | V]\n(one wide product)")
    box(axes, x + 0.2, 0.7, 2.1, 0.65, "aL, Y, lse, cL", HBM)
    box(axes, x + 2.8, 0.7, 2.4, 0.65, "l out of [2⁻⁶⁰, 2⁶⁰]:\nagain, with maximum", "#fbdfdc")
    arrow(axes, (x + 1.3, 4.22), (x + 2.2, 3.78))
    arrow(axes, (x + 4.0, 4.22), (x + 3.1, 3.78))
    arrow(axes, (x + 2.65, 3.02), (x + 2.65, 2.58))
    arrow(axes, (x + 2.2, 1.82), (x + 1.3, 1.38))
    arrow(axes, (x + 3.1, 1.82), (x + 4.0, 1.38))
    x = 5.55
    box(axes, x + 0.2, 4.25, 4.9, 0.7, "q, aL (, Y):  [T, positions, d], as the R step left them")
    box(
        axes,
        x + 0.2,
        3.05,
        4.9,
        0.7,
        "strided loads gather the T frames of a position;\nseveral positions share a product",
    )
    for row in range(4):
        for column in range(4):
            own = row == column
            axes.add_patch(
                Rectangle((x + 0.6 + 0.33 * column, 2.35 - 0.33 * row), 0.3, 0.3,
                          fc="#8fb3dd" if own else "#f1e6d2", ec=LINE, lw=0.5)
            )  # fmt: skip
    axes.text(
        x + 1.26, 1.1, "scores: a mask keeps\na position's own", ha="center", va="center", size=7.5
    )
    box(axes, x + 2.5, 1.75, 2.6, 0.75, "softmax over frames:\n2ᶠ, sums, masks")
    box(axes, x + 2.5, 0.7, 2.6, 0.65, "q̃   or   out, lse", HBM)
    arrow(axes, (x + 2.65, 4.22), (x + 2.65, 3.78))
    arrow(axes, (x + 1.6, 3.02), (x + 1.4, 2.7))
    arrow(axes, (x + 1.95, 2.1), (x + 2.48, 2.1))
    arrow(axes, (x + 3.8, 1.72), (x + 3.8, 1.38))
    x = 11.05
    box(axes, x + 0.2, 4.25, 2.3, 0.7, "A query tiles")
    box(axes, x + 2.8, 4.25, 2.3, 0.7, "F key tiles: K, V")
    box(axes, x + 0.2, 3.05, 4.9, 0.7, "R step of each block k:  l·[aL | Y]")
    box(axes, x + 0.9, 2.05, 3.5, 0.55, "scratch, by position (never in HBM)", "#dff0e2")
    box(axes, x + 0.2, 1.25, 4.9, 0.5, "L step of each position j: all (f, k) in one product")
    box(axes, x + 1.4, 0.35, 2.5, 0.55, "out, lse", HBM)
    arrow(axes, (x + 1.35, 4.22), (x + 1.9, 3.78))
    arrow(axes, (x + 3.95, 4.22), (x + 3.4, 3.78))
    for start, stop in ((3.02, 2.63), (2.02, 1.78), (1.22, 0.93)):
        arrow(axes, (x + 2.65, start), (x + 2.65, stop))


if __name__ == "__main__":
    main()
