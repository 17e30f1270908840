"""What must not get worse, checked by the TPU compiler: `python -m benchmarks.gates --chip v6e`.

Every kernel compiles at its real shapes; its cycles are within 5% of `tpu_schedule.json`; a whole
call needs no more temporary memory than promised, and no array of it is padded to many times its
size. `--part` takes one shape of each kernel, another one every day. Prints a line a check, and
exits with 1 if one fails. Needs libtpu, not a TPU; `make aot` runs it for every chip.
"""

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS

from . import hlo, schedules
from .aot import Compiler

RECORD = Path(__file__).with_name("tpu_schedule.json")
ROOM = 0.05  # equal code in another order moves cycles by about 1%
MEMORY_GRID, MEMORY_HEADS = (21, 45, 80), 40
# Largest temporaries of a whole call over the bytes of q.
MEMORY = {"forward": 4.0, "forward + backward": 8.0}
# A [n, 1] column is padded 128-fold; short axes next to the last pad a few arrays up to 8-fold.
PADDING, SMALL = 16, 2**20


def main(arguments: list[str] | None = None) -> int:
    """0 if all checks pass."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--chip", required=True, choices=list(CHIPS))
    flags.add_argument("--part", action="store_true", help="one shape of each kernel")
    args = flags.parse_args(arguments)
    compiler = Compiler(args.chip)
    failed = 0
    for name, check in checks(compiler, args.part):
        start = time.monotonic()
        try:
            problem = check()
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:500]}"
        seconds = time.monotonic() - start
        verdict = f"FAILED: {problem}" if problem else "passed"
        print(f"{args.chip} {name}: {verdict} ({seconds:.0f} s)", flush=True)
        failed += bool(problem)
    return min(failed, 1)


def checks(compiler: Compiler, part: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and check; a check returns what is wrong, or nothing."""
    chosen = list(schedules.cases())
    day = datetime.date.today().toordinal() + list(CHIPS).index(compiler.chip.name)
    if part:
        kernels = {case.kernel: [x for x in chosen if x.kernel == case.kernel] for case in chosen}
        chosen = [cases[day % len(cases)] for cases in kernels.values()]
    for case in chosen:
        yield schedules.key(case), lambda case=case: cycles(compiler, case)
    passes = list(MEMORY)
    if part:  # one of them on each of two chips, in turns
        passes = [passes[day // len(CHIPS) % 2]] if day % 2 else []
    for name in passes:
        yield f"memory, {name}", lambda name=name: memory(compiler, name)


def cycles(compiler: Compiler, case: Any) -> str:
    """Compiles a case and compares."""
    measured = schedules.measure(compiler, case)
    known = json.loads(RECORD.read_text())["kernels"].get(compiler.chip.name, {})
    entry = known.get(schedules.key(case))
    if entry is None:
        print(f"  not recorded: {measured.cycles:,} cycles")
        return ""
    change = measured.cycles / entry["cycles"] - 1
    if abs(change) <= ROOM:
        return ""
    advice = "" if change > 0 else "; better: record it, python -m benchmarks.tpu_schedule"
    return (
        f"{measured.cycles:,} cycles, {change:+.0%} from the recorded {entry['cycles']:,}{advice}"
    )


def memory(compiler: Compiler, passes: str) -> str:
    """Compiles a whole call of many heads, the branch for extreme scores included."""
    import vmonarch_jax as vm

    def call(q: Any, k: Any, v: Any) -> Any:
        return vm.vmonarch_attention(q, k, v, grid=MEMORY_GRID, implementation="pallas_tpu")

    whole = schedules.whole(
        compiler, call, MEMORY_GRID,
        heads=MEMORY_HEADS, backward=passes != "forward", tokens_major=True, slow_path=True,
    )  # fmt: skip
    problems = padded(whole.hlo)
    ratio, most = whole.temporary / whole.query, MEMORY[passes]
    print(f"  temporaries are {ratio:.2f} times q")
    if ratio > most:
        problems.append(f"temporaries are {ratio:.2f} times q, more than {most}")
    return "; ".join(problems[:5])


def padded(text: str) -> list[str]:
    """Large arrays in HBM whose tiles pad them many times over."""
    found = set()
    for match in re.finditer(r"\b[a-z]+\d+\[[\d,]+\]\{[^}]*\}", text):
        if "S(1)" in match[0]:
            continue  # in VMEM, for a moment
        true, real = hlo.size(re.sub(r"\{.*", "", match[0])), hlo.size(match[0])
        if real > SMALL and real > PADDING * true:
            found.add(f"{match[0]} takes {real / true:.0f} times its size")
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
