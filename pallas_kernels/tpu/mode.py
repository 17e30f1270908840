"""How TPU kernels are traced: for real, interpreted, or only to be looked at. Imports no Pallas."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from . import chips

_interpret: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret", default=False)
_fast_path_only: contextvars.ContextVar[bool] = contextvars.ContextVar("fast_only", default=False)

_launches: contextvars.ContextVar[Any] = contextvars.ContextVar("launches", default=None)
_choices: contextvars.ContextVar[Any] = contextvars.ContextVar("choices", default=None)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One traced kernel: its grid, and what it does over the whole grid."""

    name: str
    grid: tuple[int, ...]
    flops: int
    exps: int
    moved: int
    blocks: tuple[tuple[str, int], ...] = ()
    turns: int = 1  # of the longest loop inside a grid step
    # Of the last choice of block sizes for a kernel of this name; `None`: there was none.
    entry: Any = dataclasses.field(default=None, compare=False)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects every launch that is traced inside."""
    found: list[Launch] = []
    token, choices = _launches.set(found), _choices.set({})
    try:
        yield found
    finally:
        _launches.reset(token)
        _choices.reset(choices)


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


def interpreting() -> Any:
    """The `interpret` argument of a kernel that is traced now."""
    return _interpret.get()


def launches() -> list[Launch] | None:
    """The list that launches are recorded in now, if any."""
    return _launches.get()


def note_choice(kernel: str, entry: Any) -> None:
    """Remembers, while launches are recorded, which entry of the table a kernel went by."""
    choices = _choices.get()
    if choices is not None:
        choices[kernel] = entry


def noted_choice(kernel: str) -> Any:
    """What `note_choice` remembers for a kernel."""
    return (_choices.get() or {}).get(kernel)
