"""What changes only the speed of a call, never its result."""

import dataclasses
import operator

import jax

# Scores that a chunk may hold: 1 MiB of float32 stays in a CPU core's own cache;
# an accelerator wants enough rows at once to fill its matrix units.
CPU_SCORES = 2**18
ACCELERATOR_SCORES = 2**26


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes that trade memory for speed and leave the result alone (up to rounding).

    Args:
        xla_scores: largest number of attention scores (elements, not bytes) that the "xla"
            implementation holds at once, at least one row of scores; `None` takes 2**18 on a
            CPU and 2**26 elsewhere.

    Raises:
        ValueError: if `xla_scores` is not a positive integer.
    """

    xla_scores: int | None = None

    def __post_init__(self) -> None:
        if self.xla_scores is None:
            return
        try:
            positive = self.xla_scores is not True and operator.index(self.xla_scores) > 0
        except TypeError:
            positive = False
        if not positive:
            raise ValueError(f"`xla_scores` must be a positive integer, got {self.xla_scores!r}")

    def scores(self) -> int:
        """Largest chunk of scores, in elements, resolved for the default device."""
        if self.xla_scores is not None:
            return self.xla_scores
        return CPU_SCORES if jax.default_backend() == "cpu" else ACCELERATOR_SCORES
