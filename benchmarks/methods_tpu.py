"""What each method costs on a TPU at the sizes of Wan, by the recorded static schedules."""

import json
import math
from pathlib import Path
from typing import Any

from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS

import vmonarch_jax as vm

from .cases import table
from .schedule_report import dense

RECORD = Path(__file__).with_name("tpu_schedule.json")
GRIDS = {"480p": (21, 30, 52), "720p": (21, 45, 80)}
SIZE = {"heads": 1, "head_dim": 128}

# Rows; a block-sparse part is its value at a block size that the kernel was scheduled for.
METHODS: dict[str, tuple[Any, int]] = {
    "VMonarch": (vm.VMonarch(), 0),
    "tiled Monarch": (vm.TiledMonarch(), 0),
    "AdaSpa, 80% sparse, blocks of 64": (vm.AdaSpa(), 64),
    "AdaSpa, 80% sparse, blocks of 128": (vm.AdaSpa(block_size=128), 128),
    "sliding window or SALAD, 90% sparse, blocks of 64": (vm.SlidingWindow(), 64),
    "sliding window or SALAD, 90% sparse, blocks of 128": (vm.SlidingWindow(block_size=128), 128),
    "guided VMonarch, one exact block": (vm.Guided(vm.VMonarch(), exact_blocks=1, every=10), 128),
    "corrected VMonarch": (vm.Corrected(vm.VMonarch()), 0),
}


def report() -> str:
    """A table: the speedup over the fastest dense attention beside the ratio of the FLOPs."""
    record = json.loads(RECORD.read_text())
    rows = []
    for size, shape in GRIDS.items():
        grid = vm.VideoGrid(*shape)
        for name, (method, block) in METHODS.items():
            ideal = vm.flops.attention(vm.Dense(), grid, **SIZE) / vm.flops.attention(
                method, grid, **SIZE
            )
            row = [size, name, f"{ideal:.1f}x"]
            for chip in CHIPS.values():
                own = cycles(record, chip, grid, method, block)
                baseline = dense(chip, "x".join(map(str, shape)), False)
                known = own is not None and baseline is not None
                row.append(f"{baseline[1] / own:.1f}x" if known else "-")  # pyright: ignore
            rows.append(row)
    return table(["video", "method, an ordinary step", "FLOP ratio", *CHIPS], rows, left=2)


def cycles(record: Any, chip: Any, grid: vm.VideoGrid, method: Any, block: int) -> float | None:
    """Of one head on one TensorCore; `None` where a kernel that it needs was not scheduled."""
    if isinstance(method, vm.Corrected):
        own = cycles(record, chip, grid, method.method, block)
        # The residual is read, the output read and written once more, in bfloat16.
        moved = 3 * 2 * grid.tokens * SIZE["head_dim"]
        return None if own is None else own + moved / chip.bytes_per_cycle
    if isinstance(method, vm.Guided):
        own = cycles(record, chip, grid, method.method, 0)
        exact = vm.flops.attention(method, grid, **SIZE) - vm.flops.attention(
            method.method, grid, **SIZE
        )
        rate = _sparse_rate(record, chip, grid, block, exact)
        return None if own is None or rate is None else own + exact * rate
    if block:
        count = vm.flops.attention(method, grid, **SIZE)
        rate = _sparse_rate(record, chip, grid, block, count)
        return None if rate is None else rate * count
    call = f"{type(method).__name__} {'x'.join(map(str, grid.shape))} forward"
    entry = record["calls"].get(chip.name, {}).get(call)
    return None if entry is None else entry["cycles"]


def _sparse_rate(
    record: Any, chip: Any, grid: vm.VideoGrid, block: int, count: int
) -> float | None:
    """Cycles a FLOP of the block-sparse kernel, from the scheduled case nearest in size and share.

    `count` is the FLOPs that are wanted.
    """
    share = count / vm.flops.attention(vm.Dense(), grid, **SIZE)
    found = []
    for name, entry in record["kernels"].get(chip.name, {}).items():
        words = name.split()
        if words[0] != "block_sparse" or f"blocks of {block}," not in name:
            continue
        tokens = math.prod(int(n) for n in words[2].split("x"))
        blocks = -(-tokens // block)
        kept = float(words[-2].rstrip("%")) / 100
        flops = 4 * block**2 * blocks * math.ceil(kept * blocks) * SIZE["head_dim"]
        found.append((abs(tokens - grid.tokens), abs(kept - share), entry["bound"] / flops))
    return min(found)[2] if found else None
