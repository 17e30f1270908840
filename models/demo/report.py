"""The table: on the screen, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import vmonarch_jax as vm

from .conditions import Conditions
from .files import write_csv, write_json, write_text


@dataclasses.dataclass
class Result:
    """What is known of one method so far; `None` is not known yet, or has no meaning.

    Attributes:
      key: the method's name in files.
      name: its name for people.
      flops_ratio: attention FLOPs of all steps over those of dense attention.
      sampling_seconds: of all steps of all videos, without compilation.
      attention_seconds: of the attention in them.
      psnr: to the videos of dense attention, decibels.
      ssim: likewise.
      kl_mean: nats, mean over heads of `kl`.
      kl_worst: nats, of the worst head.
      input_psnr: to the user's own videos, decibels.
      kl: mean KL of each layer and head.
    """

    key: str
    name: str
    flops_ratio: float
    sampling_seconds: float
    attention_seconds: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    kl_mean: float | None = None
    kl_worst: float | None = None
    input_psnr: float | None = None
    kl: Float[np.ndarray, "layers heads"] | None = None

    def numbers(self) -> dict[str, Any]:
        """All but `kl`, as it goes to files."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["kl"]
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


def machine() -> str:
    """Returns one line on what ran: device, cores, versions, and how busy the machine was."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    what = f"{cores} CPU cores ({platform.machine()})"
    if device.platform != "cpu":
        what = f"one {device.device_kind}, {what}"
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{what}, JAX {jax.__version__}, Python {platform.python_version()}{load}"


def table(results: Sequence[Result]) -> str:
    """Returns the results as a Markdown table, aligned so that it also reads well as text."""
    head = ["method", "attention FLOPs", "attention s", "sampling s", "PSNR dB", "SSIM"]
    head += ["KL mean", "KL worst head"]
    with_input = any(r.input_psnr is not None for r in results)
    if with_input:
        head.append("PSNR to input dB")
    rows = []
    for r in results:
        row = [
            r.name, f"{r.flops_ratio:.0%}", _show(r.attention_seconds, ".2f"),
            _show(r.sampling_seconds, ".1f"), _show(r.psnr, ".1f"), _show(r.ssim, ".3f"),
            _show(r.kl_mean, ".3f"), _show(r.kl_worst, ".3f"),
        ]  # fmt: skip
        rows.append([*row, _show(r.input_psnr, ".1f")] if with_input else row)
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    align = [str.ljust] + [str.rjust] * (len(head) - 1)
    lines = [
        "| " + " | ".join(f(c, w) for f, c, w in zip(align, cells, widths, strict=True)) + " |"
        for cells in (head, *rows)
    ]
    rule = "".join(f"| {'-' * (w - 1)}{'-' if n == 0 else ':'} " for n, w in enumerate(widths))
    return "\n".join((lines[0], rule + "|", *lines[1:])) + "\n"


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def notes_of(
    conditions: Conditions, steps: int, levels: Sequence[float], grid: vm.VideoGrid, device: str
) -> str:
    """Returns what the table's columns mean, and on what they were measured."""
    start = "pure noise" if conditions.t == 1 else f"the input noised to t = {conditions.t:g}"
    return (
        f"{len(conditions.names)} videos of {grid.frames}x{grid.height}x{grid.width} = "
        f"{grid.tokens:,} tokens, {steps} Euler steps from {start}, guidance "
        f"{conditions.guidance:g}; {device}.\n"
        "FLOPs: matmuls of attention on all steps, relative to dense; of SALAD with its linear "
        "branches. Attention s: attention alone on the real q, k, v, on all steps; of SALAD "
        "without branches. PSNR and SSIM: to the videos of dense attention from the same "
        "noise.\nKL: of the approximate attention rows from the dense ones on the model's own q "
        f"and k, in nats, exact; mean over rows at t = {', '.join(f'{t:g}' for t in levels)}; mean "
        "over heads, and the worst head. AdaSpa's is that of a step that searches; corrected "
        "attention has none.\n"
    )


def write_report(
    out: pathlib.Path, results: Sequence[Result], about: dict[str, Any], notes: str
) -> None:
    """Writes `table.md`, `table.csv`, `results.json` and `kl_per_head.csv` of what is known."""
    write_text(out / "table.md", table(results) + "\n" + notes)
    write_csv(out / "table.csv", [r.numbers() for r in results])
    kl = [
        {"method": r.key, "layer": layer + 1, "head": head + 1, "kl_mean": round(float(value), 6)}
        for r in results
        if r.kl is not None
        for (layer, head), value in np.ndenumerate(r.kl)
    ]
    if kl:
        write_csv(out / "kl_per_head.csv", kl)
    write_json(out / "results.json", {**about, "methods": [r.numbers() for r in results]})
