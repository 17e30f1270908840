"""Which implementation serves a call: a table and a loop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vmonarch_jax.pallas_kernels.attend import reference as attend_reference
from vmonarch_jax.pallas_kernels.attend import xla as attend_xla
from vmonarch_jax.pallas_kernels.l_step import reference as l_reference
from vmonarch_jax.pallas_kernels.l_step import xla as l_xla

T = TypeVar("T")
Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Backend:
    """The three kernels that every method here is made of."""

    name: str
    attend: Callable[..., Any]
    l_middle: Callable[..., Any]
    l_last: Callable[..., Any]
    # Whether heads and tiles are looped over, so that only a chunk of them is alive at once.
    loops: bool


BACKENDS: dict[str, Backend | None] = {
    "reference": Backend(
        "reference", attend_reference.attend, l_reference.middle, l_reference.last, loops=False
    ),
    "xla": Backend("xla", attend_xla.attend, l_xla.middle, l_xla.last, loops=True),
    "pallas_tpu": None,
    "pallas_gpu": None,
    "cudnn": None,
}

# Tried in turn when the caller names none. "reference" is quadratic in memory: by name only.
BEST = ("pallas_tpu", "pallas_gpu", "cudnn", "xla")


def names(implementation: Implementation) -> tuple[str, ...]:
    """The names to try, in order.

    Raises:
        ValueError: if a name is unknown or there is none.
    """
    if implementation is None:
        return BEST
    if isinstance(implementation, str) or not isinstance(implementation, Sequence):
        implementation = (implementation,)  # pyright: ignore[reportAssignmentType]
    chosen = tuple(implementation)
    for name in chosen:
        if name not in BACKENDS:
            raise ValueError(
                f"`implementation` must be one of {sorted(BACKENDS)}, a sequence of these or "
                f"None, got {name!r}"
            )
    if not chosen:
        raise ValueError("`implementation` must name at least one implementation, got none")
    return chosen


def attempts(implementation: Implementation) -> list[tuple[str, Backend | None, str]]:
    """Each name in order with its backend, or `None` and the reason why it can't serve."""
    found: list[tuple[str, Backend | None, str]] = []
    for name in names(implementation):
        backend = BACKENDS[name]
        reason = "" if backend else f"version {_version()} has no such kernel for any device"
        found.append((name, backend, reason))
    return found


def dispatch(implementation: Implementation, call: Callable[[Backend], T]) -> T:
    """`call` with the first backend that does not raise `NotImplementedError`.

    Raises:
        ValueError: if a name is unknown.
        NotImplementedError: if none of the named implementations can do the call, with the
            reason of each.
    """
    reasons = []
    for name, backend, reason in attempts(implementation):
        if backend is None:
            reasons.append(f"{name!r}: {reason}")
            continue
        try:
            return call(backend)
        except NotImplementedError as error:
            reasons.append(f"{name!r}: {error}")
    raise NotImplementedError("no named implementation can do this call: " + "; ".join(reasons))


def _version() -> str:
    from . import __version__  # at the call: the package imports this module first

    return __version__
