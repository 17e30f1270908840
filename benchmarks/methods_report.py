"""The comparison of methods as a table, a picture and the README's own table."""

from pathlib import Path
from typing import Any

import matplotlib

from . import methods_tpu
from .cases import between_marks, table
from .methods_list import ENTRIES
from .picture import Point, label_points

matplotlib.use("Agg", force=False)
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

COLOURS = {
    "Monarch": ("#0072B2", "o"), "block-sparse": ("#009E73", "s"),
    "past the papers": ("#D55E00", "^"), "tuned": ("#CC79A7", "*"), "dense": ("#333333", "D"),
}  # fmt: skip
START, END = "<!-- methods: made by python -m benchmarks.methods -->", "<!-- end of methods -->"

PAGE = """# All methods on the tiny video DiT

{place}
- command: `python -m benchmarks.methods`
- setting: {setting}

{table}

`FLOPs`: matmul FLOPs of an ordinary step (without warm-up, search or refresh) over those of dense
attention; `run`: of all steps of the sampler. `error`: relative error of the attention output on
ordinary steps of the dense model's own samples, mean over layers, heads and steps, and over all
steps. `KL`: the certificate's mean, in nats; a corrected method has none. `difference`:
`|video - dense| / |dense|` of the final samples, dense being dense attention on the same weights
(for tuned weights, whose linear branches belong to them, `from dense` has the distance to the
original model's). `speed`: dense attention's time over the method's on an ordinary step at the
timed size; `ideal`: the ratio of the FLOPs there. Training-free rows run on weights trained under
dense attention.

![Error against FLOPs and time](methods.png)

## On a TPU, by static schedule

Speedup of one head of 128 in bfloat16 over the fastest dense attention (JAX's or tokamax's splash
attention), by `../tpu_schedule.json` ([how to read it](../../docs/tpu.md)). **Nothing here has run
on a TPU.** Block-sparse parts are scaled by their kept pairs from the scheduled case nearest in
size and share. Left out are: putting tokens in the order of tiles and back (sliding window, SALAD),
SALAD's linear branch, and the masked L step of guided attention, which has no kernel of its own.

{tpu}
"""


def write(known: dict[str, Any], out: Path, readme: Path | None) -> None:
    """Writes `methods.md`, `methods.png`, and the table between the README's marks."""
    rows = [
        known["rows"][e.key] | {"key": e.key} for e in ENTRIES if e.key in known.get("rows", {})
    ]
    if not rows:
        return
    page = PAGE.format(
        place=known["place"],
        setting=known["setting"],
        table=markdown(rows),
        tpu=methods_tpu.report(),
    )
    (out / "methods.md").write_text(page)
    draw(rows, out / "methods.png")
    if readme is not None:
        readme.write_text(in_readme(readme.read_text(), rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The whole table."""
    header = [
        "", "method", "FLOPs", "run", "error", "run", "KL", "difference", "PSNR", "from dense",
        "ms", "speed", "ideal",
    ]  # fmt: skip
    cells = []
    for row in rows:
        own, dense = row["seconds"]
        cells.append([
            row["group"], row["name"], f"{row['flops']:.3f}", f"{row['run_flops']:.3f}",
            f"{row['error']:.3f}", f"{row['run_error']:.3f}", _kl(row),
            f"{row['difference']:.3f}", _psnr(row), f"{row['from_dense']:.3f}",
            f"{1e3 * own:.0f}", f"{dense / own:.1f}x", f"{1 / row['flops_timed']:.1f}x",
        ])  # fmt: skip
    return table(header, cells, left=2)


def readme_table(rows: list[dict[str, Any]]) -> str:
    """The README's columns."""
    calls = {entry.key: entry.call for entry in ENTRIES}
    header = [
        "method", "call", "FLOPs", "whole run", "error", "KL", "sample", "PSNR", "speed", "ideal",
    ]  # fmt: skip
    cells = []
    for row in rows:
        own, dense = row["seconds"]
        cells.append([
            row["name"], calls[row["key"]], f"{row['flops']:.0%}", f"{row['run_flops']:.0%}",
            f"{row['error']:.3f}", _kl(row), f"{row['difference']:.3f}", _psnr(row),
            f"{dense / own:.1f}x", f"{1 / row['flops_timed']:.1f}x",
        ])  # fmt: skip
    return table(header, cells, left=2)


def in_readme(text: str, rows: list[dict[str, Any]]) -> str:
    """The README with the table between its marks.

    Raises:
        ValueError: if the marks are not there.
    """
    return between_marks(text, START, END, readme_table(rows), "the README")


def _kl(row: dict[str, Any]) -> str:
    return "-" if row["kl"] is None else f"{row['kl']:.3f}"


def _psnr(row: dict[str, Any]) -> str:
    return "-" if row["difference"] == 0 else f"{row['psnr']:.1f} dB"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Error of a call and difference of samples, against FLOPs; error against time."""
    panels = (
        ("error", "flops", "error of a call", "FLOPs of an ordinary step / dense"),
        ("difference", "run_flops", "difference of samples", "FLOPs of all steps / dense"),
        ("error", "time", "error of a call", "time of an ordinary step / dense"),
    )
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.2), layout="constrained")
        points: list[list[Point]] = []
        for axis, (y, x, y_name, x_name) in zip(axes, panels, strict=True):
            points.append([])
            for row in rows:
                # Tuned weights make other samples for another reason than the attention's error.
                if row["group"] == "dense" or (row["group"] == "tuned" and y == "difference"):
                    continue
                colour, marker = COLOURS[row["group"]]
                at = row["seconds"][0] / row["seconds"][1] if x == "time" else row[x]
                axis.plot(
                    at, row[y], marker, color=colour, markersize=9 if marker == "*" else 5,
                    linestyle="none",
                )  # fmt: skip
                points[-1].append((at, row[y], row["key"].replace("_", " "), colour))
            axis.set(xlabel=x_name, ylabel=y_name, xscale="log")
            axis.set_xticks([0.1, 0.15, 0.2, 0.3, 0.5])
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.margins(0.2, 0.1)
            axis.set_ylim(bottom=0)
        marks = [
            plt.Line2D([], [], color=colour, marker=marker, linestyle="none")
            for colour, marker in COLOURS.values()
        ]
        figure.legend(
            marks[:-1], list(COLOURS)[:-1], loc="outside lower center", ncols=4, frameon=False
        )
        # Labels look for room in the final layout, so that comes first.
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for axis, found in zip(axes, points, strict=True):
            label_points(axis, found)
        figure.savefig(path, dpi=200)
        plt.close(figure)
