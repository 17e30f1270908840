"""How every TPU kernel is launched: compiled on a TPU, interpreted where a test says so."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import chips

_interpret: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret", default=False)
_fast_path_only: contextvars.ContextVar[bool] = contextvars.ContextVar("fast_only", default=False)

_launches: contextvars.ContextVar[Any] = contextvars.ContextVar("launches", default=None)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One traced kernel: its grid, and what it does over the whole grid."""

    name: str
    grid: tuple[int, ...]
    flops: int
    exps: int
    moved: int
    blocks: tuple[tuple[str, int], ...] = ()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects every launch that is traced inside."""
    found: list[Launch] = []
    token = _launches.set(found)
    try:
        yield found
    finally:
        _launches.reset(token)


def available() -> bool:
    """Whether a TPU kernel can be traced: on a TPU, for a named chip, or interpreted."""
    return bool(_interpret.get()) or chips.forced() or jax.default_backend() == "tpu"


@contextlib.contextmanager
def interpreted(how: Any = True) -> Iterator[None]:
    """Kernels traced inside run on any device: `True`, or `pltpu.InterpretParams` (races, NaN)."""
    token = _interpret.set(how)
    try:
        yield
    finally:
        _interpret.reset(token)


@contextlib.contextmanager
def without_slow_path() -> Iterator[None]:
    """Kernels traced inside leave out the branch for extreme scores, to count cycles only.

    A static schedule lists both sides of a branch; only one of them runs.
    """
    token = _fast_path_only.set(True)
    try:
        yield
    finally:
        _fast_path_only.reset(token)


def slow_path_wanted() -> bool:
    """Whether a kernel must include its branch for extreme scores: always, but for counting."""
    return not _fast_path_only.get()


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
    **more: Any,
) -> Callable[..., Any]:
    """`pl.pallas_call` with this project's defaults.

    `flops` (of matmuls), `exps` and `moved` (HBM bytes, each re-read counted) are those of the
    whole grid; they inform XLA and, with `blocks`, the schedule table and `vm.explain`.
    """
    found = _launches.get()
    if found is not None:
        chosen = tuple(sorted((blocks or {}).items()))
        found.append(Launch(name, tuple(grid), flops, exps, moved, chosen))
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
            dimension_semantics=tuple(semantics), vmem_limit_bytes=chips.current().vmem
        ),
        interpret=_interpret.get(),
        **more,
    )
