"""What attention remembers through the Wan transformer, its pipeline and an interrupted run."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from flax import nnx
from remembering import ByHand, Echo
from vmonarch_jax.models import AttentionSchedule
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.generate.partial import Partial
from vmonarch_jax.models.wan.generate.plan import denoising_flops
from vmonarch_jax.models.wan.memory import after, begin, state_bytes
from vmonarch_jax.models.wan.pipeline import Progress, WanPipeline, _step_in_place
from vmonarch_jax.models.wan.transformer import WanTransformer
from vmonarch_jax.models.wan.transformer_layers import OneDevice
from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config
from wan_pipeline_cases import CASES as PIPELINES
from wan_transformer_cases import CASES, inputs_of, params_of, relative_error, stored_weights

import vmonarch_jax as vm

DENSE, ECHO, LOUD = vm.Dense(), Echo(), Echo(1.5)


class Objects(OneDevice):
    """Runs objects that keep what they remember themselves, one for each layer with an `Echo`."""

    def __init__(self, methods):
        self.methods, self.layer = methods, 0
        self.objects = [ByHand(m.weight) if isinstance(m, Echo) else None for m in methods]

    def attend(self, method, q, k, v, grid, state=None, step=None):
        own = None
        if grid is not None:
            assert method == self.methods[self.layer]
            own, self.layer = self.objects[self.layer], (self.layer + 1) % len(self.methods)
        if own is None:
            return super().attend(method, q, k, v, grid)
        return own(q, k, v, grid=grid)


def test_transformer_is_the_loop_over_objects(monkeypatch):
    case, methods = CASES["text"], (ECHO, DENSE, LOUD)
    make = functools.partial(WanTransformer, case.config, attention=methods)
    rebuild = split_params(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]
    params, x = params_of(case.config, stored_weights(case.config)), inputs_of(case)
    x = [x | {"time": time} for time in (x["time"], x["time"] / 2)]

    @jax.jit
    def call(params, x, memory, step):
        return rebuild(params)(**x, memory=memory, step=step)

    def loop(params):
        objects = Objects(methods)
        for step, inputs in enumerate(x):
            for own in objects.objects:
                if own is not None:
                    own.step = step
            yield rebuild(params)(**inputs, sharding=objects)

    memory = begin(case.config, case.grid, 2, methods)
    got = []
    for step, inputs in enumerate(x):
        v, memory = call(params, inputs, memory, step)
        got.append(v)
    with monkeypatch.context() as patch:  # a scan is a loop, and a switch runs its branch alone
        patch.setattr(jax.lax, "scan", _scan)
        patch.setattr(jax.lax, "switch", lambda index, calls, *args: calls[int(index)](*args))
        expected = jit(lambda params: list(loop(params)))(params)
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= 1e-5
    without = call(params, x[1], None, None)
    assert relative_error(got[1], without) > 1e-3


def _scan(body, carry, layers):
    leaves, tree = jax.tree.flatten(layers)
    for n in range(len(leaves[0])):
        carry, _ = body(carry, jax.tree.unflatten(tree, [leaf[n] for leaf in leaves]))
    return carry, None


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = random_folder(tmp_path_factory.mktemp("weights") / "wan", small_config("t2v-two"))
    return WanPipeline.open(folder, "float32")


REQUEST = PIPELINES["two_experts"].request


def test_pipeline_keeps_and_forgets(pipeline):
    """Each expert has a memory of its own; other methods in between do not break it."""
    conditions, noise = pipeline.conditions(REQUEST), pipeline.noise(REQUEST)
    parts = [part for part, _ in REQUEST.experts(pipeline.config)]
    assert parts == ["transformer"] * 3 + ["transformer_2"] * 2
    schedule = AttentionSchedule(ECHO, steps={1: DENSE}, layers={0: DENSE})
    calls, kept = [], {}

    def on_step(n, progress):
        counts = [np.unique(m.of(ECHO)["calls"]).tolist() for m in progress.attention]
        calls.append((n, counts))
        kept[n] = jax.tree.map(np.array, progress)
        assert [m.states for m in after(pipeline.config, REQUEST, schedule, n, True)] == [
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), m.states)
            for m in progress.attention
        ]

    before = _step_in_place._cache_size()
    run = functools.partial(pipeline.denoise, REQUEST, conditions, noise, attention=schedule)
    latents = np.asarray(run(on_step=on_step))
    # step 2 of 5 is dense; layer 0 has a state and is never called; nothing is left after an expert
    assert calls == [(1, [[0, 1]]), (2, [[0, 1]]), (3, []), (4, [[0, 1]]), (5, [])]
    assert _step_in_place._cache_size() == before + 2, "one for each tuple of methods"
    assert np.abs(latents - np.asarray(run(attention=DENSE))).max() > 1e-3
    for n in (1, 4):
        np.testing.assert_array_equal(run(start=(n, kept[n])), latents)
    two = run(batched=False, on_step=lambda n, p: kept.update({n: jax.tree.map(np.array, p)}))
    chex.assert_trees_all_close(np.asarray(two), latents, atol=1e-4)
    assert len(kept[2].attention) == 2
    shapes = [m.of(ECHO)["last"].shape for m in kept[2].attention]
    assert shapes == [(3, 1, 3, 16, 16)] * 2


def test_a_step_may_leave_its_input_as_it_is(pipeline):
    conditions = pipeline.conditions(REQUEST)
    start = pipeline.begin(REQUEST, pipeline.noise(REQUEST))
    step = functools.partial(pipeline.step, REQUEST, conditions, attention=ECHO)
    first = step(0, start)
    chex.assert_trees_all_equal(step(1, first), step(1, first))
    step(1, first, in_place=True)
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        step(1, first)


def test_kept_progress_comes_back_bit_for_bit(tmp_path):
    """Also in dtypes that NumPy does not know."""
    config = small_config("t2v")
    request = dataclasses.replace(PIPELINES["euler"].request, steps=4)
    attention = AttentionSchedule(vm.Corrected(dtype="float8"), layers={0: vm.Corrected()})
    sampler = request.sampler_value()
    remembered = functools.partial(after, config, request, attention, batched=False)
    shapes = remembered(2)
    assert len(shapes) == 2
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    progress = Progress(sampler.init(jnp.ones((1, 2, 4))), jax.tree.map(draw, shapes))
    partial = Partial(tmp_path / "kept", {}, resume=True)
    partial.begin()
    partial.keep_progress("main", 2, progress)
    step, got = partial.progress("main", sampler, remembered)
    assert step == 2
    chex.assert_trees_all_equal(got, progress)
    chex.assert_trees_all_equal_dtypes(got, progress)
    assert {leaf.dtype for leaf in jax.tree.leaves(got.attention)} >= {
        jnp.dtype("bfloat16"), jnp.dtype("float8_e4m3fn"), jnp.dtype(bool)
    }  # fmt: skip


def test_slow_writing_is_done_rarely(tmp_path, monkeypatch):
    sampler = PIPELINES["euler"].request.sampler_value()
    clock = iter([0.0, 2.0, 10.0, 41.9, 42.0, 42.1, 43.0, 43.1])  # begin and end of each writing
    monkeypatch.setattr("vmonarch_jax.models.wan.generate.partial.time.monotonic", clock.__next__)
    partial = Partial(tmp_path / "kept", {}, resume=True)
    partial.begin()
    found = []
    for step in range(1, 6):
        partial.keep_progress("main", step, Progress(sampler.init(jnp.ones((1, 2, 4)))))
        found.append(partial.progress("main", sampler, lambda step: ())[0])
    # the first writing takes two seconds: none in the next forty; after a quick one all are kept
    assert found == [1, 1, 1, 4, 5]


def test_what_a_killed_run_leaves(tmp_path, monkeypatch):
    sampler, folder = PIPELINES["euler"].request.sampler_value(), tmp_path / "kept"
    begun = Progress(sampler.init(jnp.ones((1, 2, 4))))
    clock = iter([0.0, 2.0, 3.0, 3.0, 5.0])  # two seconds for each writing
    monkeypatch.setattr("vmonarch_jax.models.wan.generate.partial.time.monotonic", clock.__next__)
    partial = Partial(folder, {"seed": 1, "steps": 3}, resume=False)
    partial.begin()
    # killed while the first step was written: nothing is lost, so nothing is asked
    (folder / ".main.partial.npz").write_bytes(b"half")
    Partial(folder, {"seed": 1, "steps": 4}, resume=False)
    for step in (1, 2, 3):
        partial.keep_progress("main", step, begun, last=step == 3)
    assert partial.progress("main", sampler, lambda step: ())[0] == 3, "however slow writing is"
    with pytest.raises(ValueError, match="expected --resume"):
        Partial(folder, {"seed": 1, "steps": 3}, resume=False)
    with pytest.raises(ValueError, match="expected seed of 1, got 2; steps of 3, got 4"):
        Partial(folder, {"seed": 2, "steps": 4}, resume=True)
    for damage in (b"", b"no zip"):
        (folder / "main.npz").write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            partial.progress("main", sampler, lambda step: ())
    partial.remove()
    assert not list(tmp_path.iterdir())


def test_bytes_and_flops():
    config = small_config("t2v-two")
    sizes, grid = config.transformer, REQUEST.grid(config)
    method = vm.Corrected(every=2)
    residual = 2 * sizes.layers * grid.tokens * sizes.dim * 2 + 2 * sizes.layers  # bf16; two texts
    for batched in (True, False):
        held = state_bytes(config, REQUEST, method, batched)
        assert held == {"transformer": residual, "transformer_2": residual}
    assert state_bytes(config, REQUEST, vm.VMonarch(), True) == dict.fromkeys(held, 0)
    refreshed, ordinary, plain, dense = (
        denoising_flops(config, REQUEST, m)
        for m in (vm.Corrected(every=1), vm.VMonarch(), method, DENSE)
    )
    # steps 0, 2 and 4 of 5, and 3, the second expert's first
    assert plain - ordinary == (refreshed - ordinary) * 4 // 5
    assert refreshed > dense
