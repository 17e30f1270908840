"""Samplers against the schedulers of Diffusers, live."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from goldens.make_wan_samplers import trajectories
from wan_sampling import CASES, field, relative


@pytest.mark.parametrize("name", CASES)
def test_trajectory_from_other_noise(name):
    noise = np.random.default_rng(11).normal(size=(1, 4, 3, 5, 7)).astype(np.float32)
    times, samples = trajectories(noise)[name]
    sampler = CASES[name]
    np.testing.assert_allclose(sampler.times, times, rtol=1e-6)
    state = sampler.init(noise)
    for n in range(sampler.steps):
        state = sampler.step(state, field(state.x, times[n]), n)
        assert relative(state.x, samples[n]) <= 1e-5, f"step {n}"
