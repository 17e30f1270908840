"""On which denoising steps a remembering method looks at the dense attention again."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from . import checks
from .grid import positive_int
from .memory import Step

# What a step does; the order of the branches of `memory.by_phase`.
REFRESH, ORDINARY = 0, 1


def check(refresh_steps: Any, every: Any) -> tuple[tuple[int, ...] | None, int | None]:
    """The fields of a schedule: sorted steps, or the number of steps from one to the next.

    Raises:
        ValueError: if a step is no integer of at least 0, `every` is no positive integer, or both
            are given.
    """
    if every is not None:
        every = positive_int("every", every)
    if refresh_steps is None:
        return None, every
    if every is not None:
        raise ValueError(
            f"expected `refresh_steps` or `every`, got both: {refresh_steps!r} and {every}"
        )
    if not isinstance(refresh_steps, (tuple, list)):
        raise ValueError(f"`refresh_steps` must be a tuple of steps, got {refresh_steps!r}")
    return tuple(sorted({checks.whole("refresh_steps", step) for step in refresh_steps})), None


def is_refresh(step: int, refresh_steps: tuple[int, ...] | None, every: int | None) -> bool:
    """Whether the schedule refreshes on `step`. Step 0 always does: nothing is known yet."""
    if step == 0:
        return True
    return step in (refresh_steps or ()) if every is None else step % every == 0


def phase_of(
    step: Step, filled: jax.Array, refresh_steps: tuple[int, ...] | None, every: int | None
) -> Step:
    """`REFRESH` on the steps of the schedule and until the state is `filled`, else `ORDINARY`.

    A Python int where step and `filled` tell, a traced one otherwise.

    Raises:
        ValueError: if `step` is no integer of at least 0.
    """
    # Entries of a batch have gone the same way: one that is empty means that all are.
    if not isinstance(step, jax.Array):
        if is_refresh(checks.whole("step", step), refresh_steps, every):
            return REFRESH
        # In NumPy: inside of `jit` JAX would make a traced value even of a known one.
        traced = isinstance(filled, jax.core.Tracer)
        if traced or not getattr(filled, "is_fully_addressable", True):
            return jnp.where(filled.all(), ORDINARY, REFRESH)
        return ORDINARY if np.asarray(filled).all() else REFRESH
    if step.ndim or not jnp.issubdtype(step.dtype, jnp.integer):
        raise ValueError(f"`step` must be an integer scalar, got {step.dtype} {step.shape}")
    if every is None:
        scheduled = jnp.isin(step, np.asarray((0, *(refresh_steps or ())), np.int32))
    else:
        scheduled = step % every == 0
    return jnp.where(scheduled | ~filled.all(), REFRESH, ORDINARY)
