"""Methods that remember: their states through the layers, the samplers, guidance and schedules."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from flax import nnx
from remembering import ByHand, Echo
from vmonarch_jax.models import (
    AttentionSchedule,
    VideoDiT,
    VideoDiTConfig,
    sample,
    split_params,
    time_steps,
)
from vmonarch_jax.models.sampler import _follow

import vmonarch_jax as vm

SMALL = VideoDiTConfig(
    frames=2, height=4, width=4, patch=(1, 2, 2), dim=24, depth=2, heads=2, caption_dim=3, classes=4
)
LABEL, CAPTION = jnp.array([0, 3]), jnp.eye(3)[:2]
NOISE = jax.random.normal(jax.random.key(7), (2, *SMALL.video_shape))
DENSE, ECHO, LOUD = vm.Dense(), Echo(), Echo(1.5)


@pytest.fixture(scope="module")
def model(awake):
    return awake(SMALL)


def by_hand(model, schedule, steps, guidance, solver="euler"):
    """The sampler as a loop, whose methods are objects that keep what they remember themselves.

    `schedule[step][layer]` is a method value; an `Echo` stands for the object of its layer.
    """

    times = np.asarray(time_steps(steps, 6.0))

    @jit
    def run(params, x):
        model = rebuild(params)
        objects = {}

        def method(value, layer, step):
            if not isinstance(value, Echo):
                return value
            found = objects.setdefault((value, layer), ByHand(value.weight))
            found.step = step
            return found

        def velocity(x, t, step):
            methods = [method(value, layer, step) for layer, value in enumerate(schedule[step])]
            if guidance == 1:
                return model(x, jnp.full(2, t), LABEL, CAPTION, attention=methods)
            both = model(
                jnp.concatenate([x, x]), jnp.full(4, t), jnp.concatenate([LABEL, 0 * LABEL + 4]),
                jnp.concatenate([CAPTION, 0 * CAPTION]), attention=methods,
            )  # fmt: skip
            return both[2:] + guidance * (both[:2] - both[2:])

        for step, (t, after) in enumerate(itertools.pairwise(times)):
            v = velocity(x, t, step)
            if solver == "heun" and after > 0:
                v = (v + velocity(x + (after - t) * v, after, step)) / 2
            x = x + (after - t) * v
        return jnp.clip(x, -1, 1)

    rebuild, params = split_params(model)
    return run(params, NOISE)


def sampled(model, attention, **options):
    options = {"steps": 5, "start": (NOISE, 1.0), **options}
    return sample(model, None, LABEL, CAPTION, attention=attention, **options)


@pytest.mark.parametrize("guidance", [pytest.param(1, marks=pytest.mark.slow), 1.7])
def test_sampler_is_the_loop_of_objects(model, guidance):
    expected = by_hand(model, [(ECHO, ECHO)] * 5, 5, guidance)
    got = sampled(model, ECHO, guidance=guidance)
    chex.assert_trees_all_close(got, expected, atol=1e-4)
    assert jnp.abs(got - sampled(model, DENSE, guidance=guidance)).max() > 0.05
    seen = []
    stepwise = sampled(
        model, ECHO, guidance=guidance, on_step=lambda n, x: seen.append((n, x.shape))
    )
    chex.assert_trees_all_close(stepwise, got, atol=1e-5)
    assert seen == [(n, NOISE.shape) for n in range(1, 6)]


# On 2 frames of 2 x 2 tokens; each has a step of every kind among the first five.
OURS = {
    "adaspa": vm.AdaSpa(0.5, 2, (1, 3), warmup_steps=1),
    "guided": vm.Guided(vm.VMonarch(block=(2, 1, 1), recompute_frames=0), every=2),
    "corrected": vm.Corrected(vm.VMonarch(recompute_frames=0), every=2, dtype="float8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", OURS.values(), ids=OURS.keys())
def test_guidance_in_a_scan_is_two_models_that_remember_apart(model, method):
    """The sampler scans over steps on a doubled batch; by hand each video and text goes alone."""
    times = np.asarray(time_steps(5, 6.0))
    conditions = [(LABEL, CAPTION), (jnp.full(2, SMALL.classes), jnp.zeros_like(CAPTION))]
    rebuild, params = split_params(model)

    @jit
    def alone(params, x, label, caption, t, state, step):
        return rebuild(params)(
            x, t, label, caption, attention=method, attention_state=state, step=step
        )

    videos = []
    for n in range(2):
        x = NOISE[n : n + 1]
        states = [model.init_attention_state(1, attention=method) for _ in conditions]
        for step, (t, after) in enumerate(itertools.pairwise(times)):
            found = []
            for which, (label, caption) in enumerate(conditions):
                v, states[which] = alone(
                    params, x, label[n : n + 1], caption[n : n + 1], jnp.full(1, t),
                    states[which], jnp.int32(step),
                )  # fmt: skip
                found.append(v)
            x = x + (after - t) * (found[1] + 1.7 * (found[0] - found[1]))
        videos.append(jnp.clip(x, -1, 1))
    got = sampled(model, method, guidance=1.7)
    # float8 may round a sum that differs in its last bit to either side
    chex.assert_trees_all_close(got, jnp.concatenate(videos), atol=1e-3)
    assert jnp.abs(got - sampled(model, DENSE, guidance=1.7)).max() > 0.01


def test_both_calls_of_a_step_of_heun_are_remembered(model):
    expected = by_hand(model, [(ECHO, DENSE)] * 3, 3, 1, "heun")
    got = sampled(model, (ECHO, DENSE), steps=3, guidance=1, solver="heun")
    chex.assert_trees_all_close(got, expected, atol=1e-4)


def test_a_schedule_keeps_states_by_method_and_layer(model):
    schedule = AttentionSchedule(ECHO, warmup_steps=1, layers={1: LOUD}, steps={3: DENSE, 4: LOUD})
    by_step = [(DENSE, DENSE), (ECHO, LOUD), (ECHO, LOUD), (DENSE, DENSE), (LOUD, LOUD)]
    by_step += [(ECHO, LOUD)]
    expected = by_hand(model, by_step, 6, 1.7)
    got = sampled(model, schedule, steps=6, guidance=1.7)
    chex.assert_trees_all_close(got, expected, atol=1e-4)
    stepwise = sampled(model, schedule, steps=6, guidance=1.7, on_step=lambda n, x: None)
    chex.assert_trees_all_close(stepwise, got, atol=1e-5)


def test_layers_may_be_scanned_and_recomputed(model, awake):
    other = awake(dataclasses.replace(SMALL, scan_layers=True, remat=True))
    chex.assert_trees_all_close(
        sampled(other, ECHO, steps=2), sampled(model, ECHO, steps=2), atol=1e-4
    )

    def gradient(model):
        rebuild, params = split_params(model)

        def loss(params):
            state = jax.tree.map(jnp.ones_like, model.init_attention_state(2, attention=ECHO))
            x, state = rebuild(params)(
                NOISE, jnp.ones(2), LABEL, attention=ECHO, attention_state=state, step=1
            )
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves((x, state[1]["last"])))

        return jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(gradient(other), gradient(model), rtol=1e-3, atol=1e-4)


def test_states_of_a_model(model, forward):
    states = model.init_attention_state(3, (3, 4, 8), (ECHO, DENSE))
    assert states[1] is None
    chex.assert_shape(states[0]["last"], (3, 2, 3 * 2 * 4, 12))
    wide = dataclasses.replace(SMALL, dtype="bfloat16")
    other = nnx.eval_shape(lambda: VideoDiT(wide, attention=ECHO, rngs=nnx.Rngs(0)))
    assert other.init_attention_state(1)[0]["last"].dtype == jnp.bfloat16
    inputs = NOISE, jnp.ones(2), LABEL
    plain, dense = (forward(model, *inputs, attention=method) for method in (ECHO, DENSE))
    chex.assert_trees_all_close(plain, dense, atol=1e-5)
    with pytest.raises(ValueError, match="expected attention_state of 2 layers, got 1"):
        model(*inputs, attention=ECHO, attention_state=states[:1], step=0)
    with pytest.raises(ValueError, match="expected the number of the step"):
        model(*inputs, attention=ECHO, attention_state=(None, None))


def test_linear_branches_change_no_state():
    config = dataclasses.replace(SMALL, linear_layers=(1,))
    model = nnx.eval_shape(lambda: VideoDiT(config, attention=ECHO, rngs=nnx.Rngs(0)))
    rebuild, params = split_params(model)

    def call(params, state):
        return rebuild(params)(NOISE, jnp.ones(2), LABEL, attention_state=state, step=0)

    state = model.init_attention_state(2)
    velocity, after = jax.eval_shape(call, params, state)
    chex.assert_shape(velocity, NOISE.shape)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_one_program_serves_all_steps(model):
    """With `on_step`, neither the number of a step nor a first state makes another program."""
    placed = jax.device_put(NOISE, jax.devices()[0])
    rebuild, params = split_params(model)
    model = rebuild(jax.device_put(params, jax.devices()[0]))
    before = _follow._cache_size()
    sampled(model, Echo(0.25), start=(placed, 1.0), on_step=lambda n, x: None)
    assert _follow._cache_size() == before + 1
