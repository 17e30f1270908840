"""The rows of the comparison: every method, and the weights that it runs on."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import vmonarch_jax as vm


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row.

    Args:
        key: in the record.
        group: the family, a colour of the picture.
        name: what it is.
        call: how a user writes it, for a README; of the method at its default sizes.
        method: the method value for a grid and a block size of block-sparse methods.
        weights: "dense", or a folder of weights tuned to the method.
    """

    key: str
    group: str
    name: str
    call: str
    method: Callable[[vm.VideoGrid, int], Any]
    weights: str = "dense"

    def branch_flops(self, config: Any) -> int:
        """Matmul FLOPs of the linear branches that the weights bring along, a layer on average."""
        layers = len(getattr(config, "linear_layers", ()))
        if not layers:
            return 0
        sizes = {"heads": config.heads, "head_dim": config.head_dim}
        branch = vm.flops.linear_branch(config.grid, **sizes)
        return branch * layers // config.depth


def _tubes(grid: vm.VideoGrid, **options: Any) -> vm.VMonarch:
    return vm.VMonarch(block=(grid.frames, 1, 1), recompute_frames=0, **options)


def _shipped_salad(size: int) -> vm.Salad:
    """What `models/tiny/salad` was tuned to, in blocks of 16: one frame and a square of it."""
    side = math.isqrt(size)
    return vm.Salad(sparse="top_k", tile=(1, side, side), block_size=size)


ENTRIES = (
    Entry("dense", "dense", "dense", "`vm.Dense()`", lambda grid, size: vm.Dense()),
    Entry(
        "vmonarch", "Monarch", "VMonarch", "`vm.VMonarch()`", lambda grid, size: vm.VMonarch()
    ),
    Entry(
        "tubes", "Monarch", "VMonarch, tubes as blocks",
        "`vm.VMonarch(block=(frames, 1, 1), recompute_frames=0)`", lambda grid, size: _tubes(grid),
    ),
    Entry(
        "tiled", "Monarch", "tiled Monarch (MonarchRT)", "`vm.TiledMonarch()`",
        lambda grid, size: vm.TiledMonarch(),
    ),
    Entry(
        "adaspa", "block-sparse", "AdaSpa", "`vm.AdaSpa()`",
        lambda grid, size: vm.AdaSpa(block_size=size),
    ),
    Entry(
        "window", "block-sparse", "sliding window, 80% sparse",
        "`vm.SlidingWindow(sparsity=0.8)`",
        lambda grid, size: vm.SlidingWindow(sparsity=0.8, block_size=size),
    ),
    Entry(
        "salad_window", "block-sparse", "SALAD's sparse branch, window", "`vm.Salad()`",
        lambda grid, size: vm.Salad(block_size=size),
    ),
    Entry(
        "salad_top_k", "block-sparse", "SALAD's sparse branch, top-k",
        '`vm.Salad(sparse="top_k")`', lambda grid, size: vm.Salad(sparse="top_k", block_size=size),
    ),
    Entry(
        "guided", "past the papers", "guided tubes", "`vm.Guided(tubes, exact_blocks=4)`",
        lambda grid, size: vm.Guided(_tubes(grid), exact_blocks=4),
    ),
    Entry(
        "guided_cached", "past the papers", "guided tubes, refreshed every 10 steps",
        "`vm.Guided(tubes, exact_blocks=4, every=10)`",
        lambda grid, size: vm.Guided(_tubes(grid), exact_blocks=4, every=10),
    ),
    Entry(
        "corrected", "past the papers", "corrected VMonarch", "`vm.Corrected(vm.VMonarch())`",
        lambda grid, size: vm.Corrected(vm.VMonarch()),
    ),
    Entry(
        "corrected_tubes", "past the papers", "corrected tubes", "`vm.Corrected(tubes)`",
        lambda grid, size: vm.Corrected(_tubes(grid)),
    ),
    Entry(
        "vmonarch_tuned", "tuned", "VMonarch on weights tuned to it", "`models/tiny/vmonarch`",
        lambda grid, size: vm.VMonarch(), weights="vmonarch",
    ),
    Entry(
        "salad_tuned", "tuned", "SALAD on weights tuned to it", "`models/tiny/salad`",
        lambda grid, size: _shipped_salad(size), weights="salad",
    ),
)  # fmt: skip
