"""Flow matching and samplers, against formulas and differential equations with known solutions."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vmonarch_jax.models import (
    FlowConfig,
    VideoDiTConfig,
    flow_loss,
    guide,
    integrate,
    interpolate,
    sample,
    shift_time,
    time_steps,
)
from vmonarch_jax.models.flow import sample_times

import vmonarch_jax as vm

SMALL = VideoDiTConfig(
    frames=2, height=4, width=4, patch=(1, 2, 2), dim=24, depth=2, heads=2, caption_dim=3, classes=4
)


@pytest.fixture(scope="module")
def model(awake):
    return awake(SMALL)


def test_path_goes_from_video_to_noise_at_its_velocity():
    video, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    for t, expected in [(0.0, video), (1.0, noise)]:
        chex.assert_trees_all_close(interpolate(video, noise, jnp.full(3, t))[0], expected)
    t = jnp.array([0.1, 0.5, 0.7])
    x, velocity = interpolate(video, noise, t)
    later, _ = interpolate(video, noise, t + 0.25)
    chex.assert_trees_all_close((later - x) / 0.25, velocity, atol=1e-5)


def test_shift_time():
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shift_time(t, 1.0), t)
    np.testing.assert_allclose(shift_time(0.5, 3.0), 0.75)
    # odds of noise against video are multiplied by the shift
    shifted = shift_time(t[1:-1], 2.5)
    np.testing.assert_allclose(shifted / (1 - shifted), 2.5 * t[1:-1] / (1 - t[1:-1]))


def test_times_are_shifted_logit_normal_and_stratified():
    config = FlowConfig(shift=3.0, logit_mean=-0.5, logit_std=0.7)
    t = np.concatenate([sample_times(jax.random.key(n), 64, config) for n in range(100)])
    back = t / (3 - 2 * t)
    logits = np.log(back / (1 - back))
    np.testing.assert_allclose([logits.mean(), logits.std()], [-0.5, 0.7], atol=0.01)
    first = np.array([sample_times(jax.random.key(n), 4, config) for n in range(200)])
    quartiles = np.quantile(t, [0.25, 0.5, 0.75])
    for n in range(4):
        assert (np.digitize(first[:, n], quartiles) == n).mean() > 0.95
    loose = np.random.default_rng(0).choice(t, (200, 4)).mean(1).std()
    assert first.mean(1).std() < 0.5 * loose


def test_loss_is_that_of_the_velocity_it_should_predict():
    video = 0.5 * jax.random.normal(jax.random.key(0), (512, 2, 4, 4, 3))
    label, caption = jnp.zeros(512, int), jnp.ones((512, 3))
    seen = {}

    def perfect(x, t, label, caption):
        seen.update(label=label, caption=caption, t=t)
        return (x - video) / t[:, None, None, None, None]

    config = FlowConfig(label_dropout=0.25, caption_dropout=0.5)
    args = video, label, caption, jax.random.key(3)
    chex.assert_trees_all_close(
        flow_loss(perfect, *args, null_label=4, config=config), 0.0, atol=1e-4
    )
    zero = flow_loss(lambda x, *_: 0 * x, *args, null_label=4, config=config)
    np.testing.assert_allclose(zero, 1 + 0.5**2, rtol=0.02)
    assert set(np.unique(seen["label"])) == {0, 4}
    np.testing.assert_allclose((seen["label"] == 4).mean(), 0.25, atol=0.07)
    dropped = np.all(np.asarray(seen["caption"]) == 0, axis=1)
    np.testing.assert_allclose(dropped.mean(), 0.5, atol=0.08)
    assert np.all(np.asarray(seen["caption"])[~dropped] == 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shift": 0.0}, "shift > 0"),
        ({"label_dropout": 1.5}, "label_dropout in [0, 1], got 1.5"),
        ({"caption_dropout": -0.1}, "caption_dropout in [0, 1], got -0.1"),
    ],
)
def test_flow_errors(change, words):
    with pytest.raises(ValueError) as error:
        FlowConfig(**change)
    assert words in str(error.value)


def test_guidance_formula():
    calls = []

    def velocity(x, t, label, caption):
        calls.append(x.shape[0])
        return x * t[:, None] + label[:, None] + caption.sum(-1, keepdims=True)

    x, t = jnp.ones((2, 3)), jnp.array([0.2, 0.4])
    label, caption = jnp.array([1, 2]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    conditional = velocity(x, t, label, caption)
    null = velocity(x, t, jnp.array([7, 7]), 0 * caption)
    calls.clear()
    chex.assert_trees_all_close(
        guide(velocity, 2.5, 7)(x, t, label, caption), null + 2.5 * (conditional - null)
    )
    chex.assert_trees_all_close(guide(velocity, 1, 7)(x, t, label, caption), conditional)
    assert calls == [4, 2], "guidance is one call on a doubled batch, and none is needed at 1"


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_accuracy(solver, order):
    """dx/dt = x cos(4 t), whose solution is exp(sin(4 t) / 4)."""
    start = jnp.exp(jnp.sin(4.0) / 4)[None, None]

    def error(steps):
        end = integrate(lambda x, t: x * jnp.cos(4 * t), start, time_steps(steps), solver)
        return abs(float(end[0, 0]) - 1)

    with jax.enable_x64(True):
        start = jnp.asarray(start, jnp.float64)
        rate = np.log2(error(64) / error(128))
    assert abs(rate - order) < 0.25


def test_time_steps():
    np.testing.assert_allclose(time_steps(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(time_steps(4, 3.0), shift_time(np.linspace(1, 0, 5), 3.0))
    times = time_steps(5, 2.0, start=0.6)
    np.testing.assert_allclose([times[0], times[-1]], [0.6, 0], atol=1e-6)
    assert np.all(np.diff(times) < 0)
    for args, words in [((0,), "steps >= 1"), ((3, 0.0), "shift > 0"), ((3, 1.0, 1.5), "(0, 1]")]:
        with pytest.raises(ValueError) as error:
            time_steps(*args)
        assert words in str(error.value)


def by_hand(forward, model, x, times, label, caption, guidance):
    null = jnp.full_like(label, SMALL.classes)
    for t, after in itertools.pairwise(times):
        t_batch = jnp.full(x.shape[0], t)
        conditional = forward(model, x, t_batch, label, caption)
        plain = forward(model, x, t_batch, null)
        x = x + (after - t) * (plain + guidance * (conditional - plain))
    return jnp.clip(x, -1, 1)


def test_sample_is_the_loop_over_steps(model, forward):
    label, caption = jnp.array([0, 3]), jnp.eye(3)[:2]
    key = jax.random.key(7)
    noise = jax.random.normal(key, (2, 2, 4, 4, 3))
    expected = by_hand(forward, model, noise, time_steps(3, 2.0), label, caption, 1.7)
    got = sample(model, key, label, caption, steps=3, guidance=1.7, shift=2.0)
    chex.assert_trees_all_close(got, expected, atol=1e-4)
    seen = []
    stepwise = sample(
        model, key, label, caption, steps=3, guidance=1.7, shift=2.0,
        on_step=lambda n, x: seen.append(n),
    )  # fmt: skip
    chex.assert_trees_all_close(stepwise, got, atol=1e-5)
    assert seen == [1, 2, 3]


def test_sample_from_a_start_and_under_another_attention(model, forward):
    label = jnp.array([1, 2])
    x = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))
    expected = by_hand(forward, model, x, time_steps(2, 1.5, 0.5), label, None, 1.0)
    got = sample(model, None, label, steps=2, shift=1.5, start=(x, 0.5), guidance=1)
    chex.assert_trees_all_close(got, expected, atol=1e-4)

    def values(q, k, v, *, grid):
        return v

    other = sample(
        model, None, label, steps=2, shift=1.5, start=(x, 0.5), guidance=1, attention=values
    )
    assert jnp.abs(other - got).max() > 1e-3


def test_heun_and_other_sizes(model):
    label = jnp.array([1])
    out = sample(model, jax.random.key(0), label, steps=2, solver="heun", size=(3, 6, 4))
    chex.assert_shape(out, (1, 3, 6, 4, 3))
    chex.assert_tree_all_finite(out)
    assert jnp.abs(out).max() <= 1


def test_samples_are_repeatable(model):
    label = jnp.array([1])
    one, two, three = (
        sample(model, jax.random.key(n), label, steps=2, attention=vm.VMonarch()) for n in (0, 0, 1)
    )
    chex.assert_trees_all_equal(one, two)
    assert jnp.abs(one - three).max() > 0.1


def test_sample_errors(model):
    with pytest.raises(ValueError, match=r"expected a solver of .* got 'rk4'"):
        sample(model, jax.random.key(0), jnp.array([0]), solver="rk4")
    with pytest.raises(ValueError, match=r"expected a key, or start=\(x, t\), got neither"):
        sample(model, None, jnp.array([0]))
