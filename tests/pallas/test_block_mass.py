"""The TPU kernel of block masses, interpreted, against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from jax.experimental.pallas import tpu as pltpu
from pallas.attention_inputs import arrays
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.block_sparse.tpu import block_mass
from vmonarch_jax.pallas_kernels.tpu.call import interpreted

HOW = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

# groups, query blocks, key blocks, block, real keys, head dim, dtype, rows and keys of a step
SIZES = [
    (2, 10, 7, 64, 440, 64, "float32", None, None),
    (1, 17, 150, 16, 2240, 64, "float32", 128, 128),
    (1, 3, 4, 128, 512, 128, "bfloat16", None, 256),
    (1, 2, 130, 32, 4150, 64, "bfloat16", None, 384),
]


def masses(q, k, lse, size, how=HOW):
    _, _, _, block, length, _, _, rows, keys = size
    with interpreted(how):
        return jit(
            lambda *arrays: block_mass(
                *arrays, block=block, length=length, scale=0.1,
                block_sizes=BlockSizes(tpu_rows=rows, tpu_keys=keys),
            )
        )(q, k, lse)  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_masses(size):
    groups, p, blocks, block, length, d, dtype, *_ = size
    n, s = p * block, blocks * block
    q, k = arrays([(groups, n, d), (groups, s, d)], dtype)
    (lse,) = arrays([(groups, n)], "float32", 1)
    lse = (lse + 7).at[:, -5:].set(jnp.inf)
    got = masses(q, k, lse, size)
    x = 0.1 * np.asarray(q, np.float64) @ np.asarray(k, np.float64).swapaxes(1, 2)
    weights = np.exp(x - np.asarray(lse, np.float64)[..., None])
    weights[..., length:] = 0
    want = [
        [[tile.sum() for tile in np.split(rows, blocks, axis=1)] for rows in np.split(group, p)]
        for group in weights
    ]
    assert got.dtype == jnp.float32
    assert_close(got, want, dtype, "forward")


def test_nan_stays_in_its_row_of_blocks():
    size = SIZES[2]
    q, k = arrays([(1, 384, 128), (1, 512, 128)], "bfloat16")
    got = masses(q.at[0, 130, 3].set(jnp.nan), k, jnp.full((1, 384), 7.0), size, True)
    np.testing.assert_array_equal(np.isnan(got[0]), [[False] * 4, [True] * 4, [False] * 4])
