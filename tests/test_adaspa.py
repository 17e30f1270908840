"""AdaSpa on denoising steps against its float64 oracle: memory, batches, text, gradients."""

import dataclasses

import adaspa_oracle as oracle
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adaspa_cases import (
    GRID,
    METHODS,
    SIMPLE,
    SMALL,
    all_kept,
    alone,
    arrays,
    attend,
    dense,
    drifting,
    expected,
    fresh,
    kept_of,
    plain,
    unrolled,
)
from compiling import jit
from tolerances import assert_close

import vmonarch_jax as vm

methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def check_run(method, inputs, implementation):
    """A run of static steps against the oracle, the choices included; the tiers that were seen."""
    memory, seen = None, set()
    found = unrolled(method, inputs, fresh(method), implementation)
    for number, ((part, state), (q, k, v)) in enumerate(zip(found, inputs, strict=True)):
        out, lse, memory = oracle.step(method, GRID.tokens, q, k, v, number, memory)
        assert_close(part.out, out, q.dtype, "forward", f"step {number}")
        assert_close(part.lse, lse, q.dtype, "lse", f"step {number}")
        if memory is not None:
            assert kept_of(state) == [[c.kept for c in heads] for heads in memory.choices]
            seen |= {c.tier for heads in memory.choices for c in heads}
        assert bool(state.ready.all()) == (memory is not None)
    return seen


@methods
def test_run(method):
    """Warm-up, first search, reuse, second search, reuse, while q, k and v drift."""
    seen = check_run(method, drifting(method, 5), SIMPLE)
    if method.head_adaptive:
        assert seen == {-1, 0, 1}  # else the case would not test what it is there for


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("pallas_tpu", marks=pytest.mark.slow)]
)
def test_run_of_other_implementations(implementation, tpu_interpreted):
    # Blocks of 8: the smallest that a TPU takes.
    method = dataclasses.replace(SMALL, text_tokens=6, block_size=8)
    try:
        check_run(method, drifting(method, 4), implementation)
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["short last block", "one budget", "text before"])
def test_without_a_state(name):
    """A search on the very arrays, and sparse attention at once."""
    method = METHODS[name]
    q, k, v = arrays(method)
    x, _, keep = expected(method, q, k)
    out, lse = alone(method, q, k, v, implementation="xla")
    want_out, want_lse = oracle.attend(x, np.asarray(v, np.float64), keep)
    assert_close(out, want_out, "float32", "forward")
    assert_close(lse, want_lse, "float32", "lse")
    assert not keep.all()


@pytest.mark.parametrize("name", ["video", "text before", "no cache"])
def test_traced_steps_equal_static_ones(name):
    """A `lax.scan` over the steps gives what the loop of static ones does."""
    method = METHODS[name]
    inputs = drifting(method, 5)

    def body(state, at):
        step, qkv = at
        part, state = plain(method, step, state, *qkv)
        return state, (part, state)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    _, scanned = jit(lambda x, s: jax.lax.scan(body, s, (jnp.arange(5), x)))(stacked, fresh(method))
    for number, (part, state) in enumerate(unrolled(method, inputs, fresh(method))):
        scanned_part, scanned_state = jax.tree.map(lambda x, n=number: x[n], scanned)
        assert_close(scanned_part.out, part.out, "float32", "forward")
        assert_close(scanned_part.lse, part.lse, "float32", "lse")
        chex.assert_trees_all_equal_shapes_and_dtypes(scanned_state, state)
        assert kept_of(scanned_state) == kept_of(state)
        np.testing.assert_array_equal(scanned_state.ready, state.ready)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("searches", [(), (3,)])
def test_the_first_step_that_needs_blocks_searches(searches, traced):
    """Whether it follows the warm-up, or a run that begins in the middle; the next one reuses."""
    method = dataclasses.replace(SMALL, search_steps=searches)
    q, k, v = arrays(method)
    for start in (1, 2, 3):
        part, state = attend(method, start, fresh(method), q, k, v, traced=traced)
        assert_close(part.out, dense(q, k, v).out, "float32", "forward")
        assert state.ready.all()
        part, _ = attend(method, 4, state, q, k, v, traced=traced)
        assert_close(part.out, alone(SMALL, q, k, v).out, "float32", "forward")


def test_warm_up_comes_first():
    """A search step in the warm-up is a warm-up step: dense, and nothing is remembered."""
    method = dataclasses.replace(SMALL, warmup_steps=4, search_steps=(1, 3))
    q, k, v = arrays(method)
    for step in (0, 1, 3):
        part, state = attend(method, step, fresh(method), q, k, v, traced=True)
        assert_close(part.out, dense(q, k, v).out, "float32", "forward")
        chex.assert_trees_all_equal(state, fresh(method))


def test_batch_entries_do_not_meet():
    """Guidance: two entries with different maps and tiers give what each gives alone."""
    inputs = drifting(SMALL, 4)
    both = unrolled(SMALL, inputs, fresh(SMALL))
    for entry in (0, 1):
        one = jax.tree.map(lambda x, z=entry: x[z : z + 1], inputs)
        for together, single in zip(both, unrolled(SMALL, one, fresh(SMALL, batch=1)), strict=True):
            part, state = jax.tree.map(lambda x, z=entry: x[z : z + 1], together)
            assert_close(part.out, single[0].out, "float32", "forward")
            assert kept_of(state) == kept_of(single[1])
    first, second = kept_of(both[-1][1])
    assert first != second
    assert (both[-1][1].counts[0] != both[-1][1].counts[1]).any()


@pytest.mark.parametrize("name", ["video", "text before"])
def test_sparsity_0_is_dense(name):
    method = dataclasses.replace(METHODS[name], sparsity=0.0)
    q, k, v = arrays(method)
    chex.assert_trees_all_equal(alone(method, q, k, v), dense(q, k, v))
    for step in (0, 1, 2):
        part, _ = attend(method, step, fresh(method), q, k, v, traced=True)
        chex.assert_trees_all_equal(part, dense(q, k, v))


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize(("grid", "text"), [((1, 1, 3), 4), ((1, 2, 2), 5), ((1, 1, 1), 0)])
def test_too_small_to_leave_anything_out(grid, text, side):
    """No block of video alone, or one of them: dense attention, whatever the sparsity."""
    grid = vm.VideoGrid(*grid)
    method = dataclasses.replace(SMALL, sparsity=0.9, text_tokens=text, text=side)
    q, k, v = arrays(method, grid=grid)
    state = fresh(method, grid=grid)
    for step in (0, 1, 2):
        part, state = attend(method, step, state, q, k, v, traced=True, grid=grid)
        chex.assert_trees_all_equal(part, dense(q, k, v))


@pytest.mark.parametrize("name", ["text after", "text before", "text in whole blocks"])
def test_text(name):
    """Text rows are dense, and every video row keeps the blocks with text, straddling or not."""
    method = METHODS[name]
    q, k, v = arrays(method)
    _, state = attend(method, 1, fresh(method), q, k, v)
    (out, _), _ = attend(method, 2, state, q, k, v)
    number, text, _ = oracle.blocks_of(method, GRID.tokens)
    rows = np.isin(number, text)
    assert rows.sum() >= method.text_tokens
    exact = np.asarray(dense(q, k, v).out)
    assert_close(out[:, rows], exact[:, rows], "float32", "forward")
    assert np.abs(np.asarray(out) - exact)[:, ~rows].max() > 0.1
    assert all(set(text) <= kept for kept in all_kept(state))


def test_certificate():
    """The gap is the KL divergence of each sparse row from its dense one."""
    method = METHODS["text after"]
    q, k, v = arrays(method)
    _, state = attend(method, 1, fresh(method), q, k, v)
    (_, lse), _ = attend(method, 2, state, q, k, v)
    gap = jit(lambda *x: vm.attention_gap(*x, implementation=SIMPLE))(q, k, lse)
    x, exact, keep = expected(method, q, k)
    sparse = oracle.log_sum_exp(x, keep)
    p = np.where(keep, np.exp(x - sparse[..., None]), 0)
    logs = np.where(keep, (x - sparse[..., None]) - (x - exact[..., None]), 0)
    assert_close(gap, (p * logs).sum(-1).swapaxes(1, 2), "float32", "kl")
    assert float(gap.max()) > 0.1


def test_gradients():
    """Through attention on the kept blocks, with a state and without; none through the choice."""
    method = METHODS["text before"]
    q, k, v = arrays(method)
    out_bar = np.random.default_rng(3).standard_normal(v.shape).astype("float32")
    _, _, keep = expected(method, q, k)
    sparse = oracle.gradients(method, q, k, v, keep, out_bar)
    exact = oracle.gradients(method, q, k, v, np.ones_like(keep), out_bar)
    _, ready = attend(method, 1, fresh(method), q, k, v)

    def loss(q, k, v, state, step):
        part, _ = plain(method, step, state, q, k, v, implementation="xla")
        return (part.out * out_bar).sum()

    gradient = jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=4)
    for state, step, want in [(None, None, sparse), (fresh(method), 1, exact), (ready, 3, sparse)]:
        for got, one in zip(gradient(q, k, v, state, step), want, strict=True):
            assert_close(got, one, "float32", "gradient", f"step {step}")


def test_vmap_and_bfloat16():
    """A mapped axis around batches; in bfloat16 the state's log-sum-exp stays float32."""
    inputs = [arrays(SMALL, seed, dtype="bfloat16") for seed in (0, 1)]
    state = fresh(SMALL, dtype="bfloat16")
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)

    def two_steps(state, q, k, v):
        _, state = plain(SMALL, 1, state, q, k, v)
        return plain(SMALL, 2, state, q, k, v)

    (out, _), after = jit(jax.vmap(two_steps))(states, *stacked)
    assert out.dtype == jnp.bfloat16
    assert after.lse.dtype == jnp.float32
    for n, one in enumerate(inputs):
        want, _ = jit(two_steps)(state, *one)
        assert_close(out[n], want.out, "bfloat16", "forward")


def test_a_log_sum_exp_that_is_far_off():
    """Masses that overflow, as after a cut between steps: still a choice, and attention on it."""
    q, k, v = arrays(SMALL)
    state = fresh(SMALL)
    state = state._replace(lse=state.lse - 1e4, ready=jnp.ones(2, bool))
    part, state = attend(SMALL, 3, state, q, k, v)
    assert np.isfinite(part.out).all()
    assert {len(kept) for kept in all_kept(state)} <= {3, 5, 7}


def test_a_head_whose_mass_is_one_block():
    """Every query of one head looks at block 6 alone: one block is all that it needs."""
    q, k, v = (np.array(x) for x in arrays(SMALL))
    q[:, :, 1], k[:, :, 1] = 0, 0
    q[:, :, 1, 0], k[:, 24:28, 1, 0] = 30, 5
    method = dataclasses.replace(SMALL, sparsity=0.75)  # 2 of 9 blocks
    _, state = attend(method, 1, fresh(method), q, k, v)
    assert (state.counts[:, 1] == 1).all()
    assert (state.indices[:, 1, :, 0] == 6).all()
    part, _ = attend(method, 2, state, q, k, v)
    assert_close(part.out[:, :, 1], dense(q, k, v).out[:, :, 1], "float32", "forward")


def test_one_head_and_another_value_dim():
    q, k, v = arrays(SMALL, heads=1)
    _, state = attend(SMALL, 1, fresh(SMALL, heads=1), q, k, v[..., :3])
    part, _ = attend(SMALL, 2, state, q, k, v[..., :3])
    assert part.out.shape == (2, GRID.tokens, 1, 3)
    assert (state.counts == 5).all()
