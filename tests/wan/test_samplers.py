"""Samplers against committed trajectories of Diffusers, and what they promise."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vmonarch_jax.models.wan.guidance import guided
from vmonarch_jax.models.wan.samplers import SAMPLERS, Euler, follow, sampler_of
from vmonarch_jax.models.wan.unipc import DPMSolver, UniPC
from wan_sampling import CASES, ORIGINAL, field, relative

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "wan" / "samplers.npz"
GOLDENS_ORIGINAL = GOLDENS.with_name("samplers_original.npz")


@pytest.mark.parametrize(
    ("file", "name", "sampler"),
    [
        *((GOLDENS, *case) for case in CASES.items()),
        *((GOLDENS_ORIGINAL, *case) for case in ORIGINAL.items()),
    ],
)
def test_whole_trajectory_of_diffusers_and_of_the_original(file, name, sampler):
    stored = np.load(file)
    np.testing.assert_allclose(sampler.times, stored[f"{name}_times"], rtol=1e-6)
    state = sampler.init(stored["noise"])
    step = jax.jit(sampler.step)
    for n in range(sampler.steps):
        state = step(state, field(state.x, sampler.times[n]), n)
        assert relative(state.x, stored[name][n]) <= 1e-5, f"step {n}"


@pytest.mark.parametrize("name", ["unipc_20_5", "dpm_7_3", "euler_7_3"])
def test_scan_is_the_host_loop(name):
    sampler, stored = CASES[name], np.load(GOLDENS)
    got = jax.jit(lambda x: follow(sampler, x, field))(stored["noise"])
    assert relative(got, stored[name][-1]) <= 1e-5


@pytest.mark.parametrize(
    "sampler", [UniPC(9, 3.0), DPMSolver(9, 3.0, spacing="original"), Euler(9, 3.0)]
)
def test_straight_flows_are_followed_exactly(sampler):
    """Where every velocity is noise minus one video, any sampler that starts from noise alone ends
    on that video."""
    noise, video = np.random.default_rng(0).normal(size=(2, 1, 3, 4, 5, 6)).astype(np.float32)
    got = follow(sampler, noise, lambda x, time: jnp.asarray(noise - video))
    np.testing.assert_allclose(got, video, atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_finite(name, steps):
    noise = np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float32)
    assert np.isfinite(follow(sampler_of(name, steps, 5.0), noise, field)).all()


def test_higher_order_converges_faster():
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), jnp.float32)
    smooth = lambda x, time: jnp.tanh(x) * jnp.cos(time / 1000)  # noqa: E731
    exactly_noise = DPMSolver(20, 1.0, spacing="original")
    exact = follow(Euler(steps=4000, shift=1.0), noise, smooth)
    errors = {
        sampler: relative(follow(sampler, noise, smooth), np.asarray(exact))
        for sampler in (
            UniPC(20, 1.0), UniPC(20, 1.0, order=1), Euler(20, 1.0), exactly_noise
        )
    }  # fmt: skip
    assert errors[UniPC(20, 1.0)] < errors[exactly_noise] < 0.5 * errors[Euler(20, 1.0)]
    assert errors[UniPC(20, 1.0)] < 0.5 * errors[UniPC(20, 1.0, order=1)]
    assert errors[UniPC(20, 1.0)] < 0.2 * errors[Euler(20, 1.0)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_saved_state_goes_on_bit_for_bit(name):
    sampler = sampler_of(name, 6, 5.0)
    step = jax.jit(sampler.step)
    state = sampler.init(np.random.default_rng(2).normal(size=(2, 7)))
    for n in range(6):
        if n == 3:
            saved = type(state)(*(np.asarray(array) for array in state))
        state = step(state, field(state.x, sampler.times[n]), n)
    again = type(state)(*map(jnp.asarray, saved))
    for n in range(3, 6):
        again = step(again, field(again.x, sampler.times[n]), n)
    np.testing.assert_array_equal(again.x, state.x)


def test_samplers_are_values():
    assert hash(UniPC(20)) == hash(UniPC(20))
    assert UniPC(20) != UniPC(21)
    assert UniPC(20) != DPMSolver(20)
    assert dataclasses.replace(UniPC(20), order=1).order == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniPC(0), "steps >= 1"),
        (lambda: Euler(5, shift=0.0), "shift > 0"),
        (lambda: UniPC(5, order=3), "order 1 or 2, got 3"),
        (lambda: UniPC(5, spacing="even"), "spacing"),
        (lambda: sampler_of("euler", 5, 1.0, "original"), "'diffusers' of sampler 'euler', got"),
        (lambda: sampler_of("heun", 5, 1.0), "expected a sampler of .*got 'heun'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_guidance_batched_and_sequential():
    rng = np.random.default_rng(3)
    x, text, negative = (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(3))
    time, image = jnp.array([500.0, 20.0]), jnp.asarray(rng.normal(size=(2, 1)))

    def velocity(x, time, image, text):
        assert len(x) == len(time) == len(image) == len(text)
        return x * text + time[:, None, None] + image[..., None]

    expected = velocity(x, time, image, negative + 3.0 * (text - negative))
    for batched in (True, False):
        got = guided(velocity, (x, time, image), text, negative, 3.0, batched=batched)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    got = guided(velocity, (x, time, image), text, None, 3.0)
    np.testing.assert_array_equal(got, velocity(x, time, image, text))
    without = guided(lambda x, image, text: x * text, (x, None), text, negative, 2.0)
    np.testing.assert_allclose(without, x * (2 * text - negative), rtol=1e-5)
