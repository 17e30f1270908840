"""The attention methods that the fidelity study compares."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

import vmonarch_jax as vm


@dataclasses.dataclass(frozen=True)
class ExactKeyFrames:
    """Exact attention on the keys of a few frames, Monarch attention on all others, merged.

    As every part carries its log-sum-exp, the two merge exactly and the certificate still holds.
    """

    frames: tuple[int, ...]
    rest: vm.VMonarch = vm.VMonarch()  # noqa: RUF009 (frozen)

    def __call__(self, query, key, value, *, grid, return_lse=False) -> Any:
        """Attention of `[batch, seq, heads, head_dim]` arrays on `grid`."""
        frame = np.arange(grid.tokens) // grid.frame_tokens
        chosen = np.isin(frame, self.frames)
        others = jnp.broadcast_to(jnp.asarray(~chosen), key.shape[:2])
        exact = vm.dense_attention(query, key[:, chosen], value[:, chosen], return_lse=True)
        rest = self.rest(query, key, value, grid=grid, key_mask=others, return_lse=True)
        part = vm.merge_attention([exact, rest])
        return part if return_lse else part.out


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        group: what it varies.
        name: what it is.
        method: the method value.
        weights: "dense", or "tuned" for those tuned to VMonarch.
        label: in the picture; empty: not drawn.
    """

    group: str
    name: str
    method: Any
    weights: str = "dense"
    label: str = ""


def relative_flops(method: Any, grid: vm.VideoGrid) -> float:
    """Matmul FLOPs over those of dense attention; masked keys count, as their work is done."""
    dense = vm.flops.attention(vm.Dense(), grid)
    if isinstance(method, ExactKeyFrames):
        share = len(method.frames) / grid.frames
        return share + vm.flops.attention(method.rest, grid) / dense
    return vm.flops.attention(method, grid) / dense


def variants(grid: vm.VideoGrid) -> list[Variant]:
    """All rows of the main table for `grid`; VMonarch as published is in every comparison."""
    frames, height, width = grid.shape
    row, tube = (1, 1, width), (frames, 1, 1)
    half, quarter = -(-height // 2), (frames, -(-height // 2), -(-width // 2))
    several = max(1, min(4, frames // 2))
    v, t = vm.VMonarch, vm.TiledMonarch
    rows = [Variant("reference", "dense", vm.Dense(), label="dense")]
    rows += [
        Variant("steps", f"VMonarch, {n} step{'s' * (n > 1)}", v(steps=n), label=f"{n} it.")
        for n in (1, 2, 3, 5)
    ]
    rows += [
        Variant(
            "no exact frame", f"{n} step{'s' * (n > 1)}", v(steps=n, recompute_frames=0),
            label=f"{n} it.",
        )
        for n in (1, 2, 3, 5)
    ]  # fmt: skip
    rows += [
        Variant("block of 2 frames", "2 steps", v(block=(2, height, width)), label="2 frames"),
        Variant(
            "block of 2 frames", "2 steps, no exact frame",
            v(block=(2, height, width), recompute_frames=0), label="2 frames, bare",
        ),
        Variant("rows", "(1, 1, W), 1 step", v(1, row, None, 0), label="1 it."),
        Variant("rows", "(1, 1, W), 2 steps", v(2, row, None, 0), label="2 it."),
        Variant("tubes", "(T, 1, 1), 1 step", v(1, tube, None, 0), label="1 it."),
        Variant("tubes", "(T, 1, 1), 2 steps", v(2, tube, None, 0), label="2 it."),
        Variant("tubes", "(T, 1, 1), 2 steps, first frame exact", v(2, tube), label="+ 1st"),
        Variant("tiled", "tile (1, H, W), block (1, 1, W)", t(), label="(1,H,W)"),
        Variant(
            "tiled", "tile (1, H/2, W), block (1, 1, W)", t(tile=(1, half, width)),
            label="(1,H/2,W)",
        ),
        Variant(
            "tiled", f"tile ({several}, H, W), block (1, 1, W)", t(tile=(several, height, width)),
            label=f"({several},H,W)",
        ),
        Variant(
            "tiled", "tile (T, H/2, W/2), block (T, 1, 1)", t(tile=quarter, block=tube),
            label="(T,H/2,W/2)",
        ),
        Variant("exact key frames", "first", ExactKeyFrames((0,)), label="1st"),
        Variant(
            "exact key frames", f"every {several}th",
            ExactKeyFrames(tuple(range(0, frames, several))), label=f"every {several}th",
        ),
        Variant(
            "exact key frames", f"every {several}th, rest in tubes",
            ExactKeyFrames(tuple(range(0, frames, several)), v(2, tube, None, 0)),
            label=f"every {several}th, tubes",
        ),
        Variant("tuned", "VMonarch, 2 steps", v(), weights="tuned", label="tuned"),
        Variant("tuned", "dense", vm.Dense(), weights="tuned"),
    ]  # fmt: skip
    return rows


def floors(grid: vm.VideoGrid) -> list[Variant]:
    """What the floor on `c_R` does, where its mean is 1 and where it is one over the tiles."""
    half = (1, -(-grid.height // 2), grid.width)
    tilings = {"VMonarch": (vm.VMonarch, {}), "tiled, (1, H, W)": (vm.TiledMonarch, {"steps": 2})}
    tilings["tiled, (1, H/2, W)"] = (vm.TiledMonarch, {"steps": 2, "tile": half})
    rows = []
    for group, (kind, options) in tilings.items():
        tiles = vm.flops.tiling_of(kind(**options), grid).sizes[0]
        chosen = {"0": 0.0, "0.1": 0.1, "0.3": 0.3, "1": 1.0}
        if tiles > 1:
            chosen = {"0": 0.0, f"0.1 / {tiles} tiles": 0.1 / tiles, "0.1": 0.1}
        rows += [
            Variant(group, f"floor {name}", kind(**options, c_r_floor=floor))
            for name, floor in chosen.items()
        ]
    return rows
