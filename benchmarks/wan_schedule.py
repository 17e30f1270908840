"""What a block of the full-size Wan transformer costs on a TPU, by the compiler without a TPU.

    python -m benchmarks.wan_schedule                       # all that the record lacks
    python -m benchmarks.wan_schedule --only "1.3B v6e"
    python -m benchmarks.wan_schedule --report              # only the table, from the record

Needs libtpu (`pip install -e .[aot]`), not a TPU. Writes `wan_schedule.json` and `wan_schedule.md`.
"""

import collections
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS, Chip

import vmonarch_jax as vm

from . import hlo, one_by_one, schedules
from .aot import Compiled, Compiler
from .wan_steps import METHODS, MODELS, SIZES, denoising

RECORD = Path(__file__).with_name("wan_schedule.json")
REPORT = RECORD.with_suffix(".md")
SHAPES = {"1.3B": vm.flops.WAN_1_3B, "14B": vm.flops.WAN_14B}
# Of one TensorCore in bfloat16: rows and columns of its matrix units, times two.
FLOPS_A_CYCLE = {"v5e": 2**17, "v6e": 2**19, "7x": 2**19}
# A number that no loop inside a block has: what turns that often is the loop over the layers.
LAYERS = 7
KINDS = {
    "projections": "products to q, k, v and back, of self-attention",
    "feed-forward": "its two products",
    "self-attention": "its kernels",
    "cross-attention": "its products and its kernel",
    "passes": "norms, rotation, gates and what a method does between its kernels",
    "copies": "copies, transpositions, slices, fills",
}
MATMULS = ("projections", "feed-forward", "self-attention", "cross-attention")
COPIES = ("copy", "transpose", "slice", "broadcast", "concatenate", "pad", "reshape")

INTRODUCTION = """\
# What a block of the Wan transformer costs on a TPU

Made by `python -m benchmarks.wan_schedule` with JAX {jax} and libtpu {libtpu}, which compile for a
TPU that is not there. **Nothing here has run on a TPU.** One video of 81 frames, all of it on one
TensorCore (a chip of 7x has two), weights and products in bfloat16.

The forward pass is compiled at full size, and what one turn of the loop over its layers runs is
added up, one operation after another. A Pallas kernel costs the larger of its static cycles and of
the time that its bytes take, as in [tpu_schedule.md](tpu_schedule.md). Of what XLA runs, the
schedule of a loop does not say how often it turns; it costs the larger of the compiler's own
estimate (`estimated_cycles`, by which it chooses its tiles) and of bytes / bandwidth. That estimate
is no measurement; for large products it says 60 to 98% of the peak rate. Waits between operations
are not in it.

"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation: a model ("1.3B", "14B"), a video size, a chip, a method, videos a call."""

    model: str
    size: str
    chip: str
    attention: str
    batch: int = 1

    @property
    def name(self) -> str:
        """In the record."""
        return f"{self.model} {self.size} {self.chip} {self.attention} batch {self.batch}"


def cases() -> list[Case]:
    """All of them, the most telling first."""
    places = [("1.3B", "480p", chip) for chip in FLOPS_A_CYCLE] + [("14B", "720p", "v6e")]
    return [Case(*place, attention) for place in places for attention in ("vmonarch", "dense")]


def main(arguments: list[str] | None = None) -> None:
    """One process a case, one after another."""
    args = one_by_one.flags(__doc__).parse_args(arguments)
    if args.worker:
        work(next(case for case in cases() if case.name == args.worker))
        return
    known = record().get("cases", {})
    failed = one_by_one.run_each("benchmarks.wan_schedule", args, cases(), known)
    REPORT.write_text(report(record()))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def work(case: Case) -> None:
    """Compiles one case and records it."""
    compiler = Compiler(case.chip)
    entry = measure(compiled(compiler, case), compiler.chip)
    one_by_one.keep(RECORD, case, entry, {"jax": "jax", "libtpu": "libtpu"})
    print(f"{case.name}: {sum(entry['cycles'].values()):,} cycles", flush=True)


def compiled(compiler: Compiler, case: Case) -> Compiled:
    """The forward pass with few layers of full size."""
    import jax
    from vmonarch_jax.models.wan.sharding import Sharding, make_mesh
    from vmonarch_jax.pallas_kernels.tpu.mode import without_slow_path

    here = Sharding(make_mesh(devices=jax.devices()[:1]))  # the compiler puts it where it compiles
    size = SIZES[case.size]
    step = denoising(case.model, size, case.batch, case.attention, here, LAYERS)
    with without_slow_path():
        return compiler(step.function, step.params, *step.inputs)


def measure(result: Compiled, chip: Chip) -> dict[str, Any]:
    """Cycles of one block by kind, what is largest in it, and cycles outside the blocks."""
    text = result.estimated
    operations = hlo.operations(text)
    kernels = iter(schedules.kernels(dataclasses.replace(result, hlo=text), chip))
    estimates = {}
    for line in text.splitlines():
        found = re.match(r'\s+(?:ROOT )?%([\w.\-]+) = .*"estimated_cycles":"(\d+)"', line)
        if found:
            estimates[found[1]] = int(found[2]), "convolution_algorithm_config" in line
    cycles, once, parts = collections.Counter(), 0.0, []
    for op in operations:
        estimate, matmul = estimates.get(op.name, (0, False))
        if op.kind == "kernel":
            cost = next(kernels).bound
        else:
            cost = max(estimate, op.bytes / chip.bytes_per_cycle) * op.runs
        if op.runs % LAYERS:
            once += cost
            continue
        kind = kind_of(op, matmul)
        cycles[kind] += cost / LAYERS
        parts.append((round(cost / LAYERS), kind, op.name, op.shape, op.runs // LAYERS))
    return {
        "cycles": {kind: round(cycles[kind]) for kind in KINDS},
        "once": round(once),
        "largest": sorted(parts, reverse=True)[:24],
    }


def kind_of(op: hlo.Operation, matmul: bool) -> str:
    """Of `KINDS`; `matmul`: the operation holds a product."""
    if "rotation" in op.source:
        return "passes"
    if op.kind == "kernel" or matmul:
        if "cross_attention" in op.source:
            return "cross-attention"
        if op.kind == "kernel":
            return "self-attention"
        return "feed-forward" if "feed_forward" in op.source else "projections"
    copies = op.kind != "fusion" or any(word in op.name for word in COPIES)
    return "copies" if copies and "reduce" not in op.name else "passes"


def record() -> dict[str, Any]:
    """What is recorded: versions, and the entries by name."""
    return one_by_one.read(RECORD)


def seconds(entry: dict[str, Any]) -> float:
    """One forward pass of one video on one TensorCore, all layers."""
    layers = SHAPES[entry["model"]].layers
    cycles = sum(entry["cycles"].values()) * layers + entry["once"]
    return cycles / CHIPS[entry["chip"]].clock / entry["batch"]


def of_peak(entry: dict[str, Any]) -> float:
    """Share of the peak rate at which a block's matmul FLOPs are done."""
    from vmonarch_jax.models.wan import presets

    wan = presets.MODELS[MODELS[entry["model"]]]
    grid = wan.transformer.grid_of(*wan.vae.latent_size(*SIZES[entry["size"]]))
    shape = dataclasses.replace(SHAPES[entry["model"]], layers=1)
    flops = vm.flops.transformer(shape, METHODS[entry["attention"]], grid) * entry["batch"]
    return flops / (sum(entry["cycles"].values()) * FLOPS_A_CYCLE[entry["chip"]])


def report(known: dict[str, Any]) -> str:
    """The page."""
    versions = {"jax": "?", "libtpu": "?"} | known.get("versions", {})
    lines = [INTRODUCTION.format(**versions)]
    lines += [f"- {kind}: {what}\n" for kind, what in KINDS.items()]
    head = ["model", "size", "chip", "attention", *KINDS, "in all", "passes, copies"]
    head += ["of the peak", "s a forward"]
    lines += ["\nThousands of cycles of a block:\n\n", f"| {' | '.join(head)} |\n"]
    lines += [f"|{'---|' * 4}{'---:|' * (len(head) - 4)}\n"]
    for case in cases():
        entry = known.get("cases", {}).get(case.name)
        if entry is None:
            continue
        cycles = entry["cycles"]
        total = sum(cycles.values())
        rest = total - sum(cycles[kind] for kind in MATMULS)
        row = [case.model, case.size, case.chip, case.attention]
        row += [f"{cycles[kind] / 1e3:,.0f}" for kind in KINDS]
        row += [f"{total / 1e3:,.0f}", f"{rest / total:.0%}", f"{of_peak(entry):.0%}"]
        row += [f"{seconds(entry):.2f}"]
        lines += [f"| {' | '.join(row)} |\n"]
    return "".join(lines)


if __name__ == "__main__":
    main()
