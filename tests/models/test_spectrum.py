"""The spectral preconditioning, against SciPy's transform and the theory of linear estimation."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft
from vmonarch_jax.models.pipeline import MotionVideos
from vmonarch_jax.models.spectrum import Spectrum, from_modes, to_modes, wiener

SIZE = (4, 6, 8)


def test_modes_are_scipys_cosines():
    x = np.random.default_rng(0).normal(size=(2, *SIZE, 3)).astype(np.float32)
    modes = to_modes(jnp.asarray(x))
    np.testing.assert_allclose(
        modes[..., 0], fft.dctn(x, axes=(1, 2, 3), norm="ortho").sum(-1) / math.sqrt(3), atol=1e-5
    )
    chex.assert_trees_all_close(from_modes(modes), x, atol=1e-5)
    np.testing.assert_allclose(np.square(modes).sum(), np.square(x).sum(), rtol=1e-5)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_guesses_are_the_best_linear_ones(t):
    """On Gaussian videos of that very spectrum, errors are uncorrelated with what was seen."""
    spectrum = Spectrum()
    keys = jax.random.split(jax.random.key(0))
    shape = (4000, 2, 3, 4, 3)
    power = spectrum.power(shape[1:4])
    video = from_modes(jnp.sqrt(power) * jax.random.normal(keys[0], shape))
    noise = jax.random.normal(keys[1], shape)
    x = (1 - t) * video + t * noise
    guess, velocity, gain = wiener(x, jnp.full(shape[0], t), spectrum)
    seen = to_modes(x)
    seen = seen / jnp.std(seen, axis=0)
    for error in (to_modes(guess - video), to_modes(velocity - (noise - video))):
        correlation = (error / jnp.std(error, axis=0) * seen).mean(0)
        assert jnp.abs(correlation).max() < 0.08
    left = jnp.std(to_modes(velocity - (noise - video)), axis=0)
    np.testing.assert_allclose(gain[0], jnp.minimum(1, left), rtol=0.05)


def test_ends_of_the_path():
    x = jax.random.normal(jax.random.key(0), (2, *SIZE, 3))
    video, velocity, _ = wiener(x, jnp.array([0.0, 1.0]), Spectrum())
    chex.assert_trees_all_close(video[0], x[0], atol=1e-4)
    chex.assert_trees_all_close(velocity[0], -x[0], atol=1e-4)
    chex.assert_trees_all_close(video[1], 0 * x[1], atol=1e-6)
    chex.assert_trees_all_close(velocity[1], x[1], atol=1e-4)


@pytest.mark.parametrize(("frames", "size"), [(16, 32), (4, 32), (8, 16)])
def test_the_formula_fits_the_projects_videos(frames, size):
    """Its linear velocity is within a fifth of what the measured spectrum itself would give."""
    source = MotionVideos(0, length=480, frames=frames, size=size)
    modes = np.asarray(to_modes(jnp.stack([source[n]["video"] for n in range(0, 480, 7)])))
    measured = np.square(modes).mean(0)
    formula = Spectrum().power((frames, size, size))
    for t in (0.3, 0.6, 0.9):
        variance = t**2 + (1 - t) ** 2 * formula
        skip = (t - (1 - t) * formula) / variance
        # velocity = noise - video and x = t noise + (1 - t) video, mode by mode
        error = (1 - skip * t) ** 2 + measured * (1 + skip * (1 - t)) ** 2
        best = measured / (t**2 + (1 - t) ** 2 * measured)
        assert error.mean() < 1.2 * best.mean()
