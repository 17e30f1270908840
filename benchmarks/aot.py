"""Compiling for a TPU that is not there, and reading the schedule that the compiler made.

libtpu compiles without a device and dumps, for each Pallas kernel, one line a VLIW bundle: one
cycle of one grid step, with the units that it keeps busy. Waits for memory are not in it.
One process compiles for one kind of chip: call `start` before anything else touches JAX.
"""

import dataclasses
import glob
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

UNITS = (
    "matmul", "push", "xlu", "valu", "pop", "eup", "load", "fill", "store", "spill", "scalar"
)  # fmt: skip
# The passes that are read here: writing down what all of them do takes as long as compiling.
DUMPED = "original|packed-bundles-post-ra|pre-delay"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one grid step of a kernel does.

    Args:
        name: of the kernel.
        cycles: bundles of one grid step.
        used: slots used, by unit.
        slots: slots a cycle, by unit.
        vmem: bytes of VMEM allocated.
        branches: cycles of each part that only some grid steps run (`pl.when`), in order; they
            are in `cycles`, so a kernel that has any is counted once too often. The part that
            holds the whole step is not among them.
        loops: cycles of each loop's body inside the step; they are in `cycles` once.
        loop_used: slots used in the longest of these loops, by unit.
    """

    name: str
    cycles: int
    used: dict[str, int]
    slots: dict[str, int]
    vmem: int
    branches: tuple[int, ...] = ()
    loops: tuple[int, ...] = ()
    loop_used: dict[str, int] = dataclasses.field(default_factory=dict)

    def busy(self, unit: str) -> float:
        """Share of a unit's slots that are used."""
        return self.used[unit] / (self.slots[unit] * self.cycles)

    def turned(self, turns: int) -> "Schedule":
        """The same step with the longest loop inside it run `turns` times."""
        if turns == 1 or not self.loops:
            return self
        more = turns - 1
        used = {unit: n + more * self.loop_used[unit] for unit, n in self.used.items()}
        return dataclasses.replace(self, cycles=self.cycles + more * max(self.loops), used=used)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its kernels, its HLO text and its memory.

    `estimated` is the program once more, with what the compiler thinks that each operation costs.
    """

    kernels: tuple[Schedule, ...]
    launches: tuple[Any, ...]
    hlo: str
    memory: Any
    estimated: str


class Compiler:
    """Compiles functions for one TensorCore of a chip."""

    def __init__(self, chip: str) -> None:
        """Sets the process up; raises RuntimeError if libtpu was already initialised."""
        from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS

        self.chip = CHIPS[chip]
        self._dump = tempfile.TemporaryDirectory(prefix="llo-")
        self._hlo = tempfile.TemporaryDirectory(prefix="hlo-")
        flags = f"--xla_dump_to={self._hlo.name} --xla_dump_hlo_module_re=jit_fresh"
        os.environ.update(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE="v6e-4",
            TPU_WORKER_HOSTNAMES="localhost",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={self._dump.name} --xla_jf_dump_llo_text=true"
            f" --xla_jf_dump_llo_pass_label_regex={DUMPED}",
            XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags} --xla_dump_hlo_as_text",
        )
        import jax
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        jax.config.update("jax_platforms", "cpu")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=self.chip.topology)
        self.devices = topology.devices
        self._sharding = SingleDeviceSharding(topology.devices[0])

    def __call__(self, function: Any, *arguments: Any) -> Compiled:
        """Compile `function` for arguments given as `ShapeDtypeStruct`s (or arrays, or trees)."""
        import jax
        from vmonarch_jax.pallas_kernels.tpu.call import recording
        from vmonarch_jax.pallas_kernels.tpu.chips import tracing_for

        for folder in (self._dump.name, self._hlo.name):
            shutil.rmtree(folder)
            os.mkdir(folder)

        def placed(x: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding)

        # A fresh function: JAX would otherwise hand back what it traced for another chip.
        def fresh(*arguments: Any) -> Any:
            return function(*arguments)

        with tracing_for(self.chip.name), recording() as launches:
            traced = jax.jit(fresh).trace(*jax.tree.map(placed, arguments))
        compiled = traced.lower().compile()
        return Compiled(
            tuple(self._schedules()),
            tuple(launches),
            self._text(compiled),
            compiled.memory_analysis(),
            self._dumped("after_codegen"),
        )

    def _text(self, compiled: Any) -> str:
        """The compiled program; as libtpu wrote it where JAX is too old to read it."""
        import jax

        try:
            return compiled.as_text() or ""
        except jax.errors.JaxRuntimeError:
            return self._dumped("after_optimizations")

    def _dumped(self, stage: str) -> str:
        (path,) = glob.glob(f"{self._hlo.name}/*.jit_fresh.*{stage}.txt")
        return Path(path).read_text()

    def _schedules(self) -> list[Schedule]:
        found = []
        pattern = f"{self._dump.name}/*pre-delay_hlo-static-per-bundle-utilization.txt"
        for path in sorted(glob.glob(pattern)):
            match = re.fullmatch(r"\d+-(.+)-\d+-pre-delay_hlo-static.*", os.path.basename(path))
            if not match or match[1].startswith("<") or match[1] == "TLP":
                continue
            lines = Path(path).read_text().splitlines()
            slots = dict(zip(UNITS, map(int, lines[2].split()), strict=True))
            rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
            used = dict(zip(UNITS, map(sum, zip(*rows, strict=True)), strict=True))
            originals = glob.glob(
                f"{self._dump.name}/*-{glob.escape(match[1])}-[0-9][0-9]-original.txt"
            )
            text = Path(originals[0]).read_text() if originals else ""
            vmem = sum(int(s, 16) for s in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", text))
            parts, loops = _jumps(
                glob.glob(f"{self._dump.name}/*-{glob.escape(match[1])}-*-post-ra.txt")
            )
            longest = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))
            inside = rows[slice(*longest)] or [[0] * len(UNITS)]
            loop_used = dict(zip(UNITS, map(sum, zip(*inside, strict=True)), strict=True))
            lengths = tuple(stop - start for start, stop in loops)
            found.append(
                Schedule(match[1], len(rows), used, slots, vmem, parts, lengths, loop_used)
            )
        return found


# A jump takes effect four bundles after it stands in the text.
_DELAY = 5


def _jumps(paths: list[str]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Cycles of the parts that a jump may leave out, and where the loops are, in a kernel.

    The part inside the grid's own loop that is left out only before its first and after its last
    step is the step itself, and the loop around all others the grid.
    """
    parts, loops = [], []
    for path in paths:
        if not path.endswith("-packed-bundles-post-ra.txt") or "schedule-analysis" in path:
            continue
        for line in Path(path).read_text().splitlines():
            match = re.match(
                r"\s*(?:0x)?([0-9a-f]+)\s*\S*\s*: .*sbr\.rel .*target bundleno = (\d+)", line
            )
            if match:
                here, there = int(match[1], 16), int(match[2])
                if there > here:
                    parts.append((here + _DELAY, there))
                else:
                    loops.append((there, here + _DELAY))
    grid = max(loops, key=lambda loop: loop[1] - loop[0], default=None)
    # Where two cores share a chip a jump may leave out all of the grid's loop; that is no step.
    in_grid = [p for p in parts if grid is None or (grid[0] <= p[0] and p[1] <= grid[1])]
    step = max(in_grid, key=lambda part: part[1] - part[0], default=None)
    inner = [p for p in parts if step and step[0] <= p[0] and p[1] <= step[1] and p != step]
    outermost = [
        p for p in inner if not any(q[0] <= p[0] and p[1] <= q[1] and p != q for q in inner)
    ]
    return (
        tuple(stop - start for start, stop in outermost),
        tuple(loop for loop in loops if loop != grid),
    )
