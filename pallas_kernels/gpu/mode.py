"""How GPU kernels are traced: for a Hopper GPU at hand, for one named, or interpreted."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_interpret: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret_gpu", default=None)
_forced: contextvars.ContextVar[str] = contextvars.ContextVar("force_gpu", default="")
_launches: contextvars.ContextVar[Any] = contextvars.ContextVar("gpu_launches", default=None)

# Of an H100 SXM or an H200; what is compiled without a GPU is compiled for these.
MULTIPROCESSORS = 132

# Shared memory that a block of threads can have on Hopper, in bytes.
SHARED_MEMORY = 232_448


@dataclasses.dataclass(frozen=True)
class Launch:
    """One traced kernel, and what it does over its whole grid.

    Args:
        name: of the kernel.
        blocks: blocks of threads in its grid.
        flops: of its matrix products, padding not counted.
        moved: bytes of its inputs and outputs, each counted once.
    """

    name: str
    blocks: int
    flops: int
    moved: int


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects every GPU launch that is traced inside."""
    found: list[Launch] = []
    token = _launches.set(found)
    try:
        yield found
    finally:
        _launches.reset(token)


def record(launch: Launch) -> None:
    """Adds to the list of `recording`, if any."""
    found = _launches.get()
    if found is not None:
        found.append(launch)


@contextlib.contextmanager
def interpreted(how: Any) -> Iterator[None]:
    """Kernels traced inside run on any device, as Mosaic GPU's `InterpretGPUParams` say."""
    token = _interpret.set(how)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpreting() -> Any:
    """The `interpret` argument of a kernel that is traced now; `None`: it is compiled."""
    return _interpret.get()


@contextlib.contextmanager
def compiling_for(capability: str) -> Iterator[None]:
    """What is traced inside is for a GPU of this compute capability, whatever devices there are."""
    token = _forced.set(capability)
    try:
        yield
    finally:
        _forced.reset(token)


def compiling_for_hopper() -> contextlib.AbstractContextManager[None]:
    """Kernels traced inside are for an H100, whatever devices there are: to compile ahead."""
    return compiling_for("9.0")


def compiling_ahead() -> bool:
    """Whether what is traced now is compiled for a GPU that need not be at hand."""
    return bool(_forced.get())


def unavailable() -> str:
    """Why no GPU kernel can be traced here; empty if one can."""
    if _interpret.get() is not None:
        return ""
    if not _forced.get() and jax.default_backend() != "gpu":
        return f"needs a Hopper GPU (H100, H200), and this is a {jax.default_backend()}"
    capability, kind = _forced.get(), "GPU to compile for"
    if not capability:
        device = jax.devices()[0]
        capability = str(getattr(device, "compute_capability", "unknown"))
        kind = device.device_kind
    if not capability.startswith("9."):
        return (
            f"needs a Hopper GPU of compute capability 9.0, and this is a {kind} "
            f"of capability {capability}"
        )
    return ""


def multiprocessors() -> int:
    """Of the device that kernels are traced for."""
    if _interpret.get() is not None:
        return 1
    if _forced.get() or jax.default_backend() != "gpu":
        return MULTIPROCESSORS
    return int(getattr(jax.devices()[0], "core_count", MULTIPROCESSORS))
