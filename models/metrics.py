"""Training metrics: a CSV that survives restarts, and a plot of it."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.figure import Figure


class MetricsCSV:
    """Appends one row a step to a CSV file.

    Args:
      path: the file; made, with its folder and header, if it is not there.
      fields: columns after `step`.
      step: step that training goes on from. Rows of later steps are what a killed run wrote after
        its last checkpoint: they are dropped, because those steps are about to be run again.
    """

    def __init__(self, path: pathlib.Path, fields: Iterable[str], step: int = 0) -> None:
        self.path = pathlib.Path(path)
        self.fields = ("step", *fields)
        kept = [row for row in read_csv(self.path) if int(row["step"]) <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(partial, self.path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row; the file is closed again, so a kill loses nothing."""
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            writer.writerow({"step": step} | {k: f"{v:.6g}" for k, v in values.items()})


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """Returns the complete rows of a metrics file; none if there is no file.

    A row that a kill cut short lacks its last columns and is left out.
    """
    if not pathlib.Path(path).exists():
        return []
    with pathlib.Path(path).open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row.values()) and row["step"].isdigit()]


def plot_losses(curves: Mapping[str, pathlib.Path], out: pathlib.Path) -> None:
    """Draws the loss of each metrics file, raw and smoothed, into one PNG.

    Without `pyplot`, whose backend belongs to the caller: a notebook would show no more figures.

    Args:
      curves: name of each curve and its CSV.
      out: the picture.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for n, (name, path) in enumerate(curves.items()):
        rows = read_csv(path)
        if not rows:
            continue
        step = np.array([int(row["step"]) for row in rows])
        loss = np.array([float(row["loss"]) for row in rows])
        window = max(1, len(loss) // 8)
        smooth = np.convolve(loss, np.ones(window) / window, "valid")
        axes.plot(step, loss, color=f"C{n}", alpha=0.2, linewidth=0.7)
        middle = (window - 1) // 2
        axes.plot(step[middle : middle + len(smooth)], smooth, color=f"C{n}", label=name)
    axes.set(xlabel="step", ylabel="flow-matching loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)
