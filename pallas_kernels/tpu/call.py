"""How every TPU kernel is launched: compiled on a TPU, interpreted where a test says so."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..varying import kernel_results
from . import chips
from .mode import (
    Launch,
    available,
    interpreted,
    interpreting,
    launches,
    noted_choice,
    recording,
    slow_path_wanted,
    without_slow_path,
)

__all__ = [
    "Launch",
    "available",
    "interpreted",
    "launch",
    "recording",
    "slow_path_wanted",
    "without_slow_path",
]


def launch(
    body: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    semantics: Sequence[str],
    scratch: Sequence[Any] = (),
    flops: int = 0,
    exps: int = 0,
    moved: int = 0,
    blocks: dict[str, int] | None = None,
    turns: int = 1,
    **more: Any,
) -> Callable[..., Any]:
    """`pl.pallas_call` with this project's defaults.

    `flops` (of matmuls), `exps` and `moved` (HBM bytes, each re-read counted) are those of the
    whole grid; they inform XLA and, with `blocks`, the schedule table and `vm.explain`.
    `turns` is how often the longest loop inside a grid step runs, which a schedule lists once.
    """
    found = launches()
    if found is not None:
        chosen = tuple(sorted((blocks or {}).items()))
        found.append(
            Launch(name, tuple(grid), flops, exps, moved, chosen, turns, noted_choice(name))
        )

    def make(out_shape: Any) -> Callable[..., Any]:
        return pl.pallas_call(
            body,
            name=name,
            grid=grid,
            in_specs=list(in_specs),
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=list(scratch),
            cost_estimate=pl.CostEstimate(flops=flops, transcendentals=exps, bytes_accessed=moved),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=tuple(semantics),  # pyright: ignore[reportArgumentType]
                vmem_limit_bytes=chips.current().vmem,
            ),
            interpret=interpreting(),
            **more,
        )

    return kernel_results(make, out_shape)
