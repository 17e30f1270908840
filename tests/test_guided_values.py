"""Guided attention as a value: what it costs, what `explain` says of it, and mistakes."""

import jax.numpy as jnp
import pytest
from guided_cases import GRID, SIZES, TUBES, arrays

import vmonarch_jax as vm


def test_flops_count_every_product():
    """On a grid of 4 frames of 6 tokens, one head of d = 4 and e = 3, counted by hand."""
    sizes = {"heads": 1, "head_dim": 4, "value_dim": 3}

    def count(**settings):
        step = settings.pop("step", None)
        guided = vm.Guided(vm.VMonarch(recompute_frames=0), **settings)
        return vm.flops.attention(guided, GRID, step=step, **sizes)

    plain = vm.flops.attention(vm.VMonarch(recompute_frames=0), GRID, **sizes)
    exact = 2 * 4 * (6 * 6) * 7  # each of 4 query blocks: scores and averages with one key block
    assert count(every=2) == count(every=2, step=1) == plain + exact
    assert count(every=2, exact_blocks=3) == plain + 3 * exact
    # Two products for 4 x 4 pairs of blocks at all of 6 positions.
    assert count() == plain + exact + 2 * (2 * 6 * 4 * 4 * 4)
    factors = 2 * (2 * (2 * 4 * 36 * 4)) + 2 * 2 * 96 * 4 + 2 * 96 * 4
    refresh = 2 * 24 * 24 * 7 + 2 * 24 * 24 * 4 + factors
    assert count(every=2, step=0) == count(every=2, step=4) == refresh
    first = vm.Guided(vm.VMonarch(), every=2)  # the first frame is dense: three query blocks
    plain = vm.flops.attention(vm.VMonarch(), GRID, **sizes)
    assert vm.flops.attention(first, GRID, **sizes) == plain + exact * 3 // 4


def test_explain_says_what_is_exact_and_when():
    report = str(vm.explain(vm.Guided(TUBES, 2, every=7), GRID, heads=2, head_dim=4))
    assert "exact on 2 of 6 key blocks of 4 tokens" in report
    assert "every 7 steps" in report
    assert "curvature" in str(vm.explain(vm.Guided(TUBES, 2), GRID, heads=2, head_dim=4))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: vm.Guided(vm.Dense()), ["`method`", "Dense"]),
        (lambda: vm.Guided(exact_blocks=0), ["`exact_blocks`", "0"]),
        (lambda: vm.Guided(every=0), ["`every`", "0"]),
        (lambda: vm.Guided(refresh_steps=(1,), every=2), ["both"]),
        (lambda: vm.Guided(refresh_steps=(-1,)), ["`refresh_steps`", "-1"]),
        (lambda: vm.Guided(vm.TiledMonarch()), ["one tile", "4"]),
        (lambda: vm.Guided(vm.VMonarch(block=(3, 3, 2))), ["divide", "(3, 3, 2)"]),
        (lambda: vm.Guided(exact_blocks=5), ["`exact_blocks`", "4 blocks", "5"]),
    ],
)
def test_mistakes_in_the_method(method, words):
    q, k, v = arrays()
    with pytest.raises(ValueError) as caught:
        method()(q, k, v, grid=GRID)
    assert all(word in str(caught.value) for word in words), caught.value


def test_mistakes_in_state_and_step():
    q, k, v = arrays()
    guided = vm.Guided(TUBES, every=3)
    state = vm.init_state(guided, GRID, **SIZES)
    other = vm.init_state(vm.Guided(TUBES, 2, every=3), GRID, **SIZES)
    for wrong, step, words in (
        (state, None, ["`step`"]),
        (state, -1, ["`step`", "-1"]),
        (state, jnp.ones(2, jnp.int32), ["scalar", "(2,)"]),
        (other, 0, ["`state.indices`", "(2, 2, 6, 1)", "(2, 2, 6, 2)"]),
        ((1, 2), 0, ["GuidedState", "tuple"]),
    ):
        with pytest.raises(ValueError) as caught:
            guided(q, k, v, grid=GRID, state=wrong, step=step)
        assert all(word in str(caught.value) for word in words), caught.value
