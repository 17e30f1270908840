"""Which method runs where, and that the small model's sampler obeys."""

import jax
import numpy as np
import pytest
from flax import nnx
from remembering import Echo
from vmonarch_jax.models import AttentionSchedule, VideoDiT, VideoDiTConfig, sample
from vmonarch_jax.models.attention_schedule import flops_of_steps

import vmonarch_jax as vm

DENSE, MONARCH, TILED = vm.Dense(), vm.VMonarch(), vm.TiledMonarch()


def test_order_of_precedence():
    schedule = AttentionSchedule(
        MONARCH, warmup_steps=2, layers={0: DENSE, -1: TILED}, steps={-1: DENSE, 0: TILED}
    )
    assert schedule.at(0, 5, 3) == (TILED,) * 3
    assert schedule.at(1, 5, 3) == (DENSE,) * 3
    assert schedule.at(2, 5, 3) == (DENSE, MONARCH, TILED)
    assert schedule.at(4, 5, 3) == (DENSE,) * 3


def test_neighbouring_steps_run_together():
    schedule = AttentionSchedule(MONARCH, warmup_steps=2)
    assert schedule.runs(5, 3) == [(0, 2, (DENSE,) * 3), (2, 5, (MONARCH,) * 3)]
    assert AttentionSchedule(DENSE, warmup_steps=2).runs(5, 3) == [(0, 5, (DENSE,) * 3)]
    assert schedule.runs(1, 3) == [(0, 1, (DENSE,) * 3)]


def test_is_a_value():
    one = AttentionSchedule(MONARCH, layers={1: DENSE, 0: TILED})
    other = AttentionSchedule(MONARCH, layers=((0, TILED), (1, DENSE)))
    assert one == other
    assert hash(one) == hash(other)
    traced = []

    @jax.jit
    def untouched(x):
        return x

    def count(x, schedule):
        traced.append(schedule)
        return x

    jitted = jax.jit(count, static_argnums=1)
    jitted(untouched(1.0), one), jitted(untouched(1.0), other)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AttentionSchedule(warmup_steps=-1), ValueError, "warmup_steps >= 0"),
        (lambda: AttentionSchedule(layers=((0, DENSE), (0, TILED))), ValueError, "layers once"),
        (lambda: AttentionSchedule("dense"), TypeError, "method value"),
        (lambda: AttentionSchedule(MONARCH).at(5, 5, 3), ValueError, r"step in \[0, 5\)"),
        (lambda: AttentionSchedule(layers={3: DENSE}).at(0, 5, 3), ValueError, "a layer in"),
        (lambda: AttentionSchedule(layers={2: DENSE, -1: DENSE}).at(0, 5, 3), ValueError, "once"),
        (lambda: AttentionSchedule(steps={9: DENSE}).at(0, 5, 3), ValueError, "a step in"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.fixture(scope="module")
def model():
    config = VideoDiTConfig(frames=4, height=8, width=8, dim=16, heads=2, depth=2, patch=(1, 2, 2))
    model = VideoDiT(config, rngs=nnx.Rngs(0))
    # zero at the start, where every attention would give the same video
    model.unembed.kernel.set_value(0.1 * jax.random.normal(jax.random.key(1), (16, 12)))
    for block in model.blocks:
        block.modulation.set_value(jax.random.normal(jax.random.key(2), (6, 16)))
    return model


def test_small_model_samples_under_a_schedule(model):
    def run(attention, **options):
        label = np.array([1])
        return np.asarray(
            sample(model, jax.random.key(0), label, steps=3, attention=attention, **options)
        )

    dense, mixed = run(DENSE), run(AttentionSchedule(MONARCH, warmup_steps=2))
    assert np.abs(dense - mixed).max() > 1e-5
    assert np.abs(run(MONARCH) - mixed).max() > 1e-5
    np.testing.assert_allclose(run(AttentionSchedule(MONARCH, warmup_steps=3)), dense, atol=1e-5)
    seen = []
    again = run(AttentionSchedule(MONARCH, warmup_steps=2), on_step=lambda n, x: seen.append(n))
    assert seen == [1, 2, 3]
    np.testing.assert_allclose(again, mixed, atol=1e-5)


def test_flops_of_steps():
    grid = vm.VideoGrid(2, 2, 2)
    sizes = {"heads": 2, "head_dim": 4}
    dense, monarch = (vm.flops.attention(method, grid, **sizes) for method in (DENSE, MONARCH))
    echo = Echo()  # twice as much on odd steps
    assert flops_of_steps(echo, 4, 3, grid, **sizes) == [3 * dense * n for n in (1, 2, 1, 2)]
    schedule = AttentionSchedule(echo, warmup_steps=2, layers={0: MONARCH}, steps={3: MONARCH})
    # called first on step 2, it makes up for step 1
    expected = [2 * dense, 2 * dense, monarch + 2 * dense, 2 * monarch, monarch + dense]
    assert flops_of_steps(schedule, 5, 2, grid, **sizes) == expected
    expected[4] = monarch + 2 * dense
    assert flops_of_steps(schedule, 5, 2, grid, **sizes, anew=(4,)) == expected
    assert sum(flops_of_steps(echo, 4, 1, grid, **sizes)) == vm.flops.sampling(
        echo, grid, 4, **sizes
    )
