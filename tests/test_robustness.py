"""Inputs that break softmaxes: finite outputs and gradients where the answer is finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import IMPLEMENTATIONS, cotangents_of, expected, inputs_of, library, make, oracle_of
from compiling import jit
from tolerances import TOLERANCES, assert_close

CASES = {
    "dense": make("dense", 24, 24),
    "monarch": make("monarch", 24, block_size=5, steps=3),
    "vmonarch": make("vmonarch", 4, 2, 3, steps=3),
    "vmonarch-no-floor": make(
        "vmonarch", 4, 2, 3, steps=3, c_r_floor=0.0, recompute_frames=0, entropy_gradient=True
    ),
    "tiled": make("tiled", 4, 2, 3, tile=(2, 2, 2), block=(1, 1, 2), steps=2),
}
pytestmark = pytest.mark.usefixtures("tpu_interpreted")
over_all = pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, i) for c in CASES for i in IMPLEMENTATIONS],
)


@functools.cache
def compiled(case, implementation):
    function = library(CASES[case], **IMPLEMENTATIONS[implementation])

    @jit
    def everything(arrays, cotangents):
        results, pull = jax.vjp(lambda *a: tuple(function(*a)), *arrays)
        return *results, pull(cotangents)

    return everything


def run(case, implementation, arrays):
    """Output, log-sum-exp, gradients: one program a case, whatever the numbers."""
    cotangents = cotangents_of(CASES[case])
    if arrays[0].dtype == jnp.bfloat16:
        cotangents = (cotangents[0].astype(jnp.bfloat16), cotangents[1])
    return compiled(case, implementation)(tuple(arrays), cotangents)


def assert_finite(results):
    out, lse, gradients = results
    for name, x in zip(
        ("out", "lse", "d query", "d key", "d value"), (out, lse, *gradients), strict=True
    ):
        assert jnp.isfinite(x).all(), f"{name} is not finite"


def assert_average(out, value):
    """Rows of any attention are averages of the values."""
    value = np.asarray(value, np.float64)
    low, high = value.min(1, keepdims=True), value.max(1, keepdims=True)
    slack = 1e-2 * (high - low)
    assert (out >= low - slack).all()
    assert (out <= high + slack).all()


# --- large, small, equal --------------------------------------------------------------------------


@over_all
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(case, implementation, sign):
    query, key, value = inputs_of(CASES[case])
    rise = 1e4 / np.abs(oracle_logits(query, key)).max()
    arrays = (query * np.float32(rise), sign * key, value)
    results = run(case, implementation, arrays)
    assert_finite(results)
    assert_average(results[0], value)
    exact, lse = oracle.dense(*arrays), results[1]
    assert (lse <= exact.lse + TOLERANCES["float32", "lse"] * np.abs(exact.lse).max()).all()
    if dict(CASES[case].settings).get("c_r_floor", CASES[case].function != "monarch"):
        # Without a floor, which weights are too small to divide by is up to the number format.
        assert_close(lse, oracle_of(CASES[case])(*arrays).lse, "float32", "lse")


def oracle_logits(query, key):
    query, key = oracle.float64(query, key)
    return np.einsum("zqhd,zkhd->zhqk", query, key) * query.shape[-1] ** -0.5


@over_all
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_that_all_sit_far_off(case, implementation, offset):
    # Every logit near +-1e4: a shift by anything but the row's own maximum under- or overflows.
    query, key, value = inputs_of(CASES[case])
    query = query.at[..., 0].set(abs(offset) ** 0.5)
    key = key.at[..., 0].set(np.sign(offset) * abs(offset) ** 0.5 * key.shape[-1] ** 0.5)
    results = run(case, implementation, (query, key, value))
    assert_finite(results)
    assert_average(results[0], value)
    want = oracle_of(CASES[case])(query, key, value)
    assert_close(results[1], want.lse, "float32", "lse")
    # Logits of 1e4 are known to 1e-3 in float32, and so are the weights.
    np.testing.assert_allclose(results[0], want.out, atol=2e-2)


@over_all
@pytest.mark.parametrize("size", [0.0, 1.0, 50.0])
def test_all_rows_equal(case, implementation, size):
    query, key, value = inputs_of(CASES[case])
    query = size * jnp.broadcast_to(query[:, :1], query.shape)
    key = size * jnp.broadcast_to(key[:, :1], key.shape)
    results = run(case, implementation, (query, key, value))
    assert_finite(results)
    # All keys are alike, so every method is the plain average.
    mean = np.broadcast_to(np.mean(value, axis=1, keepdims=True), value.shape)
    logit = oracle_logits(query, key)[:, :, :, 0]
    # Weights are as exact as the logits they are differences of.
    atol = 1e-5 + 5e-7 * np.abs(logit).max()
    np.testing.assert_allclose(results[0], mean, atol=atol)
    assert_close(results[1], np.moveaxis(logit, 1, 2) + np.log(24), "float32", "lse")


@over_all
def test_frames_that_draw_no_attention(case, implementation):
    # Tokens 6 to 17 repel every query so much that their weights underflow to zero.
    query, key, value = inputs_of(CASES[case])
    query = query.at[..., 0].set(20.0)
    key = key.at[:, 6:18, :, 0].set(-40.0)
    results = run(case, implementation, (query, key, value))
    want = oracle_of(CASES[case])(query, key, value)
    assert_close(results[0], want.out, "float32", "forward")
    assert_close(results[1], want.lse, "float32", "lse")
    assert_finite(results)


@over_all
def test_bfloat16_extremes(case, implementation):
    query, key, value = inputs_of(CASES[case], "bfloat16")
    assert_finite(run(case, implementation, (query * 300, key * 300, value * 1e20)))
    assert_finite(run(case, implementation, (query * 1e-38, key * 1e-38, value * 1e-38)))


# --- masks ----------------------------------------------------------------------------------------

MASKED = make("monarch", 23, block_size=5, steps=3, masked=True)
DENSE_MASKED = make("dense", 23, 23, masked=True)
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@functools.cache
def compiled_masked(case, implementation):
    function = library(case, **IMPLEMENTATIONS[implementation])

    @jit
    def everything(arrays, cotangents, mask):
        results, pull = jax.vjp(lambda *a: tuple(function(*a, key_mask=mask)), *arrays)
        return *results, pull(cotangents)

    return everything


def run_masked(case, implementation, arrays, mask):
    return compiled_masked(case, implementation)(arrays, cotangents_of(case), jnp.asarray(mask))


@over_implementations
@pytest.mark.parametrize("case", [MASKED, DENSE_MASKED], ids=str)
def test_blocks_without_keys(case, implementation):
    query, key, value = inputs_of(case)
    mask = np.ones((2, 23), bool)
    mask[0, 5:15] = False  # the second and third block whole
    mask[1, 3:] = False  # all but the first, and some of that
    # A masked token is no query either; what a masked one would have asked must not matter.
    query = jnp.where(mask[:, :, None, None], query, 0)
    out, lse, gradients = run_masked(case, implementation, (query, key, value), mask)
    want = oracle_of(case, mask)(query, key, value)
    assert_close(out, want.out, "float32", "forward")
    assert_close(lse, want.lse, "float32", "lse")
    assert_finite((out, lse, gradients))
    for gradient in gradients[1:]:
        assert not np.asarray(gradient)[~mask].any(), "a masked key has no gradient"


@over_implementations
@pytest.mark.parametrize("case", [MASKED, DENSE_MASKED], ids=str)
def test_no_keys_at_all(case, implementation):
    mask = np.ones((2, 23), bool)
    mask[1] = False
    arrays = inputs_of(case)
    out, lse, gradients = run_masked(case, implementation, arrays, mask)
    assert not np.any(out[1])
    assert np.isneginf(lse[1]).all()
    assert jnp.isfinite(out).all()
    assert jnp.isfinite(lse[0]).all()
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()
        assert not np.any(gradient[1])


@over_implementations
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_what_masked_tokens_hold_does_not_matter(which, implementation):
    mask = np.ones((2, 23), bool)
    mask[:, [1, 4, 10, 11, 21]] = False
    arrays = dict(zip(("query", "key", "value"), inputs_of(MASKED), strict=True))
    before = run_masked(MASKED, implementation, tuple(arrays.values()), mask)
    arrays[which] = jnp.where(mask[:, :, None, None], arrays[which], 30.0)
    after = run_masked(MASKED, implementation, tuple(arrays.values()), mask)
    for one, other, kind in zip(before[:2], after[:2], ("forward", "lse"), strict=True):
        assert_close(np.asarray(one)[mask], np.asarray(other)[mask], "float32", kind)


# --- not a number ---------------------------------------------------------------------------------


@over_all
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_in_nan_out(case, implementation, which, bad):
    arrays = list(inputs_of(CASES[case]))
    clean = run(case, implementation, arrays)
    arrays[which] = arrays[which].at[0, 13, 1].set(bad)
    out, lse, _ = run(case, implementation, arrays)
    # The other batch element and the other head never hear of it. (A TPU kernel takes its careful
    # path for all that shares a grid step with a bad number, and rounds differently there.)
    for got, want in ((out, clean[0]), (lse, clean[1])):
        for mine, others in ((got[1], want[1]), (got[:, :, 0], want[:, :, 0])):
            if implementation == "pallas_tpu":
                assert_close(mine, others, "float32", "forward")
            else:
                np.testing.assert_array_equal(mine, others)
    if bad is not np.nan:
        return  # no crash is all that infinities are owed
    if which == 0:
        assert jnp.isnan(out[0, 13, 1]).all(), "the row that asked"
        assert jnp.isnan(lse[0, 13, 1])
    else:
        assert jnp.isnan(out[0, :, 1]).all(), "every row sees every key"
    if which == 1:
        assert jnp.isnan(lse[0, :, 1]).all()
    if which == 2:
        np.testing.assert_array_equal(lse, clean[1])


# --- transformations together ---------------------------------------------------------------------


@over_implementations
@pytest.mark.parametrize("case", ["vmonarch", "tiled"])
def test_jit_grad_vmap_together(case, implementation):
    case = CASES[case]
    function = library(case, **IMPLEMENTATIONS[implementation])
    arrays, (out_bar, lse_bar) = inputs_of(case), cotangents_of(case)

    def loss(query, key, value, out_bar, lse_bar):
        out, lse = function(query[None], key[None], value[None])
        return jnp.sum(out[0] * out_bar) + jnp.sum(lse[0] * lse_bar)

    # One batch element a call, mapped: the same gradients as the batch has.
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    got = jit(jax.vmap(gradient))(*arrays, out_bar, lse_bar)
    for one, want in zip(got, expected(case)[2], strict=True):
        assert_close(one, want, "float32", "gradient")
