"""The TPU chips that the kernels are tuned for, and which one is in use."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore of a chip, as its kernels see it.

    Args:
        name: as the block-size table spells it.
        kinds: how `jax.Device.device_kind` may start for it, in lower case.
        topology: a small slice of it, as `jax.experimental.topologies` names it.
        clock: cycles per second, inferred from the peak rate.
        bandwidth: bytes per second of HBM, of the whole chip.
        vmem: bytes of VMEM of a TensorCore that a kernel may plan with.
        cores: TensorCores that share the chip's bandwidth.
    """

    name: str
    kinds: tuple[str, ...]
    topology: str
    clock: float
    bandwidth: float
    vmem: int
    cores: int = 1

    @property
    def bytes_per_cycle(self) -> float:
        """HBM bytes that one TensorCore's share of the bandwidth moves in a cycle."""
        return self.bandwidth / self.clock / self.cores


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", ("tpu v5 lite", "tpu v5e"), "v5e:2x2", 1.5e9, 819e9, 100 * MIB),
        Chip("v5p", ("tpu v5p", "tpu v5"), "v5p:2x2x1", 1.75e9, 2765e9, 56 * MIB, cores=2),
        Chip("v6e", ("tpu v6 lite", "tpu v6e"), "v6e:2x2", 1.75e9, 1640e9, 100 * MIB),
        Chip("7x", ("tpu7x", "tpu v7", "tpu 7"), "tpu7x:2x2x1", 2.2e9, 7370e9, 56 * MIB, cores=2),
    )
}

# Assumed where the chip is unknown (a new one, or a compilation for none in particular).
DEFAULT = "v6e"

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("chip", default=None)


def current() -> Chip:
    """The chip that kernels are traced for: the forced one, else the default device's."""
    forced = _forced.get()
    if forced is not None:
        return CHIPS[forced]
    kind = jax.devices()[0].device_kind.lower()
    for chip in CHIPS.values():
        if kind.startswith(chip.kinds):
            return chip
    return CHIPS[DEFAULT]


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[Chip]:
    """Kernels traced inside are for this chip, whatever device is at hand.

    Raises:
        ValueError: if the chip is unknown.
    """
    if name not in CHIPS:
        raise ValueError(f"`chip` must be one of {sorted(CHIPS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield CHIPS[name]
    finally:
        _forced.reset(token)


def forced() -> bool:
    """Whether kernels are being traced for a chip that need not be at hand."""
    return _forced.get() is not None
