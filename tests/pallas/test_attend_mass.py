"""Dense attention and block masses in one TPU kernel, interpreted, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from jax.experimental.pallas import tpu as pltpu
from pallas.attention_inputs import arrays, attention, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.attend import reference
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.block_sparse.tpu import attend_mass
from vmonarch_jax.pallas_kernels.tpu.call import interpreted, recording

HOW = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SCALE = 0.1

# groups, query blocks, key blocks, block, real rows, real keys, head dim, value dim, dtype, and
# rows and keys of a step
SIZES = [
    (2, 5, 7, 64, 300, 440, 64, 64, "float32", 128, 128),  # a block in 64 lanes, 3 of them in 1
    (1, 10, 150, 16, 160, 2240, 64, 32, "float32", 64, 2048),  # a lane each, whole blocks padded
    (1, 3, 4, 128, 384, 500, 128, 128, "bfloat16", None, None),  # all keys in one step
    (1, 6, 18, 32, 180, 560, 64, 64, "bfloat16", 96, 512),  # a block in 8 lanes
    (1, 2, 260, 8, 16, 2077, 64, 1, "float32", None, 2048),  # more blocks than lanes in a step
]


def inputs(size, loud=1.0):
    groups, p, blocks, block, _, _, d, e, dtype, *_ = size
    n, s = p * block, blocks * block
    q, k, v = arrays([(groups, n, d), (groups, s, d), (groups, s, e)], dtype)
    return (loud * q).astype(dtype), k, v


def fused(size, *inputs, how=True, copy_bytes=None):
    _, _, _, block, real, length, *_, rows, keys = size
    sizes = BlockSizes(tpu_rows=rows, tpu_keys=keys, copy_bytes=copy_bytes)
    with interpreted(how):
        return jit(
            lambda *inputs: attend_mass(
                *inputs, block=block, rows=real, length=length, scale=SCALE, block_sizes=sizes
            )
        )(*inputs)


def expected(size, q, k, v):
    """`out, lse, mass` in float64, the masses block by block."""
    _, p, blocks, _, real, length, *_ = size
    (out,), lse = attention(q, k[:, :length], [v[:, :length]], scale=SCALE)
    x = SCALE * np.asarray(q, np.float64) @ np.asarray(k, np.float64).swapaxes(1, 2)
    weights = np.zeros_like(x)
    weights[:, :real, :length] = np.exp(x - lse[..., None])[:, :real, :length]
    mass = [
        [[tile.sum() for tile in np.split(rows, blocks, axis=1)] for rows in np.split(group, p)]
        for group in weights
    ]
    return out, lse, mass


def compare(size, got, want):
    real, dtype = size[4], size[8]
    assert got[0].dtype == dtype
    assert got[1].dtype == got[2].dtype == jnp.float32
    # Rows behind the last real one are padding: what they attend to does not matter.
    assert_close(got[0][:, :real], want[0][:, :real], dtype, "forward")
    assert_close(got[1][:, :real], want[1][:, :real], dtype, "lse")
    assert_close(got[2], want[2], dtype, "forward")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_and_masses(size):
    args = inputs(size)
    how = HOW if size in SIZES[:2] else True
    compare(size, fused(size, *args, how=how), expected(size, *args))


@pytest.mark.parametrize("case", ["loud", "low", "late", "first"])
def test_extreme_scores(case):
    size = SIZES[0]
    q, k, v = inputs(size)
    if case == "low":  # every weight without a shift underflows
        q, k = q.at[..., 0].set(-300.0), k.at[..., 0].set(60.0)
    else:  # hundreds, everywhere or in some keys alone: a maximum that moves, or does not
        loud = {"loud": slice(None), "late": slice(300, 400), "first": slice(70)}[case]
        k = k.at[:, loud].multiply(200.0)
    got = fused(size, q, k, v)
    want = expected(size, q, k, v)
    # The scores themselves are off by a float32's share of their size.
    assert_close(got[1][:, :300], want[1][:, :300], "float32", "lse")
    tolerance = 1e-6 * np.abs(want[1]).max()
    np.testing.assert_allclose(got[0][:, :300], want[0][:, :300], atol=10 * tolerance)
    np.testing.assert_allclose(got[2], want[2], atol=64 * tolerance)
    np.testing.assert_allclose(got[2].sum(-1), [[64] * 4 + [44]] * 2, rtol=1e-5)


def test_a_few_heads_at_a_time():
    size = (3, *SIZES[3][1:])
    args = inputs(size)
    with recording() as launches:
        got = fused(size, *args, copy_bytes=1)
    assert {launch.grid[0] for launch in launches} == {1}
    compare(size, got, expected(size, *args))


def test_nan_stays_in_its_row_of_blocks():
    size = SIZES[2]
    q, k, v = inputs(size)
    out, lse, mass = fused(size, q.at[0, 130, 3].set(jnp.nan), k, v)
    np.testing.assert_array_equal(np.isnan(lse[0]), np.arange(384) == 130)
    np.testing.assert_array_equal(np.isnan(out[0]).any(-1), np.arange(384) == 130)
    np.testing.assert_array_equal(np.isnan(mass[0]), [[False] * 4, [True] * 4, [False] * 4])


def test_gradient_is_that_of_the_attention():
    size = SIZES[0]
    q, k, v = inputs(size)
    dout, dmass = arrays([(*q.shape[:2], v.shape[2]), (2, 5, 7)], "float32", 1)
    (dlse,) = arrays([q.shape[:2]], "float32", 2)

    def gradients(q, k, v):
        def call(q, k, v):
            return attend_mass(
                q, k, v, block=64, rows=300, length=440, scale=SCALE, block_sizes=BlockSizes()
            )

        return jax.vjp(call, q, k, v)[1]((dout, dlse, dmass))

    def plain(q, k, v):
        (out,), lse = reference.attend(
            q, k, (v,), scale=SCALE, mask=jnp.broadcast_to(jnp.arange(448) < 440, (2, 448))
        )
        return out, lse

    with interpreted():
        got = jit(gradients)(q, k, v)
    want = oracle_gradient(plain, (q, k, v), (dout, dlse))
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, "float32", "gradient")


@pytest.mark.parametrize(
    ("blocks", "kernels"), [(8, ["attend_mass"]), (2**22, ["attend", "block_mass"])]
)
def test_two_passes_where_the_masses_do_not_fit(blocks, kernels):
    q = jax.ShapeDtypeStruct((1, 128, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, blocks * 64, 64), jnp.bfloat16)

    def call(q, k, v):
        return attend_mass(
            q, k, v, block=64, rows=100, length=blocks * 64, scale=SCALE, block_sizes=BlockSizes()
        )

    with interpreted(), recording() as launches:
        out, lse, mass = jax.eval_shape(call, q, k, k)
    assert [launch.name for launch in launches] == kernels
    assert (out.shape, lse.shape, mass.shape) == ((1, 128, 64), (1, 128), (1, 2, blocks))
