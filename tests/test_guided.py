"""Guided attention against its float64 oracle: gaps, choices, certificate, memory between steps."""

import dataclasses

import chex
import guided_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import jit
from guided_cases import GRID, METHODS, SIZES, TUBES, arrays
from tolerances import assert_close

import vmonarch_jax as vm
from vmonarch_jax import dispatch
from vmonarch_jax.guided_attention import attend_chosen

OPTIONS: dict = {
    "reference": {"implementation": "reference"},
    "xla": {"implementation": "xla"},
    "xla-chunked": {"implementation": "xla", "block_sizes": vm.BlockSizes(xla_scores=30)},
}
BOTH = ["frames", "tubes, one frame exact"]
methods = pytest.mark.parametrize("method", [METHODS[name] for name in BOTH], ids=BOTH)


def settings_of(method):
    """The oracle's keywords for a method value."""
    block = vm.flops.tiling_of(method, vm.VideoGrid(*GRID)).block
    kept = {"steps": method.steps, "floor": method.c_r_floor, "scale": method.scale}
    return {"grid": GRID, "block": block, **kept}


def any_choice(method, keep, batch=2, seed=3):
    """A different choice of blocks in every row, as indices and as a map."""
    blocks = vm.flops.tiling_of(method, vm.VideoGrid(*GRID)).sizes[1]
    scores = np.random.default_rng(seed).random((batch, SIZES["heads"], blocks, blocks))
    return choice_of(scores, keep)


def choice_of(scores, keep):
    indices = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :keep], axis=-1)
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, indices, True, axis=-1)
    return indices, chosen


def state_of(indices):
    return vm.GuidedState(jnp.asarray(indices, jnp.int32), jnp.ones(len(indices), bool))


# Every method and every implementation, not each with each: compiling is what takes the time.
CALLS = {
    "frames, reference": ("frames", "reference", "float32"),
    "frames, chunked": ("frames", "xla-chunked", "float32"),
    "frames, bfloat16": ("frames", "xla", "bfloat16"),
    "tubes": ("tubes", "xla", "float32"),
    "tubes, one frame exact": ("tubes, one frame exact", "xla-chunked", "float32"),
    "boxes": ("boxes", "xla", "float32"),
    "rows": ("rows", "reference", "float32"),
    "rows, bfloat16": ("rows", "reference", "bfloat16"),
}


@pytest.mark.parametrize(("method", "options", "dtype"), CALLS.values(), ids=CALLS.keys())
def test_chosen_blocks_are_exact_and_the_rest_is_monarch(method, options, dtype):
    method, options = METHODS[method], OPTIONS[options]
    q, k, v = arrays(dtype=dtype)
    indices, chosen = any_choice(method, 2)
    guided = vm.Guided(method, exact_blocks=2, every=5)
    known = state_of(indices)  # outside of `jit`, so that no refresh is compiled

    @jit
    def call(q, k, v):
        return guided(q, k, v, grid=GRID, state=known, step=1, return_lse=True, **options)

    (out, lse), state = call(q, k, v)
    rows = method.recompute_frames
    expected = guided_oracle.guided(q, k, v, chosen, recompute_frames=rows, **settings_of(method))
    assert_close(out, expected.out, dtype, "forward")
    assert_close(lse, expected.lse, dtype, "lse")
    chex.assert_trees_all_equal(state, state_of(indices))


@methods
def test_a_refresh_is_dense_and_finds_the_largest_gaps(method):
    with jax.enable_x64(True):
        q, k, v = arrays(dtype="float64")
        expected = guided_oracle.gap(q, k, v, **settings_of(method))
        dense = oracle.dense(q, k, v, scale=method.scale)
        guided = vm.Guided(method, exact_blocks=2, every=5)
        state = vm.init_state(guided, GRID, **SIZES)

        @jit
        def refresh(*arrays):
            return guided(*arrays, grid=GRID, state=state, step=0, return_lse=True)

        (out, lse), state = refresh(q, k, v)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, dense.out, atol=1e-12)
        np.testing.assert_allclose(lse, dense.lse, atol=1e-12)
        np.testing.assert_array_equal(state.indices, choice_of(expected, 2)[0])
        assert state.filled.all()


@methods
def test_certificate_and_what_the_gaps_sum_to(method):
    """KL = lse_dense - lse, and each gap is what an exact block takes from `1 - exp(-KL)`."""
    indices, chosen = any_choice(method, 2)
    with jax.enable_x64(True):
        q, k, v = arrays(dtype="float64")
        guided, state = vm.Guided(method, exact_blocks=2, every=5), state_of(indices)

        @jit
        def lse_of(*arrays):
            return guided(*arrays, grid=GRID, state=state, step=1, return_lse=True)[0].lse

        lse = np.asarray(lse_of(q, k, v))
        q, k, v = (np.asarray(x) for x in (q, k, v))
    kept = settings_of(method)
    rows = method.recompute_frames
    expected = guided_oracle.guided(q, k, v, chosen, recompute_frames=rows, **kept)
    dense = oracle.dense(q, k, v, scale=method.scale)
    kl = oracle.kl(expected.matrix, dense.matrix)
    assert kl.min() > -1e-12
    np.testing.assert_allclose(dense.lse - lse, kl, atol=1e-10)

    gap = guided_oracle.gap(q, k, v, **kept)
    assert gap.min() > -1e-12
    bare = guided_oracle.guided(q, k, v, chosen, **kept)
    missed = 1 - np.exp(bare.lse - dense.lse)
    place = guided_oracle.blocks_of(GRID, kept["block"])
    left = np.where(chosen, 0, gap).sum(-1)  # [z, h, l]
    np.testing.assert_allclose(np.moveaxis(missed, 2, 1)[:, :, place].sum(-1), left, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "options"), [("frames", "reference"), ("frames", "xla-chunked"), ("boxes", "xla")]
)
def test_gradients_flow_through_both_parts(method, options):
    method, options = METHODS[method], OPTIONS[options]
    q, k, v = arrays(batch=1)
    indices, chosen = any_choice(method, 2, batch=1)
    guided = vm.Guided(method, exact_blocks=2, every=5)
    rng = np.random.default_rng(7)
    bars = rng.standard_normal(v.shape), rng.standard_normal(v.shape[:3])

    def objective(q, k, v):
        state = state_of(indices)
        (out, lse), _ = guided(q, k, v, grid=GRID, state=state, step=1, return_lse=True, **options)
        return jnp.vdot(out, bars[0]) + jnp.vdot(lse, bars[1])

    def exactly(q, k, v, entropies=None):
        copies = np.broadcast_to(chosen, (len(q), *chosen.shape[1:]))
        kept = settings_of(method) | {"recompute_frames": method.recompute_frames}
        return guided_oracle.guided(q, k, v, copies, entropies=entropies, **kept)

    found = jit(jax.grad(objective, argnums=(0, 1, 2)))(q, k, v)
    flows = method.entropy_gradient
    expected = oracle.monarch_gradients(exactly, (q, k, v), bars, entropy_gradient=flows)
    for name, got, want in zip("qkv", found, expected, strict=True):
        assert_close(got, want, "float32", "gradient", name)


@pytest.mark.parametrize(("method", "options"), [("frames", "xla-chunked"), ("rows", "reference")])
def test_every_block_exact_is_dense(method, options):
    """The Monarch part has no block left: lse -inf, and no NaN in any gradient."""
    method, options = METHODS[method], OPTIONS[options]
    q, k, v = arrays()
    blocks = vm.flops.tiling_of(method, vm.VideoGrid(*GRID)).sizes[1]
    guided = vm.Guided(method, exact_blocks=blocks)

    def total(attention):
        def run(q, k, v):
            out, lse = attention(q, k, v)
            return jnp.sum(out * out) + jnp.sum(lse), out

        return jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    found = total(lambda *x: guided(*x, grid=GRID, return_lse=True, **options))
    dense = total(lambda *x: vm.Dense(method.scale)(*x, return_lse=True, **options))
    assert_close(found[0][1], dense[0][1], "float32", "forward")
    for got, want in zip(found[1], dense[1], strict=True):
        assert_close(got, want, "float32", "gradient")


@pytest.mark.parametrize(
    ("options", "grid", "positions"),
    [("reference", GRID, range(4)), ("xla-chunked", (8, 3, 1), (1, 3, 5, 7))],
)
def test_without_a_schedule_the_choice_is_by_mass_times_curvature(options, grid, positions):
    """Long blocks are looked at in some positions only."""
    options = OPTIONS[options]
    q, k, v = arrays()
    method = vm.VMonarch(steps=1, block=(grid[0], 1, 1), recompute_frames=0)
    scores = guided_oracle.curvature(q, k, positions, grid=grid, block=method.block)
    indices, chosen = choice_of(scores, 2)
    guided = vm.Guided(method, exact_blocks=2)
    assert vm.init_state(guided, grid, **SIZES) is None
    cut = guided.tiling(vm.VideoGrid(*grid))

    def guessed(q):
        out = guided(q, k, v, grid=grid, **options)
        return out.sum(), out

    def fixed(q):
        return attend_chosen(method, 2, q, k, v, cut, jnp.asarray(indices), **options).out.sum()

    (_, out), gradient = jit(jax.value_and_grad(guessed, has_aux=True))(q)
    kept = {"steps": 1, "floor": method.c_r_floor, "grid": grid, "block": method.block}
    expected = guided_oracle.guided(q, k, v, chosen, **kept)
    assert_close(out, expected.out, "float32", "forward")
    # A guess has no gradient, so the same blocks as constants give the same one.
    chex.assert_trees_all_close(gradient, jit(jax.grad(fixed))(q), atol=1e-5)


def test_choices_last_until_the_next_refresh():
    """Traced steps in a scan, static steps, and the choices followed by hand are the same."""
    guided = vm.Guided(TUBES, exact_blocks=1, refresh_steps=(3,))
    ends = [arrays(seed) for seed in (0, 1)]
    stacked = [jnp.stack([a + n / 4 * (b - a) for n in range(5)]) for a, b in zip(*ends)]  # noqa: B905
    fresh = vm.init_state(guided, GRID, **SIZES)

    def step(state, now):
        number, q, k, v = now
        out, state = vm.attend(guided, q, k, v, grid=GRID, state=state, step=number)
        return state, out

    last, outs = jit(lambda *x: jax.lax.scan(step, fresh, x))(jnp.arange(5), *stacked)
    known = {}
    for number in range(5):
        q, k, v = (x[number] for x in stacked)
        if number in (0, 3):
            expected = oracle.dense(q, k, v, scale=TUBES.scale)
            indices, chosen = choice_of(
                guided_oracle.gap(q, k, v, **settings_of(TUBES)), guided.exact_blocks
            )
        else:
            expected = guided_oracle.guided(q, k, v, chosen, **settings_of(TUBES))
        assert_close(outs[number], expected.out, "float32", "forward", f"step {number}")
        known[number] = state_of(indices)
    chex.assert_trees_all_equal(last, known[4])
    chex.assert_trees_all_equal_shapes_and_dtypes(last, fresh)
    assert all(leaf.shape[0] == SIZES["batch"] for leaf in jax.tree.leaves(last))

    # Static steps: one that is scheduled, one that is not, and one that is, by need.
    for number, before in ((3, known[0]), (1, known[0]), (4, fresh)):
        q, k, v = (x[number] for x in stacked)

        @jit
        def call(q, k, v, number=number, before=before):
            return guided(q, k, v, grid=GRID, state=before, step=number)

        out, state = call(q, k, v)
        if number == 4:
            expected = oracle.dense(q, k, v, scale=TUBES.scale).out
            assert_close(out, expected, "float32", "forward", "not filled yet")
        else:
            assert_close(out, outs[number], "float32", "forward", f"step {number}")
            chex.assert_trees_all_equal(state, known[number])


def test_a_head_whose_mass_is_one_block():
    """Every query of one head looks at block 2 alone: exact there, it is dense attention."""
    q, k, v = (np.array(x) for x in arrays())
    q[:, :, 1, 0], k[:, :, 1, 0] = 12, 0
    k[:, 12:18, 1, 0] = 6
    method = vm.VMonarch(recompute_frames=0)
    guided = vm.Guided(method, exact_blocks=1, every=2)
    fresh = vm.init_state(guided, GRID, **SIZES)

    def steps(q, k, v):
        _, state = guided(q, k, v, grid=GRID, state=fresh, step=0)
        return guided(q, k, v, grid=GRID, state=state, step=1, return_lse=True)

    (out, lse), state = jit(steps)(q, k, v)
    expected = guided_oracle.gap(q, k, v, **settings_of(method))
    np.testing.assert_array_equal(state.indices, choice_of(expected, 1)[0])
    assert (state.indices[:, 1] == 2).all()
    dense = oracle.dense(q, k, v)
    assert_close(out[:, :, 1], dense.out[:, :, 1], "float32", "forward")
    assert_close(lse[:, :, 1], dense.lse[:, :, 1], "float32", "lse")
    assert np.abs(np.asarray(out[:, :, 0]) - dense.out[:, :, 0]).max() > 1e-3


def test_blocks_that_suit_no_block_sparse_kernel():
    """Long ones, and those that a kernel declines, go through dense attention's kernel instead."""
    grid, method = (3, 10, 27), vm.VMonarch()
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 810, 1, 4)), jnp.float32) for _ in range(3))
    kept = {"steps": 2, "floor": 0.1, "grid": grid, "block": (1, 10, 27)}
    guided = vm.Guided(method, 2, every=2)
    fresh = vm.init_state(guided, grid, batch=1, heads=1, head_dim=4)
    out, state = jit(lambda *x: guided(*x, grid=grid, state=fresh, step=0))(q, k, v)
    assert_close(out, oracle.dense(q, k, v).out, "float32", "forward")
    indices, chosen = choice_of(guided_oracle.gap(q, k, v, **kept), 2)
    np.testing.assert_array_equal(state.indices, indices)
    known = state_of(indices)

    def total(*x):
        out, lse = guided(*x, grid=grid, state=known, step=1, return_lse=True)[0]
        return out.sum() + lse.sum(), (out, lse)

    (_, (out, lse)), gradient = jit(jax.value_and_grad(total, has_aux=True))(q, k, v)
    expected = guided_oracle.guided(q, k, v, chosen, recompute_frames=1, **kept)
    assert_close(out, expected.out, "float32", "forward")
    assert_close(lse, expected.lse, "float32", "lse")
    assert np.isfinite(np.asarray(gradient)).all()


# Blocks of 8 go to the TPU's block-sparse kernel, those of 6 past it.
@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["pallas_tpu"])
@pytest.mark.parametrize(
    ("grid", "method"),
    [
        ((4, 2, 4), vm.VMonarch(recompute_frames=(1,))),
        ((8, 2, 2), vm.VMonarch(block=(8, 1, 1), recompute_frames=0)),
        ((4, 3, 2), vm.VMonarch()),
    ],
    ids=["frames", "tubes", "odd frames"],
)
def test_tpu_kernels_against_xla(grid, method, implementation, tpu_interpreted):
    """A refresh, a step with the cached choice, one that chooses anew, and gradients."""
    rng = np.random.default_rng(2)
    shape = (2, int(np.prod(grid)), 2, 16)
    q, k, v = (jnp.asarray(1.3 * rng.standard_normal(shape), jnp.float32) for _ in range(3))
    guided, alone = vm.Guided(method, 2, every=3), vm.Guided(method, 2)
    fresh = vm.init_state(guided, grid, batch=2, heads=2, head_dim=16)

    def run(name):
        on = {"grid": grid, "implementation": name, "return_lse": True}

        def steps(q, k, v):
            (dense, lse), state = guided(q, k, v, state=fresh, step=0, **on)
            (out, own), same = guided(q, k, v, state=state, step=1, **on)
            chosen = alone(q, k, v, **on)
            loss = jnp.square(out).sum() + own.sum()
            return loss, (dense, lse, out, own, *chosen, state, same)

        return jit(jax.value_and_grad(steps, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    ((_, got), gradient), ((_, want), wanted) = run(implementation), run("xla")
    for number in range(6):
        kind = "lse" if number % 2 else "forward"
        assert_close(got[number], want[number], "float32", kind, f"result {number}")
    chex.assert_trees_all_equal(got[6:], want[6:])
    for name, g, w in zip("qkv", gradient, wanted, strict=True):
        assert_close(g, w, "float32", "gradient", name)


@pytest.mark.parametrize("block", [(4, 1, 1), (1, 3, 2)], ids=["tubes", "frames"])
def test_a_backend_whose_block_kernels_decline(block, monkeypatch):
    """The same choice, output and gradients through the other kernels."""
    q, k, v = arrays()
    guided = vm.Guided(vm.VMonarch(block=block), exact_blocks=2, every=3)
    fresh = vm.init_state(guided, GRID, **SIZES)

    def steps(q):
        _, state = guided(q, k, v, grid=GRID, state=fresh, step=0)
        part, _ = guided(q, k, v, grid=GRID, state=state, step=1, return_lse=True)
        return part.out.sum() + part.lse.sum(), (part, state)

    def run():
        return jit(jax.grad(steps, has_aux=True))(q)

    expected = run()

    def declines(*arrays, **settings):
        raise NotImplementedError("blocks of another size")

    other = dataclasses.replace(dispatch.XLA, block_sparse=declines, block_mass=declines)
    monkeypatch.setitem(dispatch.BACKENDS, "xla", lambda: other)
    chex.assert_trees_all_close(run(), expected, atol=2e-5)
