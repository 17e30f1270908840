"""Cycles and bytes of our kernels, one at a time and in whole calls, on a chip that is not there.

Kernels are counted without their branch for extreme scores, which ordinary inputs never take; a
branch for the first or last of several grid steps is counted at every step, against us. The longest
loop inside a step counts as often as it runs.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from vmonarch_jax.pallas_kernels.tpu.chips import Chip

from . import hlo
from .aot import Compiled, Compiler, Schedule

# Rooms with kernels, and where each lists its cases.
ROOMS = ("attend", "r_step", "l_step", "tiled", "block_sparse")
MODULES = {"cases": "CASES", "cases_backward": "CASES"}
SHAPES = ("21x30x52", "21x45x80", "46x28x52", "81x28x52", "16x28x52")
HEADS = 8  # a whole tile of them, so that XLA's copies are those of a model with more


@dataclasses.dataclass(frozen=True)
class Measured:
    """One kernel over its whole grid, for one head.

    Args:
        kernel: its name.
        grid: of all heads that were compiled for.
        blocks: its block sizes.
        step: cycles of one grid step.
        cycles: of the grid, for one head.
        floor: cycles of the same matmul slots, were they all full.
        vmem: bytes.
        moved: bytes between HBM and VMEM, for one head.
        flops: of its matmuls, for one head.
        bound: the larger of its cycles and those that its bytes take.
        busy: share of the slots used, by unit.
        spills: vector stores that spill, of a step.
        loops: loops inside a step; of all but the longest the body is counted once.
    """

    kernel: str
    grid: tuple[int, ...]
    blocks: dict[str, int]
    step: int
    cycles: int
    floor: int
    vmem: int
    moved: int
    flops: int
    bound: int
    busy: dict[str, float]
    spills: int
    loops: int

    def why(self) -> str:
        """What bounds it, in a few words."""
        if self.bound > self.cycles:
            return f"HBM ({self.cycles / self.bound:.0%} computing)"
        order = sorted(self.busy, key=lambda unit: -self.busy[unit])
        names = {"pop": "matmul results", "push": "matmul weights", "eup": "exponentials"}
        first, second = (f"{names.get(u, u)} {self.busy[u]:.0%}" for u in order[:2])
        if self.busy[order[0]] > 0.85:
            return first
        return f"latency; {first}, {second}"


def cases() -> Iterator[Any]:
    """Every case that the rooms list."""
    for room in ROOMS:
        for module, name in MODULES.items():
            dotted = f"vmonarch_jax.pallas_kernels.{room}.{module}"
            try:
                found = importlib.import_module(dotted)
            except ModuleNotFoundError as error:
                if error.name != dotted:
                    raise
                continue
            yield from getattr(found, name)


def key(case: Any) -> str:
    """The name of a case in the records."""
    sizes = " ".join(f"{name}={size}" for name, size in sorted(case.shape.items()))
    return f"{case.kernel} {case.dtype} {case.name or sizes}"


def kernels(result: Compiled, chip: Chip, heads: int = 1) -> list[Measured]:
    """All our kernels in a compiled program, in the order in which they run."""
    schedules = {schedule.name: schedule for schedule in result.kernels}
    found = []
    for op in hlo.operations(result.hlo):
        if op.kind != "kernel":
            continue
        # XLA wraps the names of what a gradient runs: `jvp_r_step_.2`.
        alike = [
            x
            for x in result.launches
            if x.name in op.name and (x.flops, x.moved) == (op.flops, op.moved)
        ]
        launch = max(alike, key=lambda x: len(x.name), default=None)
        if launch is None:
            raise LookupError(
                f"kernel {op.name} is none of {sorted({x.name for x in result.launches})}"
            )
        schedule = schedules.get(op.name) or _twin(op, result, schedules)
        found.append(_measured(schedule, launch, op.runs / heads, chip))
    return found


def _twin(op: hlo.Operation, result: Compiled, schedules: dict[str, Schedule]) -> Schedule:
    """The schedule of a kernel that the compiler made once for several calls."""
    for other in hlo.operations(result.hlo):
        same = (op.flops, op.moved, op.shape) == (other.flops, other.moved, other.shape)
        if other.name in schedules and same:
            return schedules[other.name]
    raise LookupError(f"no schedule of {op.name} among {sorted(schedules)}")


def _measured(schedule: Schedule, launch: Any, runs: float, chip: Chip) -> Measured:
    steps = math.prod(launch.grid) * runs
    schedule = schedule.turned(launch.turns)
    cycles, moved = schedule.cycles * steps, launch.moved * runs
    floor = schedule.used["matmul"] / schedule.slots["matmul"] * steps
    return Measured(
        kernel=launch.name,
        grid=tuple(launch.grid),
        blocks=dict(launch.blocks),
        step=schedule.cycles,
        cycles=round(cycles),
        floor=round(floor),
        vmem=schedule.vmem,
        moved=round(moved),
        flops=round(launch.flops * runs),
        bound=round(max(cycles, moved / chip.bytes_per_cycle)),
        busy={unit: round(schedule.busy(unit), 3) for unit in schedule.used},
        spills=schedule.used["spill"],
        loops=len(schedule.loops),
    )


def measure(compiler: Compiler, case: Any, blocks: dict[str, int] | None = None) -> Measured:
    """One case, with its own blocks or others.

    Raises:
        NotImplementedError: if the kernel refuses them.
    """
    from vmonarch_jax.pallas_kernels.tpu.mode import without_slow_path

    with without_slow_path():
        result = compiler(case.function(blocks), *case.arguments)
    found = [x for x in kernels(result, compiler.chip) if x.kernel == case.kernel]
    if not found:
        raise LookupError(f"no kernel named {case.kernel} in the case {key(case)}")
    added = ("cycles", "floor", "moved", "flops", "bound")
    # One launch after another, as where a gradient is added up in place.
    return dataclasses.replace(
        found[0], **{name: sum(getattr(x, name) for x in found) for name in added}
    )


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole call, for one head: its kernels, and what XLA does around them.

    Args:
        kernels: in order.
        around: bytes that other operations move.
        largest: the largest of these: kind, shape, bytes and how often it runs.
        cycles: the bounds of the kernels and the time of `around`, added up.
        temporary: bytes of temporaries at the largest, over all heads compiled for.
        query: bytes of q, over the same heads.
        hlo: the compiled program.
    """

    kernels: list[Measured]
    around: int
    largest: list[tuple[str, str, int, int]]
    cycles: int
    temporary: int
    query: int
    hlo: str = dataclasses.field(repr=False)


def whole(
    compiler: Compiler,
    call: Callable[..., Any],
    grid: tuple[int, int, int],
    *,
    heads: int = HEADS,
    backward: bool = False,
    tokens_major: bool = False,
    slow_path: bool = False,
    head_dim: int = 128,
) -> Whole:
    """`call(q, k, v)` in bfloat16 on token-major arrays, by its kernels.

    A model's arrays come heads-major from its projections, or token-major; XLA folds the
    transpositions of the first into nothing where `call` starts with the opposite ones.
    """
    import contextlib

    import jax
    import jax.numpy as jnp
    from vmonarch_jax.pallas_kernels.tpu.mode import without_slow_path

    tokens = math.prod(grid)

    def forward(q: Any, k: Any, v: Any) -> Any:
        if tokens_major:
            return call(q, k, v)
        return call(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    def gradients(q: Any, k: Any, v: Any, out_bar: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1](out_bar)

    shape = (1, tokens, heads, head_dim) if tokens_major else (1, heads, tokens, head_dim)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    with contextlib.nullcontext() if slow_path else without_slow_path():
        result = compiler(gradients, x, x, x, x) if backward else compiler(forward, x, x, x)
    found = kernels(result, compiler.chip, heads)
    others = hlo.around(result.hlo)
    around = sum(op.bytes * op.runs for op in others) / heads
    cycles = sum(kernel.bound for kernel in found) + around / compiler.chip.bytes_per_cycle
    return Whole(
        kernels=found,
        around=round(around),
        largest=[(op.kind, op.shape, op.bytes, op.runs) for op in others[:6]],
        cycles=round(cycles),
        temporary=result.memory.temp_size_in_bytes,
        query=math.prod(shape) * 2,
        hlo=result.hlo,
    )
