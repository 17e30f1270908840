"""The TPU kernels by static schedule: cycles, bytes, and speedups over splash attention.

    python -m benchmarks.tpu_schedule                          # all; a quarter of an hour and more
    python -m benchmarks.tpu_schedule --chips v6e --kernels    # only the kernels, on one chip
    python -m benchmarks.tpu_schedule --shapes 21x30x52        # only the calls on this grid
    python -m benchmarks.tpu_schedule --report                 # only the tables, from the record

Needs libtpu (`pip install -e .[aot]`), not a TPU. Writes `tpu_schedule.json`, the figures that
`make aot` holds the kernels to, and `tpu_schedule.md`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS

from . import schedule_report, schedules
from .aot import Compiler

RECORD = Path(__file__).with_name("tpu_schedule.json")
# Whole calls: name, whether with gradients, whether from token-major arrays.
CALLS = {
    "forward": (False, False),
    "forward, token-major": (False, True),
    "forward + backward": (True, False),
}
# Tiled Monarch is for the two usual video sizes; a chip that is no target is asked for less.
TILED = ("21x30x52", "21x45x80")


def main(arguments: list[str] | None = None) -> None:
    """One process a chip, two at a time."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--chips", nargs="*", default=list(CHIPS), choices=list(CHIPS))
    flags.add_argument("--shapes", nargs="*", default=list(schedules.SHAPES))
    flags.add_argument("--calls", nargs="*", default=list(CALLS), choices=list(CALLS))
    flags.add_argument("--methods", nargs="*", default=["VMonarch", "TiledMonarch"])
    flags.add_argument("--kernels", action="store_true", help="the kernels only, not whole calls")
    flags.add_argument("--whole", action="store_true", help="whole calls only, not the kernels")
    flags.add_argument("--only", default="", help="kernels whose name matches this")
    flags.add_argument("--report", action="store_true", help="compile nothing")
    flags.add_argument("--jobs", type=int, default=2, help="chips at a time")
    flags.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args(arguments)
    if args.worker:
        work(args)
        return
    if not args.report:
        given = list(sys.argv[1:] if arguments is None else arguments)
        failed = in_turns(args.chips, given, args.jobs)
        if failed:
            print(f"failed on {', '.join(failed)}", file=sys.stderr)
    schedule_report.write(record())
    if not args.report and failed:
        sys.exit(1)


def in_turns(chips: list[str], given: list[str], jobs: int) -> list[str]:
    """Runs a worker for each chip, some at a time; returns the chips that failed."""
    waiting, running, failed = list(chips), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            chip = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.tpu_schedule", *given]
            command += ["--worker", "--chips", chip]
            running[chip] = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
        for chip in [chip for chip, process in running.items() if process.poll() is not None]:
            if running.pop(chip).returncode:
                failed.append(chip)
        time.sleep(0.5)
    return failed


def work(args: argparse.Namespace) -> None:
    """Compiles for one chip, and records each figure as it comes."""
    (chip,) = args.chips
    compiler = Compiler(chip)
    problems = 0
    if not args.whole:
        for case in schedules.cases():
            if re.search(args.only, case.kernel) and grid_of(case) in ("", *args.shapes):
                problems += attempt(
                    chip, "kernels", schedules.key(case), lambda case=case: kernel(compiler, case)
                )
    if not args.kernels:
        for name, method, grid, passes in calls(args.shapes, args.calls, args.methods):
            problems += attempt(
                chip,
                "calls",
                name,
                lambda method=method, grid=grid, passes=passes: whole(
                    compiler, method, grid, *passes
                ),
            )
    sys.exit(min(problems, 1))


def grid_of(case: Any) -> str:
    """The grid that a case's name starts with, or nothing."""
    first = case.name.split(" ")[0]
    return first if first in schedules.SHAPES else ""


def calls(shapes: list[str], passes: list[str], methods: list[str]) -> Any:
    """Name, method, grid and pass of every whole call."""
    import vmonarch_jax as vm

    known = {"VMonarch": vm.VMonarch(), "TiledMonarch": vm.TiledMonarch()}
    for shape in shapes:
        for title in methods:
            if title == "TiledMonarch" and shape not in TILED:
                continue
            for label in passes:
                grid = tuple(int(n) for n in shape.split("x"))
                yield f"{title} {shape} {label}", known[title], grid, CALLS[label]


def kernel(compiler: Compiler, case: Any) -> dict:
    """A kernel's entry of the record."""
    measured = schedules.measure(compiler, case)
    return dataclasses.asdict(measured) | {"why": measured.why()}


def whole(compiler: Compiler, method: Any, grid: tuple, backward: bool, tokens_major: bool) -> dict:
    """A whole call's entry of the record."""

    def call(q, k, v):
        return method(q, k, v, grid=grid, implementation="pallas_tpu")

    measured = schedules.whole(compiler, call, grid, backward=backward, tokens_major=tokens_major)
    entry = dataclasses.asdict(measured)
    del entry["hlo"]
    return entry


def attempt(chip: str, part: str, name: str, job: Any) -> int:
    """Runs one measurement, records it, says so; 1 if it failed."""
    start = time.monotonic()
    try:
        entry = job()
    except Exception as error:  # the others are still worth having
        print(f"{chip} {name}: FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return 1
    shown = f"{entry['cycles']:,} cycles"
    print(f"{chip} {name}: {shown} ({time.monotonic() - start:.0f} s)", flush=True)
    store(chip, part, name, entry)
    return 0


def record() -> dict[str, Any]:
    """What is recorded: versions, and by part ("kernels", "calls") and chip the entries."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def store(chip: str, part: str, name: str, entry: dict) -> None:
    """Adds an entry, whole file at a time, one process after another."""
    import fcntl

    with (Path(tempfile.gettempdir()) / "tpu_schedule.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = record()
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        known["versions"] = versions
        known.setdefault(part, {}).setdefault(chip, {})[name] = entry
        fresh = RECORD.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        fresh.replace(RECORD)


if __name__ == "__main__":
    main()
