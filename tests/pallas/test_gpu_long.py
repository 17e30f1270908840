"""Gradients of the L step of more than 64 frames, where two warpgroups share a position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas.attention_inputs import arrays, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.l_step import gpu as l_step
from vmonarch_jax.pallas_kernels.l_step import gpu_backward, gpu_backward_long, reference

pytestmark = pytest.mark.usefixtures("gpu_interpreted")
SIZES = BlockSizes()

# Groups, frames of q, frames of k, positions, head dim, value dim; what to mask; dtype. Positions
# are several, so that one's arrays arrive while another's are used, or one.
CASES = [
    ((1, 66, 67, 1, 64, 64), True, "bfloat16"),
    pytest.param((1, 70, 40, 3, 64, 64), False, "float16", marks=pytest.mark.slow),
    pytest.param((2, 40, 128, 2, 128, 64), True, "bfloat16", marks=pytest.mark.slow),
]


def inputs(size, masked, dtype):
    g, m, blocks, n, d, e = size
    q, al, y = arrays([(g, m, n, d), (g, blocks, n, d), (g, blocks, n, e)], dtype)
    # Some key blocks below the floor, some above.
    cl = -3 * jnp.abs(arrays([(g, blocks, n)], "float32", 1)[0]) - 2
    masks = {"key_blocks": None, "queries": None}
    if masked:
        masks["key_blocks"] = jnp.ones((g, blocks), bool).at[0, 2:4].set(False)
        masks["queries"] = jnp.asarray(np.random.default_rng(2).random((g, m, n)) < 0.6)
    return (q, al, cl, y), masks


def held(gradients, expected, dtype):
    for x, wanted in zip(gradients, expected, strict=True):
        assert x.shape == wanted.shape
        assert_close(x, wanted, "bfloat16" if dtype == "float16" else dtype, "gradient", "long")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "masked", "dtype"), CASES)
def test_gradients_of_last(size, masked, dtype):
    g, m, _, n, d, e = size
    (q, al, cl, y), masks = inputs(size, masked, dtype)
    cotangents = arrays([(g, m, n, e)], dtype, 3)[0], arrays([(g, m, n)], "float32", 4)[0]
    gain, more = d**-0.5, {"key_blocks": masks["key_blocks"]}

    def found(*arrays):
        return l_step.last(*arrays, gain=gain, entries=g, block_sizes=SIZES, **more)

    def oracle(q, al, cl, y):
        return reference.last(q, gain * al, cl, y, **more)

    expected = oracle_gradient(oracle, (q, al, cl, y), cotangents)
    held(jax.vjp(found, q, al, cl, y)[1](cotangents), expected, dtype)


@pytest.mark.parametrize(("size", "masked", "dtype"), CASES)
def test_gradients_of_middle(size, masked, dtype):
    g, _, blocks, n, d, _ = size
    (q, al, cl, _), masks = inputs(size, masked, dtype)
    dqt = arrays([(g, blocks, n, d)], dtype, 5)[0]
    gain = d**-0.5

    def found(*arrays):
        return l_step.middle(*arrays, floor=0.5, gain=gain, block_sizes=SIZES, **masks)

    def oracle(q, al, cl):
        return reference.middle(q, gain * al, cl, floor=0.5, **masks)

    held(jax.vjp(found, q, al, cl)[1](dqt), oracle_gradient(oracle, (q, al, cl), dqt), dtype)


def test_so_many_frames_have_kernels_of_their_own():
    for frames, module in ((64, gpu_backward), (65, gpu_backward_long), (128, gpu_backward_long)):
        short, long = jnp.zeros((1, 3, 1, 64)), jnp.zeros((1, frames, 1, 64))
        assert l_step.backward_of(short, long) is module
        assert l_step.backward_of(long, short) is module
