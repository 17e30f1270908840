"""Corrected attention against float64 arithmetic by hand, and how its state is threaded."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import jit
from remembering import ByHand, Echo
from tolerances import assert_close

import vmonarch_jax as vm

GRID = (4, 3, 2)
SIZES = {"batch": 2, "heads": 2, "head_dim": 4}
TUBES = vm.VMonarch(block=(4, 1, 1), recompute_frames=0, scale=0.7)
# What rounding leaves of a residual: half a unit of 8 and of 4 significant bits.
HALF_UNIT = {"bfloat16": 2.0**-8, "float8": 2.0**-4}


def stacks(count, seed=0, value_dim=4):
    """q, k and v of some denoising steps, each a little further from the first."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 24, 2, 4), (2, 24, 2, 4), (2, 24, 2, value_dim)]
    pairs = [(rng.standard_normal(shape), rng.standard_normal(shape)) for shape in shapes]
    return [
        jnp.stack([jnp.asarray(1.5 * (a + n * (b - a) / 8), jnp.float32) for n in range(count)])
        for a, b in pairs
    ]


def in_a_scan(method, steps, stacked, **sizes):
    """Outputs of all steps, traced, and the last state."""
    fresh = vm.init_state(method, GRID, **SIZES, **sizes)

    def step(state, now):
        number, q, k, v = now
        out, state = vm.attend(method, q, k, v, grid=GRID, state=state, step=number)
        return state, out

    last, outs = jit(lambda *x: jax.lax.scan(step, fresh, x))(jnp.asarray(steps), *stacked)
    chex.assert_trees_all_equal_shapes_and_dtypes(last, fresh)
    return outs, last


def tubes_by_hand(q, k, v):
    return oracle.monarch_grid(q, k, v, grid=GRID, block=(4, 1, 1), scale=0.7).out


def check_by_hand(outs, steps, stacked, refreshes, half_unit):
    """`method + residual` in float64; `half_unit` is what the stored residual may be off by."""
    residual = None
    for n, step in enumerate(steps):
        q, k, v = (np.asarray(x[n]) for x in stacked)
        dense, cheap = oracle.dense(q, k, v, scale=0.7).out, tubes_by_hand(q, k, v)
        if step in refreshes or residual is None:
            residual = dense - cheap
            assert_close(outs[n], dense, "float32", "forward", f"step {step}")
            continue
        # The largest entry of a row sets the scale of all of it in float8.
        allowed = 2e-5 + half_unit * np.abs(residual).max(-1, keepdims=True)
        off = np.abs(np.asarray(outs[n], np.float64) - (cheap + residual))
        assert (off <= allowed).all(), f"step {step}: {(off - allowed).max()}"
        assert off.max() < 0.5 * np.abs(residual).max(), "the residual is there"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
@pytest.mark.parametrize(
    ("schedule", "refreshes"), [({"every": 3}, (0, 3)), ({"refresh_steps": (4, 1)}, (0, 1, 4))]
)
def test_every_step_is_the_method_plus_the_last_error(schedule, refreshes, dtype):
    method, stacked = vm.Corrected(TUBES, dtype=dtype, **schedule), stacks(6, value_dim=5)
    outs, _ = in_a_scan(method, range(6), stacked, value_dim=5)
    check_by_hand(outs, range(6), stacked, refreshes, HALF_UNIT[dtype])


def test_a_fresh_state_is_refreshed_first_whatever_the_step():
    method, stacked = vm.Corrected(TUBES, every=5), stacks(3)
    outs, _ = in_a_scan(method, [7, 8, 9], stacked)
    check_by_hand(outs, [7, 8, 9], stacked, (), HALF_UNIT["bfloat16"])
    fresh = vm.init_state(method, GRID, **SIZES)
    q, k, v = (x[0] for x in stacked)

    def call(state):
        return method(q, k, v, grid=GRID, state=state, step=7)

    for out, state in (call(fresh), jit(call)(fresh)):  # its flag known, and traced
        assert_close(out, outs[0], "float32", "forward")
        assert state.filled.all()


def test_static_steps_do_what_traced_ones_do_and_compile_one_branch():
    method, stacked = vm.Corrected(TUBES, every=2), stacks(4)
    outs, last = in_a_scan(method, range(4), stacked)
    state = vm.init_state(method, GRID, **SIZES)
    for n in range(4):
        q, k, v = (x[n] for x in stacked)

        def call(q, k, v, n=n, state=state):
            return method(q, k, v, grid=GRID, state=state, step=n)

        assert "cond" not in str(jax.make_jaxpr(call)(q, k, v))
        out, state = jit(call)(q, k, v)
        assert_close(out, outs[n], "bfloat16", "forward", f"step {n}")
    chex.assert_trees_all_close(jax.tree.map(np.float32, state), jax.tree.map(np.float32, last),
                                atol=1e-2)  # fmt: skip


def test_entries_of_a_batch_are_apart():
    """Guidance doubles the batch; each half gets what it would get alone."""
    method, stacked = vm.Corrected(TUBES, every=2), stacks(2)
    outs, state = in_a_scan(method, range(2), stacked)
    assert all(leaf.shape[0] == SIZES["batch"] for leaf in jax.tree.leaves(state))
    flipped, _ = in_a_scan(method, range(2), [x[:, ::-1] for x in stacked])
    assert_close(flipped[:, ::-1], outs, "float32", "forward")


def test_a_method_with_a_memory_of_its_own_keeps_it():
    method, stacked = vm.Corrected(Echo(), every=3), stacks(5)
    outs, state = in_a_scan(method, range(5), stacked)
    echo, residual = ByHand(), None
    for n in range(5):
        q, k, v = (x[n] for x in stacked)
        echo.step = n
        cheap = echo(q, k, v, grid=GRID)
        if n % 3 == 0:
            expected = vm.dense_attention(q, k, v)
            residual = np.asarray(expected - cheap)
        else:
            expected = cheap + residual
        allowed = HALF_UNIT["bfloat16"] * np.abs(residual).max() + 1e-5
        np.testing.assert_allclose(outs[n], expected, atol=allowed, rtol=0, err_msg=f"step {n}")
    np.testing.assert_array_equal(state.inner["calls"], 5)


def test_without_a_state_it_is_the_method():
    q, k, v = (x[0] for x in stacks(1))
    out = vm.Corrected(TUBES)(q, k, v, grid=GRID)
    np.testing.assert_array_equal(out, TUBES(q, k, v, grid=GRID))


def test_gradient_is_the_methods():
    """The residual is a constant: what flows is what flows through the method."""
    method = vm.Corrected(TUBES, every=2)
    q, k, v = (x[0] for x in stacks(1))
    _, state = jit(lambda: method(q, k, v, grid=GRID, state=fresh(method), step=0))()

    def total(attention):
        return jit(jax.grad(lambda q: jnp.sum(jnp.sin(attention(q)))))

    residual = state.residual.astype(jnp.float32).swapaxes(1, 2)
    found = total(lambda q: method(q, k, v, grid=GRID, state=state, step=1)[0])(q)
    expected = total(lambda q: TUBES(q, k, v, grid=GRID) + residual)(q)
    assert_close(found, expected, "float32", "gradient")


def fresh(method, **sizes):
    return vm.init_state(method, GRID, **SIZES, **sizes)


def test_float8_of_nothing_and_of_large_entries():
    """A method without error leaves zeros, and huge values do not overflow to NaN."""
    q, k, v = (x[0] for x in stacks(1))
    exact = vm.Corrected(vm.Dense(), dtype="float8")
    _, state = exact(q, k, v, grid=GRID, state=fresh(exact), step=0)
    out, _ = exact(q, k, v, grid=GRID, state=state, step=1)
    np.testing.assert_array_equal(state.scale, 0)
    np.testing.assert_array_equal(out, vm.dense_attention(q, k, v))
    method = vm.Corrected(TUBES, dtype="float8")
    _, state = jit(lambda: method(q, k, 1e6 * v, grid=GRID, state=fresh(method), step=0))()
    out, _ = method(q, k, 1e6 * v, grid=GRID, state=state, step=1)
    assert np.isfinite(np.asarray(out)).all()
    expected = np.asarray(oracle.dense(q, k, 1e6 * v, scale=0.7).out)
    assert np.abs(out - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_output_and_state(dtype):
    method = vm.Corrected(TUBES, dtype="float8")
    q, k, v = (x[0].astype(dtype) for x in stacks(1))
    state = fresh(method, dtype=dtype)
    chex.assert_shape(state.residual, (2, 2, 24, 4))
    assert (state.residual.dtype, state.scale.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    found = jax.eval_shape(lambda: method(q, k, v, grid=GRID, state=state, step=1))
    assert found[0].dtype == q.dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(found[1], state)


def test_flops_and_explanation():
    method, grid = vm.Corrected(vm.VMonarch(), every=10), vm.VideoGrid(21, 30, 52)
    cheap, dense = (vm.flops.attention(m, grid) for m in (vm.VMonarch(), vm.Dense()))
    assert vm.flops.attention(method, grid) == vm.flops.attention(method, grid, step=3) == cheap
    assert vm.flops.attention(method, grid, step=20) == cheap + dense
    assert vm.flops.sampling(method, grid, 50) == 50 * cheap + 5 * dense
    some = vm.Corrected(vm.VMonarch(), refresh_steps=(7,))
    assert vm.flops.sampling(some, grid, 50) == 50 * cheap + 2 * dense
    report = str(vm.explain(method, grid))
    assert "every 10 steps" in report
    # 32,760 tokens of 12 heads of 128, two bytes each; and with a byte each and scales.
    assert "residual in bfloat16: 96.0 MiB" in report
    assert "no certificate" in report
    narrow = str(vm.explain(vm.Corrected(vm.AdaSpa(), dtype="float8"), grid))
    assert "residual in float8_e4m3fn: 49.5 MiB" in narrow
    assert "corrected method: " in narrow


def test_there_is_no_log_sum_exp():
    q, k, v = (x[0] for x in stacks(1))
    with pytest.raises(ValueError, match="certificate"):
        vm.Corrected(TUBES)(q, k, v, grid=GRID, return_lse=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": 3}, ["`method`", "3"]),
        ({"dtype": "int8"}, ["`dtype`", "bfloat16", "float8", "int8"]),
        ({"every": 0}, ["`every`", "0"]),
        ({"every": 3, "refresh_steps": (1,)}, ["both"]),
        ({"refresh_steps": 4}, ["`refresh_steps`", "4"]),
        ({"refresh_steps": (0.5,)}, ["`refresh_steps`", "0.5"]),
    ],
)
def test_mistakes_in_the_method(settings, words):
    with pytest.raises(ValueError) as caught:
        vm.Corrected(**settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_mistakes_in_state_and_step():
    method, (q, k, v) = vm.Corrected(TUBES), (x[0] for x in stacks(1))
    state = fresh(method)
    for wrong, step, words in (
        (state, None, ["`step`"]),
        (state, -2, ["`step`", "-2"]),
        (fresh(method, value_dim=3), 0, ["`state.residual`", "(2, 2, 24, 4)", "(2, 2, 24, 3)"]),
        (fresh(vm.Corrected(Echo())), 0, ["`state.inner`"]),
        ({}, 0, ["CorrectedState", "dict"]),
    ):
        with pytest.raises(ValueError) as caught:
            method(q, k, v, grid=GRID, state=wrong, step=step)
        assert all(word in str(caught.value) for word in words), caught.value
