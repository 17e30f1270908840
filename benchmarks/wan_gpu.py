"""The Wan transformer on GPUs: what compilers say of it without one, and how fast it is on one.

    python -m benchmarks.wan_gpu                       # compiles what the record lacks; an hour
    python -m benchmarks.wan_gpu --only "1.3B 480p h100 x1"
    python -m benchmarks.wan_gpu --only "..." --check  # compiles and judges, writes nothing
    python -m benchmarks.wan_gpu --report              # only the table, from the record
    python -m benchmarks.wan_gpu --run                 # on a GPU: checks, then times; minutes

All but the last need the CUDA packages of JAX (`pip install -e .[gpu]`), not a GPU. A case is one
call of the transformer, or one step of tuning, at full size without weights. It must hold the
kernels that were named, none of ours may spill, and on one H100 nothing of the size of q, or of a
kernel of all layers, may be transposed. Writes `results/wan_gpu.json`, each figure as it comes, and
`results/wan_gpu.md`.
"""

import dataclasses
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from . import one_by_one
from .cases import table
from .wan_steps import SIZES

RECORD = Path(__file__).parent / "results" / "wan_gpu.json"
ROUTES = {
    "pallas_gpu": ("pallas_gpu", "cudnn", "xla"),
    "cudnn": ("cudnn", "xla"),
    "xla": ("xla",),
}
# Calls of cuDNN forward and backward and of our kernels on an H100, one layer of the scan; text
# attention is one of them. In tuning, the backward pass makes the layer once more.
CALLS = {
    ("step", "pallas_gpu", "vmonarch"): (0, 0, 6),
    ("step", "pallas_gpu", "dense"): (0, 0, 2),
    ("step", "cudnn", "vmonarch"): (5, 0, 2),
    ("step", "cudnn", "dense"): (2, 0, 0),
    ("tuning", "pallas_gpu", "vmonarch"): (0, 3, 15),
    ("tuning", "cudnn", "vmonarch"): (10, 5, 6),
    ("tuning", "cudnn", "dense"): (4, 2, 0),
}
BYTES = ("weights", "inputs", "outputs", "temporaries")


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        part: "1.3B" or "14B".
        size: of the video.
        device: kind of GPU.
        count: how many; one mesh axis `context` is as long.
        route: the first of the implementations, a key of `ROUTES`.
        attention: "dense" or "vmonarch".
        batch: videos in one call; batched guidance has 2, guidance in two calls 1.
        kind: "step", a call of the transformer, or "tuning", a step of LoRA.
    """

    part: str
    size: str
    device: str
    count: int
    route: str
    attention: str
    batch: int = 1
    kind: str = "step"

    @property
    def name(self) -> str:
        """In the record."""
        words = f"{self.part} {self.size} {self.device} x{self.count} {self.route}"
        return f"{words} {self.attention} batch {self.batch} {self.kind}"


def cases() -> list[Case]:
    """All of them, the most telling first."""
    ours, cudnn, dense = ("pallas_gpu", "vmonarch"), ("cudnn", "vmonarch"), ("cudnn", "dense")
    slow = [("xla", "vmonarch"), ("xla", "dense")]
    small, large = ("1.3B", "480p"), ("14B", "720p")
    others = [("14B", "480p"), ("1.3B", "720p")]
    places = [
        *((*small, "h100", 1, *how, 2) for how in (ours, cudnn, dense)),
        *((*large, "h100", 1, *how, 2) for how in (ours, cudnn, dense)),
        *((*small, "h100", 1, *how, 1, "tuning") for how in (cudnn, ours)),
        (*large, "h100", 8, *ours, 2),
        (*small, "h100", 2, *ours, 2),
        (*small, "a100", 1, *cudnn, 2),
        *((*model, "h100", 1, *ours, 1) for model in (small, large, *others)),
        *((*model, "h100", 1, *how, 2) for model in others for how in (ours, cudnn, dense)),
        *((*small, "h100", 1, *how, 2) for how in (("pallas_gpu", "dense"), *slow)),
        (*small, "h100", 1, *dense, 1, "tuning"),
        ("14B", "480p", "h100", 1, *ours, 1, "tuning"),
        *((*large, "h100", 8, *how, 2) for how in (cudnn, dense)),
        (*large, "h100", 4, *ours, 2),
        *((*large, "h100", 1, *how, 2) for how in (("pallas_gpu", "dense"), *slow)),
        (*small, "a100", 1, *dense, 2),
    ]
    return [Case(*place) for place in places]


def main(arguments: list[str] | None = None) -> int:
    """One process a case, one after another; 1 if something is wrong."""
    flags = one_by_one.flags(__doc__)
    flags.add_argument("--check", action="store_true", help="compile and judge, write nothing")
    flags.add_argument("--run", action="store_true", help="on a GPU: check and time")
    args = flags.parse_args(arguments)
    if args.run:
        from . import wan_gpu_run

        return wan_gpu_run.main()
    if args.worker:
        return work(next(case for case in cases() if case.name == args.worker), not args.check)
    known = {} if args.check else record().get("cases", {})
    more = ["--check"] * args.check
    failed = one_by_one.run_each("benchmarks.wan_gpu", args, cases(), known, more)
    if not args.check:
        report()
    if failed:
        print(f"failed: {', '.join(failed)}")
    return min(len(failed), 1)


def work(case: Case, write: bool) -> int:
    """Compiles one case, says what is wrong with it, and records what it takes."""
    start = time.monotonic()
    entry = measure(case)
    problems = wrong(case, entry)
    seconds = round(time.monotonic() - start)
    if write:
        packages = {"jax": "jax", "cuDNN": "nvidia-cudnn-cu13"}
        one_by_one.keep(RECORD, case, entry, packages)
    verdict = "FAILED: " + "; ".join(problems) if problems else "passed"
    print(f"{case.name}: {verdict}. {total(entry) / 2**30:.2f} GiB ({seconds} s)", flush=True)
    return min(len(problems), 1)


def measure(case: Case) -> dict[str, Any]:
    """Bytes of one device, calls of kernels, spills of ours, transposes, and what XLA moves."""
    from .gpu_target import Compiler

    compiler = Compiler(case.device, case.count)  # before JAX starts
    from vmonarch_jax.models.wan import collectives, presets
    from vmonarch_jax.models.wan.sharding import Sharding, make_mesh

    import vmonarch_jax as vm

    from . import gpu_gates, wan_steps

    sharding = Sharding(make_mesh(context=case.count, devices=compiler.devices))
    make = wan_steps.tuning if case.kind == "tuning" else wan_steps.denoising
    step = make(case.part, SIZES[case.size], case.batch, case.attention, sharding)
    with vm.default_implementation(ROUTES[case.route]):
        compiled = compiler(step.function, step.params, *step.inputs, donate=case.kind == "tuning")
    memory = compiled.memory
    ours = [kernel for kernel in compiler.kernels(compiled) if "mosaic_gpu" in kernel.name]
    # Of q, whose tokens are patches of 1 x 2 x 2 latents, or of a kernel of all layers.
    sizes = presets.MODELS[wan_steps.MODELS[case.part]].transformer
    q = math.prod(step.inputs[0].shape[:-1]) // 4 * sizes.dim
    large = min(q, sizes.layers * sizes.dim**2) // case.count
    odd = collectives.unannounced(
        compiled.hlo, sharding, training=case.kind == "tuning", unsplit=step.unsplit
    )
    return {
        "weights": step.weights,
        "inputs": memory.argument_size_in_bytes - step.weights,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "calls": gpu_gates.counted(compiled),
        "spills": sum(kernel.spills for kernel in ours),
        "transposes": transposes(compiled.hlo, large),
        "moved": gpu_gates.around(compiled),
        "unannounced": [dataclasses.asdict(x) for x in odd] if case.count > 1 else [],
    }


def transposes(hlo: str, elements: int) -> list[str]:
    """Transposes of arrays of so many elements or more, alone or inside a fusion."""
    found = []
    for shape, order in re.findall(
        r"= (\w+\[[\d,]+\])\S* transpose\([^)]*\), dimensions=\{([\d,]+)\}", hlo
    ):
        sizes = [int(n) for n in re.findall(r"\d+", shape.partition("[")[2])]
        # Axes of length 1 may go anywhere for nothing.
        moved = [int(n) for n, size in zip(order.split(","), sizes, strict=True) if size > 1]
        if math.prod(sizes) >= elements and moved != sorted(moved):
            found.append(f"{shape} of {order}")
    return found


def wrong(case: Case, entry: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    problems = []
    expected = CALLS.get((case.kind, case.route, case.attention), (0, 0, 0))
    if case.device != "h100":
        expected = (*expected[:2], 0)
    if tuple(entry["calls"]) != expected:
        problems.append(
            f"expected {expected} calls (cuDNN, its backward, ours), got {tuple(entry['calls'])}"
        )
    if entry["spills"]:
        problems.append(f"our kernels spill {entry['spills']} bytes")
    # An A100 has no kernel of ours for the L steps, and XLA's transpose.
    on_one = case.device == "h100" and case.count == 1
    if case.route != "xla" and on_one and entry["transposes"]:
        problems.append(f"transposes {entry['transposes']}")
    if entry["unannounced"]:
        problems.append(f"collectives that no rule announces: {entry['unannounced']}")
    return problems


def total(entry: dict[str, Any]) -> int:
    """Bytes of one device in all."""
    return sum(entry[part] for part in BYTES)


def record() -> dict[str, Any]:
    """What is recorded: versions, and the entries by name."""
    return one_by_one.read(RECORD)


def report() -> None:
    """Writes the table."""
    known, rows = record(), []
    for name in sorted({case.name for case in cases()} & known.get("cases", {}).keys()):
        e = known["cases"][name]
        place = f"{e['count']} {e['device'].upper()}"
        what = e["kind"] if e["kind"] == "tuning" else f"batch {e['batch']}"
        cells = [f"{e['part']}, {e['size']}", what, place, e["attention"], e["route"]]
        gib = [f"{e[part] / 2**30:.2f}" for part in ("weights", "temporaries")]
        cells += [*gib, f"{total(e) / 2**30:.2f}", " + ".join(map(str, e["calls"]))]
        rows.append([*cells, f"{e['moved'] / 1e9:.0f}"])
    head = ["model, video", "step", "devices", "attention", "route", "weights", "temporaries"]
    head += ["in all", "calls", "XLA moves, GB"]
    text = _PAGE.format(**known.get("versions", {}), table=table(head, rows, left=5))
    RECORD.with_suffix(".md").write_text(text)


_PAGE = """# The Wan transformer, compiled for GPUs

Made by `python -m benchmarks.wan_gpu` with JAX {jax} and cuDNN {cuDNN}, which compile for a GPU
that is not there. **Nothing here has run on a GPU.** GiB a device; the compiler has 79.1 GiB of an
H100.

A step is one call of the transformer: 81 frames of 832x480 (480p: 32,760 tokens) or of 1280x720
(720p: 75,600), weights and products in bfloat16. Guidance in one call has batch 2, in two calls
batch 1. "tuning" is a step of `vmonarch finetune` with its defaults: LoRA, one video, each layer
made again in the backward pass. Several devices share the tokens (`context`).
Routes: "pallas_gpu" is ("pallas_gpu", "cudnn", "xla"), "cudnn" is ("cudnn", "xla"). Calls: of
cuDNN forward, of cuDNN backward, and of kernels of this library, in one layer, which the program
holds once. What XLA moves is all that its own operations read and write, matrix products with it.
On one H100 no operation transposes an array of the size of q or a kernel of all layers, but under
"xla"; no kernel of this library spills.

{table}
"""


if __name__ == "__main__":
    sys.exit(main())
