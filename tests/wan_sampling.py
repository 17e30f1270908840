"""What the tests of samplers share: cases by name, a velocity field, a measure of error."""

import jax.numpy as jnp
import numpy as np
from vmonarch_jax.models.wan.samplers import Euler
from vmonarch_jax.models.wan.unipc import DPMSolver, UniPC

CASES = {
    "unipc_20_5": UniPC(steps=20, shift=5.0),
    "unipc_7_3": UniPC(steps=7, shift=3.0),
    "unipc_20_12": UniPC(steps=20, shift=12.0),
    "unipc_20_5_first_order": UniPC(steps=20, shift=5.0, order=1),
    "unipc_20_5_original": UniPC(steps=20, shift=5.0, spacing="original"),
    "dpm_20_5": DPMSolver(steps=20, shift=5.0),
    "dpm_7_3": DPMSolver(steps=7, shift=3.0),
    "dpm_20_5_first_order": DPMSolver(steps=20, shift=5.0, order=1),
    "euler_20_5": Euler(steps=20, shift=5.0),
    "euler_7_3": Euler(steps=7, shift=3.0),
}

#: Of the original repository's schedulers.
ORIGINAL = {
    "unipc_50_5": UniPC(steps=50, shift=5.0, spacing="original"),
    "unipc_20_16": UniPC(steps=20, shift=16.0, spacing="original"),
    "unipc_7_3": UniPC(steps=7, shift=3.0, spacing="original"),
    "dpm_50_5": DPMSolver(steps=50, shift=5.0, spacing="original"),
    "dpm_20_16": DPMSolver(steps=20, shift=16.0, spacing="original"),
    "dpm_7_3": DPMSolver(steps=7, shift=3.0, spacing="original"),
}


def field(x, time):
    """A nonlinear velocity that mixes entries; the same formula as in the goldens' generator."""
    x = x.astype(jnp.float32)
    return jnp.sin(3 * x) + 0.5 * jnp.roll(x, 1, -1) * jnp.cos(time / 300) + x


def relative(got, expected):
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()
