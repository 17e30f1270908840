"""Memory of full-size Wan steps on TPUs, by the real compiler without a TPU.

    python -m benchmarks.wan_memory                       # all that the record lacks; hours
    python -m benchmarks.wan_memory --only "1.3B 480p v5e x1"
    python -m benchmarks.wan_memory --report              # only the table, from the record

Needs libtpu (`pip install -e .[aot]`), not a TPU. Writes `wan_memory.json`, each figure as it
comes, and the tables in `wan_memory.md` and `docs/wan.md`. A case is one call of a transformer, an
encoder or a decoder, or one step of tuning.
"""

import collections
import dataclasses
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import one_by_one, wan_memory_report
from .wan_steps import SIZES

RECORD = Path(__file__).with_name("wan_memory.json")
# The autoencoders of Wan2.1 and Wan2.2.
PICTURES = ("decoder-2.1", "encoder-2.1", "decoder-2.2", "encoder-2.2")
# Devices of a chip: JAX sees the two cores of a 7x as two devices, each with half of the memory.
CORES = {"v5e": 1, "v6e": 1, "7x": 2}
# GiB that the compiler has of each device.
HBM = {"v5e": 15.75, "v6e": 31.24, "7x": 94.74}
TOPOLOGIES = {
    "v5e": {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4"},
    "v6e": {4: "v6e:2x2", 8: "v6e:2x4", 16: "v6e:4x4"},
    "7x": {4: "tpu7x:2x2x1", 8: "tpu7x:2x2x2", 16: "tpu7x:2x2x4"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        part: "1.3B" or "14B", a transformer; "text", the text encoder; of `PICTURES`: one direction
            of an autoencoder.
        size: of the video.
        chip: kind of chip.
        chips: how many.
        attention: "dense", "vmonarch", "tiled", or "salad" with a linear branch in every layer.
        batch: videos in one call; batched guidance has 2, guidance in two calls 1.
        mesh: sizes of axes above 1.
        tuned: "lora" or "full": a step of `vmonarch finetune`, not a call.
    """

    part: str
    size: str
    chip: str
    chips: int
    attention: str = ""
    batch: int = 1
    mesh: tuple[tuple[str, int], ...] = ()
    tuned: str = ""

    @property
    def name(self) -> str:
        """In the record."""
        mesh = " ".join(f"{axis}={n}" for axis, n in self.mesh)
        words = f"{self.part} {self.size} {self.chip} x{self.chips} {self.attention}"
        return " ".join(f"{words} {self.tuned} batch {self.batch} {mesh}".split())


def cases() -> list[Case]:
    """All of them, the most telling first."""
    # Part, size, chip, chips, batch and the sizes of mesh axes above 1.
    places = (
        ("1.3B", "480p", "v5e", 1, 1, {}),
        ("1.3B", "480p", "v5e", 1, 2, {}),
        ("14B", "480p", "v5e", 4, 1, {"context": 4}),
        ("14B", "720p", "v5e", 4, 1, {"context": 4}),
        ("14B", "720p", "v5e", 8, 2, {"fsdp": 2, "context": 4}),
        ("14B", "720p", "v5e", 16, 2, {"fsdp": 2, "context": 8}),
        ("14B", "720p", "v6e", 4, 2, {"context": 4}),
        ("14B", "720p", "7x", 1, 2, {"context": 2}),
        ("1.3B", "720p", "v5e", 1, 2, {}),
        ("14B", "480p", "v6e", 1, 1, {}),
        ("14B", "480p", "v6e", 4, 2, {"context": 4}),
        ("1.3B", "480p", "v5e", 4, 2, {"context": 4}),
        ("14B", "480p", "v5e", 4, 2, {"context": 4}),
        ("14B", "480p", "v5e", 8, 2, {"fsdp": 2, "context": 4}),
        ("14B", "480p", "v5e", 16, 2, {"fsdp": 2, "context": 8}),
        ("1.3B", "480p", "v6e", 1, 2, {}),
        ("1.3B", "480p", "7x", 1, 2, {"context": 2}),
        ("1.3B", "720p", "v5e", 4, 2, {"context": 4}),
        ("1.3B", "720p", "v6e", 1, 2, {}),
        ("1.3B", "720p", "7x", 1, 2, {"context": 2}),
        ("14B", "480p", "7x", 1, 2, {"context": 2}),
        ("14B", "720p", "v6e", 8, 2, {"fsdp": 2, "context": 4}),
        ("14B", "720p", "v6e", 16, 2, {"fsdp": 2, "context": 8}),
        ("14B", "720p", "7x", 4, 2, {"fsdp": 2, "context": 4}),
        ("14B", "720p", "7x", 8, 2, {"fsdp": 2, "context": 8}),
        ("1.3B", "480p", "v5e", 8, 2, {"fsdp": 2, "context": 4}),
        ("1.3B", "480p", "v5e", 16, 4, {"fsdp": 4, "context": 4}),
        ("1.3B", "480p", "v6e", 4, 2, {"context": 4}),
        ("1.3B", "480p", "v6e", 8, 2, {"fsdp": 2, "context": 4}),
        ("1.3B", "480p", "v6e", 16, 4, {"fsdp": 4, "context": 4}),
        ("1.3B", "480p", "7x", 4, 2, {"fsdp": 2, "context": 4}),
        ("1.3B", "480p", "7x", 8, 4, {"fsdp": 4, "context": 4}),
        ("1.3B", "480p", "7x", 16, 8, {"fsdp": 8, "context": 4}),
        ("1.3B", "720p", "v5e", 8, 2, {"fsdp": 2, "context": 4}),
        ("1.3B", "720p", "v5e", 16, 4, {"fsdp": 4, "context": 4}),
        ("1.3B", "720p", "v6e", 4, 2, {"context": 4}),
        ("1.3B", "720p", "v6e", 8, 2, {"fsdp": 2, "context": 4}),
        ("1.3B", "720p", "v6e", 16, 4, {"fsdp": 4, "context": 4}),
        ("1.3B", "720p", "7x", 4, 2, {"fsdp": 2, "context": 4}),
        ("1.3B", "720p", "7x", 8, 4, {"fsdp": 4, "context": 4}),
        ("1.3B", "720p", "7x", 16, 8, {"fsdp": 8, "context": 4}),
        ("14B", "480p", "v6e", 8, 2, {"fsdp": 2, "context": 4}),
        ("14B", "480p", "v6e", 16, 2, {"fsdp": 2, "context": 8}),
        ("14B", "480p", "7x", 4, 2, {"fsdp": 2, "context": 4}),
        ("14B", "480p", "7x", 8, 2, {"fsdp": 2, "context": 8}),
        ("14B", "480p", "7x", 16, 4, {"fsdp": 4, "context": 8}),
        ("14B", "720p", "v6e", 1, 1, {}),
        ("14B", "720p", "7x", 16, 4, {"fsdp": 4, "context": 8}),
    )
    others = [
        Case("text", "512", "v5e", 1, batch=2),
        *(
            Case(part, size, "v5e", 1)
            for part in PICTURES
            for size in ("480p", "720p" if part.endswith("2.1") else "704p")
        ),
        *(Case(part, "720p", "v5e", 4, mesh=(("context", 4),)) for part in PICTURES[:2]),
        *(Case(part, "704p", "v5e", 4, mesh=(("context", 4),)) for part in PICTURES[2:]),
    ]
    steps = [
        Case(part, size, chip, chips, attention, batch, tuple(mesh.items()))
        for part, size, chip, chips, batch, mesh in places
        for attention in ("vmonarch", "dense")
    ]
    more = [
        Case("1.3B", "480p", "v5e", 1, attention, n)
        for attention in ("tiled", "salad")
        for n in (1, 2)
    ]
    return [*steps, *more, *others, *tuning_cases()]


def tuning_cases() -> list[Case]:
    """Steps of tuning at 480p; the batch is that of one part, whatever is accumulated."""
    # Model, what is tuned, chip, chips, batch, mesh, methods.
    ours, both = ("vmonarch",), ("vmonarch", "dense")
    places = (
        ("1.3B", "lora", "v5e", 1, 1, {}, (*both, "salad")),
        ("1.3B", "lora", "v5e", 1, 2, {}, ours),
        ("1.3B", "lora", "v5e", 4, 1, {"context": 4}, ours),
        ("1.3B", "lora", "v5e", 8, 2, {"fsdp": 2, "context": 4}, ours),
        ("1.3B", "lora", "v6e", 1, 1, {}, ours),
        ("1.3B", "lora", "7x", 1, 1, {"context": 2}, ours),
        ("1.3B", "full", "v6e", 1, 1, {}, ours),
        ("1.3B", "full", "v5e", 4, 1, {"context": 4}, ours),
        ("14B", "lora", "v5e", 4, 1, {"context": 4}, ours),
        ("14B", "lora", "v5e", 8, 1, {"context": 8}, ours),
        ("14B", "lora", "v6e", 4, 1, {"context": 4}, ours),
        ("14B", "lora", "v6e", 8, 2, {"fsdp": 2, "context": 4}, both),
        ("14B", "lora", "v6e", 16, 4, {"fsdp": 4, "context": 4}, ours),
        ("14B", "full", "v6e", 16, 2, {"fsdp": 2, "context": 8}, ours),
    )
    return [
        Case(part, "480p", chip, chips, attention, batch, tuple(mesh.items()), tuned)
        for part, tuned, chip, chips, batch, mesh, methods in places
        for attention in methods
    ]


def main(arguments: list[str] | None = None) -> None:
    """One process a case, one after another."""
    args = one_by_one.flags(__doc__).parse_args(arguments)
    if args.worker:
        work(next(case for case in cases() if case.name == args.worker))
        sys.stdout.flush()
        os._exit(0)  # the compiler may still be at work
    known = record().get("cases", {})
    failed = one_by_one.run_each("benchmarks.wan_memory", args, cases(), known, after=report)
    report()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def work(case: Case) -> None:
    """Compiles one case and records what it takes, or how much too much."""
    start = time.monotonic()
    entry = measure(case)
    entry["seconds"] = round(time.monotonic() - start)
    one_by_one.keep(RECORD, case, entry, {"jax": "jax", "libtpu": "libtpu"})
    size = wan_memory_report.total(entry) / 2**30
    print(f"{case.name}: {size:.2f} GiB ({entry['seconds']} s)", flush=True)


def measure(case: Case) -> dict[str, Any]:
    """Bytes of one device: weights, inputs, outputs, temporaries; and the collectives."""
    dump = tempfile.TemporaryDirectory(prefix="hlo-")
    flags = f"--xla_dump_to={dump.name} --xla_dump_hlo_module_re=jit_function"
    os.environ.update(
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags} --xla_dump_hlo_as_text",
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v6e-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    import jax
    from jax.experimental import topologies
    from vmonarch_jax.models.wan import collectives
    from vmonarch_jax.models.wan.sharding import Sharding, make_mesh
    from vmonarch_jax.pallas_kernels.tpu.chips import tracing_for

    from . import buffers, wan_steps

    jax.config.update("jax_platforms", "cpu")
    by_chips = TOPOLOGIES[case.chip]
    name = by_chips[max(case.chips, min(by_chips))]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    devices = devices[: case.chips * CORES[case.chip] if case.part != "text" else 1]
    sharding = Sharding(make_mesh(**dict(case.mesh), devices=devices))
    video = SIZES.get(case.size)
    if case.part == "text":
        step = wan_steps.text(case.batch, sharding)
    elif case.part in PICTURES:
        direction, version = case.part.split("-")
        step = wan_steps.autoencoding(version, direction == "encoder", video, sharding)
    elif case.tuned:
        step = wan_steps.tuning(case.part, video, case.batch, case.attention, sharding, case.tuned)
    else:
        step = wan_steps.denoising(case.part, video, case.batch, case.attention, sharding)
    with tracing_for(case.chip):
        function = jax.jit(step.function, donate_argnums=0 if case.tuned else ())
        lowered = function.trace(step.params, *step.inputs).lower()
    try:
        # code for a training step, an autoencoder or many chips takes the compiler minutes, and
        # changes none of the sizes
        short = bool(case.tuned or case.part in PICTURES or case.mesh)
        placed = buffers.place(lowered, Path(dump.name)) if short else lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        needs = re.search(r"required for .* \(([\d.]+)G\) exceeds available HBM", message)
        needs = needs or re.search(r"Used ([\d.]+)G of [\d.]+G hbm", message)
        if not needs:
            raise
        return {
            "fits": False, "weights": step.weights, "needs": float(needs[1]), "error": message,
        }  # fmt: skip
    if short:
        sizes, hlo = placed
    else:
        sizes, hlo = _compiled(placed, Path(dump.name))
    kinds = collections.Counter(
        f"{c.kind} {' '.join(c.axes)}" for c in collectives.collectives(hlo, sharding.mesh)
    )
    odd = collectives.unannounced(
        hlo, sharding, bool(case.tuned), step.unsplit, allowed=step.announced
    )
    needs = sum(sizes.values()) / 2**30
    fits = needs <= HBM[case.chip]  # code is refused what buffers are not
    return {
        "fits": fits,
        **({} if fits else {"needs": needs}),
        "weights": step.weights,
        "inputs": sizes["parameters"] - step.weights,
        "outputs": sizes["outputs"],
        "temporaries": sizes["temporaries"],
        "collectives": dict(kinds),
        "unannounced": [dataclasses.asdict(c) for c in odd],
        "kernels": hlo.count('custom_call_target="tpu_custom_call"'),
    }


def _compiled(compiled: Any, dump: Path) -> tuple[dict[str, int], str]:
    """Bytes of one device, and the program."""
    import jax

    memory = compiled.memory_analysis()
    try:
        hlo = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:  # this JAX is too old to read what this libtpu made
        (path,) = dump.glob("*.jit_function.*after_optimizations.txt")
        hlo = path.read_text()
    sizes = {
        "parameters": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return sizes, hlo


def record() -> dict[str, Any]:
    """What is recorded: versions, and the entries by name."""
    return one_by_one.read(RECORD)


def report() -> None:
    """Writes the tables."""
    known = record()
    found = known.get("cases", {})
    entries = [found[case.name] for case in cases() if case.name in found]
    wan_memory_report.write(RECORD.with_suffix(".md"), entries, known.get("versions", {}))


if __name__ == "__main__":
    main()
