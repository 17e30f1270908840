"""Videos from the same start under each method, and the seconds that they took."""

from __future__ import annotations

import time

import jax
import numpy as np
from jaxtyping import Float

from ..dit import VideoDiT
from ..sampler import sample
from .conditions import Conditions
from .progress import phase

#: Shift of the sampler's times: the last steps are long, and long steps near the video leave less
#: of the grain that a small model cannot tell from texture.
SHIFT = 4.0


def sample_from(
    model: VideoDiT, conditions: Conditions, steps: int, name: str
) -> tuple[Float[np.ndarray, "batch frames height width 3"], float]:
    """Returns the videos, and the seconds of all `steps` without compilation.

    Args:
      model: the model under its attention.
      conditions: what is sampled, from which start.
      steps: Euler steps.
      name: shown beside the progress bar.
    """
    # every later step starts from an array that is bound to its device, as loaded weights are; one
    # that is not would make the first step another program, compiled for nothing
    start = jax.device_put(conditions.x, jax.devices()[0]), conditions.t

    def run(steps: int, on_step):
        return sample(
            model, None, conditions.label, conditions.caption, steps=steps,
            guidance=conditions.guidance, shift=SHIFT, start=start, on_step=on_step,
        )  # fmt: skip

    with phase(f"sampling: {name}", steps) as bar:
        # with `on_step` every step is the same compiled call, so one step compiles all of them
        jax.block_until_ready(run(1, lambda n, x: None))
        bar.unpause()
        began = time.perf_counter()
        videos = run(steps, lambda n, x: (jax.block_until_ready(x), bar.update()))
        seconds = time.perf_counter() - began
    return np.asarray(videos), seconds
