"""What changes only the speed of a call, never its result."""

import dataclasses
import operator

import jax

from .gpu import mode

# Scores that a chunk may hold: 1 MiB of float32 stays in a CPU core's own cache;
# an accelerator wants enough rows at once to fill its matrix units.
CPU_SCORES = 2**18
ACCELERATOR_SCORES = 2**26

# A heads-major copy of q beyond this is made a tenth of the heads at a time. A GPU wants more rows
# at once, and has more memory.
COPY_BYTES = 2**28
GPU_COPY_BYTES = 2**29
# Where nothing is copied, arrays of the size of q are all there is (six in the backward pass), and
# heads cut out of a caller's arrays are what would be copied.
GPU_WHOLE_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes that trade memory for speed and leave the result alone (up to rounding).

    Args:
        xla_scores: largest number of attention scores (elements, not bytes) that the "xla"
            implementation holds at once, at least one row of scores; `None` takes 2**18 on a
            CPU and 2**26 elsewhere.
        tpu_rows: rows of scores that a TPU kernel works on at a time, in tokens.
        tpu_keys: keys that a TPU kernel holds in VMEM at a time, in tokens.
        tpu_positions: positions of a block that a TPU kernel's L step takes at a time.
        tpu_tiles: query tiles that the fused tiled kernel takes at a time.
        copy_bytes: a tenth of the heads is computed at a time where a heads-major copy of one of
            the inputs would be larger than this; `None` takes 256 MiB, and 512 MiB on a GPU (2 GiB,
            of an input itself, for GPU kernels that need no copies). Kernels that keep no scores in
            memory go by it, "xla" by `xla_scores`.

    The TPU fields are wishes, rounded to what the chip can do; `None` takes the tuned table's.

    Raises:
        ValueError: if a field is neither `None` nor a positive integer.
    """

    xla_scores: int | None = None
    tpu_rows: int | None = None
    tpu_keys: int | None = None
    tpu_positions: int | None = None
    tpu_tiles: int | None = None
    copy_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            try:
                positive = value is not True and operator.index(value) > 0
            except TypeError:
                positive = False
            if not positive:
                raise ValueError(f"`{field.name}` must be a positive integer, got {value!r}")

    def scores(self) -> int:
        """Largest chunk of scores, in elements, resolved for the default device."""
        if self.xla_scores is not None:
            return self.xla_scores
        if jax.default_backend() == "cpu" and not mode.compiling_ahead():
            return CPU_SCORES
        return ACCELERATOR_SCORES

    def bytes(self, copied: bool = True) -> int:
        """Largest heads-major copy of an input, in bytes; or input, where none is `copied`."""
        if self.copy_bytes is not None:
            return self.copy_bytes
        on_gpu = jax.default_backend() == "gpu" or mode.compiling_ahead()
        if not on_gpu:
            return COPY_BYTES
        return GPU_COPY_BYTES if copied else GPU_WHOLE_BYTES
