"""Pairs of blocks that the L step leaves out, and guided attention, which attends to them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas.attention_inputs import arrays, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.l_step import gpu as l_step
from vmonarch_jax.pallas_kernels.l_step import reference

import vmonarch_jax as vm

pytestmark = pytest.mark.usefixtures("gpu_interpreted")
SIZES = BlockSizes()


# Groups, frames of q, frames of k, positions, head dim.
@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 5, 7, 2, 64), (1, 70, 90, 1, 128)])
def test_pairs_left_out(size):
    g, m, blocks, n, d = size
    q, al, y = arrays([(g, m, n, d), (g, blocks, n, d), (g, blocks, n, d)], "bfloat16")
    cl = -3 * jnp.abs(arrays([(g, blocks, n)], "float32", 1)[0])
    left_out = jnp.asarray(np.random.default_rng(2).random((g, m, blocks)) < 0.4)
    left_out = left_out.at[0, 1].set(True)  # a query block with nothing left
    gain, masks = d**-0.5, {"left_out": left_out}
    masks["key_blocks"] = jnp.ones((g, blocks), bool).at[:, 2].set(False)

    def found(*arrays):
        return l_step.last(*arrays, gain=gain, entries=g, block_sizes=SIZES, **masks)

    def oracle(q, al, cl, y):
        return reference.last(q, gain * al, cl, y, **masks)

    (out, lse), pullback = jax.vjp(found, q, al, cl, y)
    expected, expected_lse = oracle(*(x.astype(jnp.float32) for x in (q, al, cl, y)))
    assert_close(out, expected, "bfloat16", "forward", "out")
    assert_close(lse, expected_lse, "bfloat16", "lse", "lse")
    np.testing.assert_array_equal(lse[0, 1], -np.inf)
    cotangents = arrays([out.shape], "bfloat16", 3)[0], arrays([lse.shape], "float32", 4)[0]
    cotangents = cotangents[0], jnp.where(jnp.isfinite(lse), cotangents[1], 0)
    for x, wanted in zip(
        pullback(cotangents), oracle_gradient(oracle, (q, al, cl, y), cotangents), strict=True
    ):
        assert_close(x, wanted, "bfloat16", "gradient", "left out")


@pytest.mark.slow
def test_guided_attention():
    grid, guided = (4, 2, 3), vm.Guided(vm.VMonarch(recompute_frames=0), exact_blocks=2, every=5)
    query, key, value = arrays([(1, 24, 2, 64)] * 3, "bfloat16")
    chosen = np.random.default_rng(3).permuted(np.tile(np.arange(4), (1, 2, 4, 1)), axis=-1)
    indices = jnp.asarray(np.sort(chosen[..., :2], axis=-1), jnp.int32)
    state = vm.GuidedState(indices, jnp.ones(1, bool))

    def run(implementation, *arrays):
        settings = {"grid": grid, "return_lse": True, "implementation": implementation}
        return guided(*arrays, state=state, step=1, **settings)[0]

    out, lse = run("pallas_gpu", query, key, value)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    expected, expected_lse = run("reference", *wide)
    assert_close(out, expected, "bfloat16", "forward", "out")
    assert_close(lse, expected_lse, "bfloat16", "lse", "lse")
