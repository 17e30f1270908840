"""The forward kernels of the L step, interpreted, against the oracle; and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from pallas.attention_inputs import arrays
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.l_step import reference
from vmonarch_jax.pallas_kernels.l_step import tpu as kernels
from vmonarch_jax.pallas_kernels.tpu.call import interpreted

# groups, frames of q, frames of k, positions, head dim, value dim, positions of a grid step
SIZES = [
    (1, 1, 1, 1, 128, 128, None),
    (2, 5, 5, 37, 128, 128, 16),
    (1, 3, 14, 20, 64, 64, None),
    (2, 21, 21, 36, 128, 64, 16),
    (1, 46, 46, 16, 64, 64, None),
    pytest.param((1, 70, 81, 6, 128, 128, None), marks=pytest.mark.slow),
]
DTYPES = ["float32", "bfloat16"]


def wide(*trees):
    return jax.tree.map(lambda x: x.astype(jnp.float32), trees)


def inputs(size, dtype, spread=1.0):
    g, m, keys, n, d, e, block = size
    q, al, y = arrays([(g, m, n, d), (g, keys, n, d), (g, keys, n, e)], "float32")
    cl = -3 * jnp.abs(arrays([(g, keys, n)], "float32", 1)[0])
    q, al, y = ((spread * q).astype(dtype), (2 * d**-0.5 * al).astype(dtype), y.astype(dtype))
    return q, al, y, cl, BlockSizes(tpu_positions=block)


def run(function, *arguments, how=True):
    with interpreted(how):
        return jax.jit(function)(*arguments)


def last_and_middle(q, al, cl, y, block_sizes):
    out, lse = kernels.last(q, al, cl, y, block_sizes=block_sizes)
    return out, lse, kernels.middle(q, al, cl, floor=0.1, block_sizes=block_sizes)


def masks(size):
    g, m, keys, n, *_ = size
    generator = np.random.default_rng(2)
    key_blocks = jnp.asarray(generator.random((g, keys)) < 0.7).at[:, 0].set(True)
    queries = jnp.asarray(generator.random((g, m, n)) < 0.7)
    return key_blocks, queries


def check_last(size, dtype, *, key_blocks=None, spread=1.0, how=True):
    q, al, y, cl, block_sizes = inputs(size, dtype, spread)

    def last(q, al, cl, y, key_blocks):
        return kernels.last(q, al, cl, y, key_blocks=key_blocks, block_sizes=block_sizes)

    out, lse = run(last, q, al, cl, y, key_blocks, how=how)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    expected, expected_lse = reference.last(*wide(q, al, cl, y), key_blocks=key_blocks)
    assert_close(out, expected, dtype, "forward", f"{size}")
    assert_close(lse, expected_lse, dtype, "lse", f"{size}")


def check_middle(size, dtype, *, floor=0.1, queries=None, key_blocks=None, spread=1.0, how=True):
    q, al, _, cl, block_sizes = inputs(size, dtype, spread)

    def middle(q, al, cl, queries, key_blocks):
        return kernels.middle(
            q, al, cl, floor=floor, queries=queries, key_blocks=key_blocks, block_sizes=block_sizes
        )

    qt = run(middle, q, al, cl, queries, key_blocks, how=how)
    assert qt.dtype == dtype
    expected = reference.middle(
        *wide(q, al, cl), floor=floor, queries=queries, key_blocks=key_blocks
    )
    assert_close(qt, expected, dtype, "forward", f"{size}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_last_and_middle_equal_the_oracle(size, dtype):
    check_last(size, dtype)
    check_middle(size, dtype)


@pytest.mark.parametrize("size", [SIZES[1], SIZES[2]], ids=str)
def test_masks(size):
    key_blocks, queries = masks(size)
    check_last(size, "float32", key_blocks=key_blocks)
    check_middle(size, "float32", floor=0.0, queries=queries, key_blocks=key_blocks)


def test_without_any_key_block():
    size = (2, 9, 9, 16, 64, 64, None)
    key_blocks = jnp.ones((2, 9), bool).at[1].set(False)
    check_last(size, "bfloat16", key_blocks=key_blocks)
    check_middle(size, "bfloat16", key_blocks=key_blocks)


@pytest.mark.parametrize("spread", [100.0, 0.0])
def test_extreme_scores_take_the_careful_path(spread):
    """Scores of some +-300; and scores that are all far below zero."""
    size = (1, 9, 9, 16, 64, 64, None)
    q, al, y, cl, block_sizes = inputs(size, "float32", spread)
    cl = cl if spread else cl + 400.0
    out, lse, qt = run(lambda *xs: last_and_middle(*xs, block_sizes), q, al, cl, y)
    assert float(jnp.abs(lse).max()) > 100
    expected, expected_lse = reference.last(q, al, cl, y)
    # The scores themselves carry a rounding of 300 * 2^-24.
    np.testing.assert_allclose(out, expected, atol=2e-4)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    np.testing.assert_allclose(qt, reference.middle(q, al, cl, floor=0.1), atol=3e-4 * (1 + spread))


def test_nan_comes_out():
    size = (1, 9, 9, 32, 64, 64, 16)
    q, al, y, cl, block_sizes = inputs(size, "float32")
    q = q.at[0, 2, 3].set(jnp.nan)
    out, lse, qt = run(lambda *xs: last_and_middle(*xs, block_sizes), q, al, cl, y)
    assert jnp.isnan(out[0, 2, 3]).all()
    assert jnp.isnan(lse[0, 2, 3])
    assert jnp.isnan(qt[0, :, 3]).all()
    assert jnp.isfinite(out[:, :, 16:]).all()
    assert jnp.isfinite(qt[:, :, 16:]).all()


def position_oracle(q, k, v, mask, scale, gain):
    f = jnp.where(mask[:, :, None], jnp.einsum("gljd,gkjd->gklj", q, k) * scale, -jnp.inf)
    p = jax.nn.softmax(f, axis=1)
    outs = gain * jnp.einsum("gklj,gkjd->gljd", p, k), jnp.einsum("gklj,gkje->glje", p, v)
    return outs, jax.nn.logsumexp(f, axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_position_attention_and_its_gradient(dtype):
    """Values K and V, gains, and a mask of single keys, as in blocks of few tokens."""
    q, k, v, _, block_sizes = inputs((2, 9, 9, 18, 64, 32, None), dtype)
    mask = jnp.asarray(np.random.default_rng(3).random(k.shape[:3]) < 0.8).at[:, 0].set(True)

    def kernel(q, k, v):
        return kernels.position_attention(
            q, k, (k, v), scale=0.3, gains=(0.3, 1.0), key_blocks=mask, block_sizes=block_sizes
        )

    def oracle(q, k, v):
        return position_oracle(q, k, v, mask, 0.3, 0.3)

    def both(function, q, k, v, cotangents):
        result, pullback = jax.vjp(function, q, k, v)
        return result, pullback(jax.tree.map(lambda c, x: c.astype(x.dtype), cotangents, result))

    expected, pullback = jax.vjp(oracle, *wide(q, k, v))
    cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), expected)
    cotangents = jax.tree.map(lambda c, v: c.astype(dtype), cotangents, expected)
    actual, gradients = run(lambda *xs: both(kernel, *xs), q, k, v, cotangents)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(got, want, dtype, "forward")
    wanted = pullback(*wide(cotangents))
    for name, got, want in zip("qkv", gradients, wanted, strict=True):
        assert_close(got, want, dtype, "gradient", name)


def test_gradients_of_last_and_middle():
    size = (1, 9, 10, 16, 64, 64, None)
    q, al, y, cl, block_sizes = inputs(size, "float32")
    key_blocks, queries = masks(size)

    def loss(room, **settings):
        def of(q, al, cl, y):
            out, lse = room.last(q, al, cl, y, key_blocks=key_blocks, **settings)
            qt = room.middle(
                q, al, cl, floor=0.1, queries=queries, key_blocks=key_blocks, **settings
            )
            return (out**2).sum() + jnp.sin(lse).sum() + (qt**3).sum()

        return jax.grad(of, argnums=(0, 1, 2, 3))

    actual = run(loss(kernels, block_sizes=block_sizes), q, al, cl, y)
    expected = loss(reference)(q, al, cl, y)
    for name, got, want in zip(("q", "al", "cl", "y"), actual, expected, strict=True):
        assert_close(got, want, "float32", "gradient", name)


@pytest.mark.slow
def test_many_frames():
    """More than a product holds: attention over positions, twice for the mean queries."""
    size = (1, 130, 140, 3, 64, 64, None)
    key_blocks, queries = masks(size)
    check_last(size, "float32", key_blocks=key_blocks)
    check_middle(size, "float32", queries=queries, key_blocks=key_blocks)
    check_middle(size, "bfloat16")


def test_vmap():
    q, al, y, cl, block_sizes = inputs((1, 4, 4, 32, 64, 64, None), "float32")

    def last(q, al, cl, y):
        return kernels.last(q, al, cl, y, block_sizes=block_sizes)

    stacked = [jnp.stack([x, 0.5 * x]) for x in (q, al, cl, y)]
    out, lse = run(jax.vmap(last), *stacked)
    expected, expected_lse = jax.vmap(reference.last)(*stacked)
    assert_close(out, expected, "float32", "forward")
    assert_close(lse, expected_lse, "float32", "lse")


def test_other_dtypes_are_refused():
    q, al, y, cl, block_sizes = inputs((1, 4, 4, 16, 64, 64, None), "float16")
    with interpreted(), pytest.raises(NotImplementedError, match="float16"):
        kernels.last(q, al, cl, y, block_sizes=block_sizes)


@pytest.mark.slow
def test_no_race_and_no_unwritten_memory():
    how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check_last((1, 9, 9, 40, 64, 64, 16), "bfloat16", how=how)
    check_middle((1, 9, 9, 40, 64, 64, 16), "bfloat16", how=how)
