"""`tpu_schedule.md` from the record: speedups, what a call consists of, and every kernel."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS, Chip

import vmonarch_jax as vm

from . import splash
from .cases import table
from .schedules import SHAPES

REPORT = Path(__file__).with_name("tpu_schedule.md")
# Least speedups asked for, forward, by chip and grid; elsewhere 0.9 of the FLOP ratio is the aim.
TARGETS = {
    "v6e": {"21x30x52": 5.7, "21x45x80": 6.2, "46x28x52": 12.0, "81x28x52": 21.5},
    "v5e": {"21x30x52": 5.2, "21x45x80": 5.6, "46x28x52": 11.0, "81x28x52": 20.0},
}
METHODS = {"VMonarch": vm.VMonarch(), "TiledMonarch": vm.TiledMonarch()}

INTRODUCTION = """\
# TPU kernels by static schedule

Made by `python -m benchmarks.tpu_schedule` with JAX {jax} and libtpu {libtpu}, which compile for a
TPU that is not there. **Nothing here has run on a TPU.** Figures are for one head of 128 in
bfloat16 and one TensorCore; `docs/tpu.md` says how to read them.

A kernel costs the larger of its cycles and of the time that its bytes take
(`max(cycles, bytes / bandwidth)`); a call costs its kernels one after another, and the bytes that
XLA's operations around them move. The branch for extreme scores is left out: ordinary inputs never
take it. What dense attention costs is the least over the recorded blocks of JAX's splash attention
and of tokamax's, counted in the same way, with padding as work and its mask for free.
"""


TOKEN_MAJOR = """\
`token-major` starts from `[batch, seq, heads, head_dim]` arrays in memory and so pays for four
transpositions; inside a model XLA folds them into the projections.
"""

KERNELS = """\
One kernel over its whole grid. `step`: cycles of a grid step. `matmul`: share of the matmul slots
that are used, which is also the share of the floor that the same products would take. `spills`:
stores of a step that make room in registers. `MB`: moved between HBM and VMEM, each re-read
counted. `cost`: the larger of cycles and bytes / bandwidth, in cycles.
"""

DENSE = """\
Cycles for 2^20 pairs of query and key at 32,768 tokens, by blocks: rows of queries / keys in VMEM /
keys a product.
"""


def write(record: dict[str, Any]) -> None:
    """Writes the page."""
    versions = {"jax": "?", "libtpu": "?"} | record.get("versions", {})
    parts = [INTRODUCTION.format(**versions)]
    parts += ["## Speedup over dense attention, forward\n", speedups(record, "VMonarch", "forward")]
    parts += [
        TOKEN_MAJOR,
        "## Forward and backward\n",
        speedups(record, "VMonarch", "forward + backward"),
        "## Tiled Monarch (MonarchRT), forward\n",
        speedups(record, "TiledMonarch", "forward"),
        "## Tiled Monarch, forward and backward\n",
        speedups(record, "TiledMonarch", "forward + backward"),
        "## What a call consists of\n",
        "Cycles of one head; `around` is what XLA does between the kernels.\n",
        contents(record),
        "## Kernels\n",
        KERNELS,
        *kernels(record),
        "## Dense attention\n",
        DENSE,
        baselines(),
    ]
    REPORT.write_text("\n".join(parts).rstrip() + "\n")


def dense(
    chip: Chip, grid: str, gradients: bool, libraries: tuple[str, ...] = ("splash", "tokamax")
) -> tuple[str, float] | None:
    """The fastest dense attention recorded, and its cycles."""
    tokens = math.prod(int(n) for n in grid.split("x"))
    found = []
    for library in libraries:
        forward = splash.best(chip, f"{library} forward", tokens)
        if forward is None:
            continue
        total = forward[1].bound
        if gradients:
            ways = [splash.best(chip, f"{library} {kind}", tokens) for kind in ("fused", "unfused")]
            costs = [way[1].bound for way in ways if way is not None]
            if not costs:
                continue
            total += min(costs)
        found.append((library, total))
    return min(found, key=lambda pair: pair[1], default=None)


def speedups(record: dict[str, Any], method: str, passes: str) -> str:
    """One row a chip and grid."""
    header = [
        "chip", "grid", "dense, cycles", "by", f"{method}, cycles", "speedup", "FLOP ratio",
        "of it", "asked", "vs splash",
    ]  # fmt: skip
    tokens = passes == "forward" and method == "VMonarch"
    if tokens:
        header.append("token-major")
    rows = []
    for chip in CHIPS.values():
        entries = record.get("calls", {}).get(chip.name, {})
        for grid in SHAPES:
            entry = entries.get(f"{method} {grid} {passes}")
            other = dense(chip, grid, passes != "forward")
            if entry is None or other is None:
                continue
            ideal = flop_ratio(method, grid)
            speedup = other[1] / entry["cycles"]
            row = [chip.name, grid, f"{other[1]:,.0f}", other[0], f"{entry['cycles']:,}"]
            row += [f"{speedup:.2f}x", f"{ideal:.2f}", f"{speedup / ideal:.2f}"]
            row.append(asked(method, passes, chip.name, grid, ideal))
            jax_splash = dense(chip, grid, passes != "forward", ("splash",))
            row.append(f"{jax_splash[1] / entry['cycles']:.2f}x" if jax_splash else "")
            if tokens:
                major = entries.get(f"{method} {grid} forward, token-major")
                row.append(f"{other[1] / major['cycles']:.2f}x" if major else "")
            rows.append(row)
    return table(header, rows, left=2) + "\n"


def flop_ratio(method: str, grid: str) -> float:
    """Matmul FLOPs of dense attention over those of a method."""
    shape = tuple(int(n) for n in grid.split("x"))
    return vm.flops.attention(vm.Dense(), shape) / vm.flops.attention(METHODS[method], shape)


def asked(method: str, passes: str, chip: str, grid: str, ideal: float) -> str:
    """The speedup aimed at."""
    if method == "TiledMonarch":
        return "2x"
    if passes != "forward":
        return f"{0.8 * ideal:.1f}x"
    return f"{TARGETS.get(chip, {}).get(grid, 0.9 * ideal):.1f}x"


def contents(record: dict[str, Any]) -> str:
    """The kernels of every recorded call."""
    rows = []
    for chip in CHIPS.values():
        for name, entry in sorted(record.get("calls", {}).get(chip.name, {}).items()):
            pieces = [f"{kernel['kernel']} {kernel['bound']:,}" for kernel in entry["kernels"]]
            around = entry["around"] / chip.bytes_per_cycle
            rows.append([chip.name, name, ", ".join(pieces), f"{around:,.0f}"])
    return table(["chip", "call", "kernels", "around"], rows, left=3) + "\n"


def kernels(record: dict[str, Any]) -> Iterator[str]:
    """A table a chip."""
    header = [
        "kernel", "case", "blocks", "bounded by", "step", "cycles", "matmul", "spills",
        "VMEM MiB", "MB", "cost",
    ]  # fmt: skip
    for chip in CHIPS:
        rows = []
        for name, entry in sorted(record.get("kernels", {}).get(chip, {}).items()):
            kernel, case = name.split(" ", 1)
            blocks = " ".join(f"{key} {size}" for key, size in sorted(entry["blocks"].items()))
            row = [kernel, case.removeprefix("bfloat16 "), blocks, entry["why"]]
            row += [f"{entry['step']:,}", f"{entry['cycles']:,}", f"{entry['busy']['matmul']:.0%}"]
            row += [f"{entry['spills']:,}", f"{entry['vmem'] / 2**20:.1f}"]
            row += [f"{entry['moved'] / 1e6:.1f}", f"{entry['bound']:,}"]
            rows.append(row)
        if rows:
            yield f"### {chip}\n"
            yield table(header, rows, left=4) + "\n"


def baselines() -> str:
    """The best blocks found for each kind of dense attention."""
    rows = []
    for chip, kinds in splash.record().items():
        for kind, tried in kinds.items():
            entry = next((e for e in tried if "counts" in e), None)
            if entry:
                blocks = "/".join(str(entry["blocks"][name]) for name in ("q", "kv", "compute"))
                matmul = ", ".join(f"{c['matmul']:.0%}" for c in entry["counts"])
                rows.append([chip, kind, blocks, f"{entry['pairs']:,}", matmul])
    return table(["chip", "kernel", "blocks", "cycles", "matmul"], rows, left=3) + "\n"


if __name__ == "__main__":
    write(json.loads(REPORT.with_suffix(".json").read_text()))
