"""Block sizes for the TPU kernels: compiles the candidates and records the fastest.

    python -m benchmarks.tune_tpu                             # what the table lacks, on all chips
    python -m benchmarks.tune_tpu --chips v6e --only 'r_step$' --again

Needs libtpu (`pip install -e .[aot]`), not a TPU. For each case of each room every candidate is
compiled, and the least `max(cycles, bytes / bandwidth)` goes into `pallas_kernels/tpu/table.json`,
with the kernel's own choice among the candidates. The table is written whole after each case: stop
it whenever you like, and start it again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from vmonarch_jax.pallas_kernels.tpu import table
from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS

from . import schedules
from .aot import Compiler

TABLE = Path(table.__file__).with_name("table.json")
# A candidate has to be this much faster than the kernel's own choice to be worth an entry's trust:
# equal code in another order moves about 1%.
MARGIN = 0.99


def main(arguments: list[str] | None = None) -> None:
    """One process a chip, two at a time."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--chips", nargs="*", default=list(CHIPS), choices=list(CHIPS))
    flags.add_argument("--only", default="", help="kernels whose name matches this")
    flags.add_argument("--again", action="store_true", help="also what the table has")
    flags.add_argument("--jobs", type=int, default=2, help="chips at a time")
    flags.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args(arguments)
    if args.worker:
        tune(args.chips[0], args.only, args.again)
        return
    waiting, running, failed = list(args.chips), {}, []
    given = list(sys.argv[1:] if arguments is None else arguments)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            chip = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.tune_tpu", *given, "--worker"]
            running[chip] = subprocess.Popen(
                [*command, "--chips", chip], cwd=Path(__file__).parent.parent
            )
        for chip in [chip for chip, process in running.items() if process.poll() is not None]:
            failed += [chip] if running.pop(chip).returncode else []
        time.sleep(0.5)
    sys.exit(f"failed on {', '.join(failed)}" if failed else 0)


def tune(chip: str, only: str, again: bool) -> None:
    """All cases on one chip."""
    compiler = Compiler(chip)
    todo = [
        case
        for case in schedules.cases()
        if re.search(only, case.kernel) and (again or not recorded(chip, case))
    ]
    start = time.monotonic()
    for number, case in enumerate(todo):
        entry = best(compiler, case)
        if entry is not None:
            store(chip, case, entry)
        spent = time.monotonic() - start
        left = spent / (number + 1) * (len(todo) - number - 1) / 60
        shown = f"{entry['blocks']} {entry['cycles']:,} cycles" if entry else "nothing compiles"
        print(f"{chip} {schedules.key(case)}: {shown}; {left:.0f} min left", flush=True)


def best(compiler: Compiler, case: Any) -> dict[str, Any] | None:
    """The entry of the fastest candidate; the kernel's own choice wins a tie."""
    found: list[tuple[float, schedules.Measured]] = []
    seen: list[dict[str, int]] = []
    # The kernel's own choice, not what an earlier table says.
    with mock.patch.object(table, "entries", dict):
        for blocks in (None, *case.candidates):
            try:
                measured = schedules.measure(compiler, case, blocks)
            except Exception as error:  # refused, or out of VMEM: no candidate
                reason = str(error).splitlines()[0][:100] if str(error) else ""
                print(f"  {blocks}: {type(error).__name__}: {reason}", flush=True)
                continue
            if measured.blocks not in seen:
                seen.append(measured.blocks)
                penalty = 1.0 if blocks is None else 1 / MARGIN
                found.append((measured.bound * penalty, measured))
    if not found:
        return None
    _, fastest = min(found, key=lambda pair: pair[0])
    return {
        "blocks": fastest.blocks,
        "cycles": fastest.cycles,
        "vmem": fastest.vmem,
        "bytes": fastest.moved,
    }


def recorded(chip: str, case: Any) -> bool:
    """Whether the table has this very case."""
    return any(same(entry, case) for entry in read().get(chip, {}).get(case.kernel, []))


def same(entry: dict[str, Any], case: Any) -> bool:
    """Whether an entry is of this case."""
    return entry["shape"] == case.shape and entry["dtype"] == case.dtype


def read() -> dict[str, Any]:
    """The table as it is on disk."""
    return json.loads(TABLE.read_text())


def store(chip: str, case: Any, entry: dict[str, Any]) -> None:
    """Puts an entry in its place, one process after another, a whole file at a time."""
    import fcntl

    with (Path(tempfile.gettempdir()) / "tune_tpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read()
        entries = known.setdefault(chip, {}).setdefault(case.kernel, [])
        entries[:] = [old for old in entries if not same(old, case)]
        entries.append({"shape": case.shape, "dtype": case.dtype} | entry)
        entries.sort(key=lambda e: (e["dtype"], sorted(e["shape"].items())))
        fresh = TABLE.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        fresh.replace(TABLE)


if __name__ == "__main__":
    main()
