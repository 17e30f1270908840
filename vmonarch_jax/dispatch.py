"""Which implementation serves a call: a table and a loop."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from vmonarch_jax.pallas_kernels.attend import reference as attend_reference
from vmonarch_jax.pallas_kernels.attend import xla as attend_xla
from vmonarch_jax.pallas_kernels.block_sparse import reference as sparse_reference
from vmonarch_jax.pallas_kernels.block_sparse import xla as sparse_xla
from vmonarch_jax.pallas_kernels.l_step import reference as l_reference
from vmonarch_jax.pallas_kernels.l_step import xla as l_xla
from vmonarch_jax.pallas_kernels.r_step import reference as r_reference
from vmonarch_jax.pallas_kernels.r_step import xla as r_xla
from vmonarch_jax.pallas_kernels.tpu import mode

T = TypeVar("T")
Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Backend:
    """The kernels that every method here is made of.

    Args:
        name: of the implementation.
        attend: softmax attention of groups of rows (dense rows).
        r_step: attention of the mean queries on their own key block.
        l_middle: the L step that returns mean queries.
        l_last: the L step that returns the output.
        tiled: one iteration for every pair of tiles in one kernel; `None`: there is none.
        block_sparse: attention on chosen pairs of blocks; `None`: there is none.
        block_mass: the softmax weight of every pair of blocks; `None`: there is none.
        attend_mass: dense attention and the masses of its blocks in one pass; `None`: in two.
        loops: whether heads and tiles are looped over so that few scores are alive at once.
        keeps: whether the attention kernels hold no scores in memory, and take `known` results.
        informed: whether the kernels take `entries`, of how many entries of a batch the groups are
            the heads, and leave the scale of aL to the L steps (`unscaled`, `gain`).
    """

    name: str
    attend: Callable[..., Any]
    r_step: Callable[..., Any]
    l_middle: Callable[..., Any]
    l_last: Callable[..., Any]
    tiled: Callable[..., Any] | None = None
    block_sparse: Callable[..., Any] | None = None
    block_mass: Callable[..., Any] | None = None
    attend_mass: Callable[..., Any] | None = None
    loops: bool = False
    keeps: bool = False
    informed: bool = False


def _pallas_tpu() -> Backend:
    if not mode.available():
        raise NotImplementedError(f"needs a TPU, and this is a {jax.default_backend()}")
    from vmonarch_jax.pallas_kernels.attend import tpu as attend
    from vmonarch_jax.pallas_kernels.block_sparse import tpu as block_sparse
    from vmonarch_jax.pallas_kernels.l_step import tpu as l_step
    from vmonarch_jax.pallas_kernels.r_step import tpu as r_step
    from vmonarch_jax.pallas_kernels.tiled import tpu as tiled

    return Backend(
        "pallas_tpu", attend.attend, r_step.r_step, l_step.middle, l_step.last,
        tiled=tiled.tiled, block_sparse=block_sparse.block_sparse,
        block_mass=block_sparse.block_mass, attend_mass=block_sparse.attend_mass, keeps=True,
    )  # fmt: skip


def _pallas_gpu() -> Backend:
    from vmonarch_jax.pallas_kernels.gpu import mode

    if reason := mode.unavailable():
        raise NotImplementedError(reason)
    from vmonarch_jax.pallas_kernels.attend import gpu as attend
    from vmonarch_jax.pallas_kernels.block_sparse import gpu as block_sparse
    from vmonarch_jax.pallas_kernels.l_step import gpu as l_step
    from vmonarch_jax.pallas_kernels.r_step import gpu as r_step
    from vmonarch_jax.pallas_kernels.tiled import gpu as tiled

    return Backend(
        "pallas_gpu", attend.attend, r_step.r_step, l_step.middle, l_step.last,
        tiled=tiled.tiled, block_sparse=block_sparse.block_sparse,
        block_mass=block_sparse.block_mass, attend_mass=block_sparse.attend_mass,
        keeps=True, informed=True,
    )  # fmt: skip


def _cudnn() -> Backend:
    from vmonarch_jax.pallas_kernels.gpu import cudnn

    reason = cudnn.unavailable()
    if reason:
        raise NotImplementedError(reason)
    from vmonarch_jax.pallas_kernels.attend import cudnn as attend
    from vmonarch_jax.pallas_kernels.l_step import gpu_or_xla as l_step
    from vmonarch_jax.pallas_kernels.r_step import cudnn as r_step

    return dataclasses.replace(
        XLA, name="cudnn", attend=attend.attend, r_step=r_step.r_step,
        l_middle=l_step.middle, l_last=l_step.last, loops=False, keeps=True,
        informed=True,
    )  # fmt: skip


REFERENCE = Backend(
    "reference", attend_reference.attend, r_reference.r_step, l_reference.middle, l_reference.last,
    block_sparse=sparse_reference.block_sparse, block_mass=sparse_reference.block_mass,
)  # fmt: skip
XLA = Backend(
    "xla", attend_xla.attend, r_xla.r_step, l_xla.middle, l_xla.last,
    block_sparse=sparse_xla.block_sparse, block_mass=sparse_xla.block_mass,
    attend_mass=sparse_xla.attend_mass, loops=True,
)  # fmt: skip

# How each implementation is had; `None`: it is not there yet. Kernels are imported when asked for.
BACKENDS: dict[str, Callable[[], Backend] | None] = {
    "reference": lambda: REFERENCE,
    "xla": lambda: XLA,
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
    "cudnn": _cudnn,
}

# Tried in turn when the caller names none. By name only: "reference", which is quadratic in memory,
# and the GPU routes, until they have been run on a GPU: what compiles may still be wrong.
BEST = ("pallas_tpu", "xla")

# Names that stand for `None`. `jax.jit` knows of it: what was traced under others is traced anew.
_default = jax.make_user_context(None)


@contextlib.contextmanager
def default_implementation(implementation: Implementation) -> Iterator[None]:
    """Calls that are traced inside and name no implementation take this one.

    A model makes many calls (self-attention, text, dense steps); this names the implementation of
    all of them at once. A call that names its own keeps it. Functions under `jax.jit` are compiled
    anew where the default changes. It holds in this thread.

    Args:
        implementation: a name, a sequence of names tried in turn, or `None`: the library's choice.

    Raises:
        ValueError: if a name is unknown or there is none.

    Example:
        >>> with vm.default_implementation(("pallas_gpu", "cudnn", "xla")):
        ...     out = vm.VMonarch()(query, key, value, grid=grid)
    """
    chosen = None if implementation is None else names(implementation)
    with _default(chosen):
        yield


def names(implementation: Implementation) -> tuple[str, ...]:
    """The names to try, in order.

    Raises:
        ValueError: if a name is unknown or there is none.
    """
    if implementation is None:
        return _default.value or BEST
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
        load = BACKENDS[name]
        backend, reason = None, f"version {_version()} has no such kernel for any device"
        if load is not None:
            try:
                backend, reason = load(), ""
            except NotImplementedError as error:
                reason = str(error)
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
