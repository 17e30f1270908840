"""Masked keys in the GPU kernels of attention and of the R step, and padded grids through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas.attention_inputs import arrays, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.attend import gpu as attend
from vmonarch_jax.pallas_kernels.attend import reference
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.r_step import gpu as r_step
from vmonarch_jax.pallas_kernels.r_step import reference as r_reference

import vmonarch_jax as vm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("gpu_interpreted")]
SIZES = BlockSizes()


def wide(*trees):
    return jax.tree.map(lambda x: x.astype(jnp.float32), trees)


# Keys: a tail, and whole blocks of them; real ones of the two groups' first and last only.
@pytest.mark.parametrize("s", [150, 128])
def test_attend(s):
    q, k, v = arrays([(3, 20, 64), (3, s, 64), (3, s, 64)], "bfloat16")
    mask = jnp.asarray(np.random.default_rng(2).random((3, s)) < 0.5)
    mask = mask.at[0, :70].set(False).at[1].set(False)  # a group whose first block has no key

    def found(q, k, v):
        return attend.attend(q, k, (v,), scale=0.125, mask=mask, block_sizes=SIZES)

    def oracle(q, k, v):
        return reference.attend(q, k, (v,), scale=0.125, mask=mask)

    ((out,), lse), pullback = jax.vjp(found, q, k, v)
    (expected,), expected_lse = oracle(*wide(q, k, v))
    assert_close(out, expected, "bfloat16", "forward", "out")
    assert_close(lse, expected_lse, "bfloat16", "lse", "lse")
    np.testing.assert_array_equal(out[1], 0)
    cotangents = (arrays([out.shape], "bfloat16", 3)[0],), jnp.zeros_like(lse)
    wanted = oracle_gradient(oracle, (q, k, v), cotangents)
    for x, expected in zip(pullback(cotangents), wanted, strict=True):
        assert_close(x, expected, "bfloat16", "gradient", "masked")


def test_r_step():
    shapes = [(1, 2, 9, 64), (1, 2, 70, 64), (1, 2, 70, 64)]
    qt, k, v = (x.astype("bfloat16") for x in arrays(shapes, "float32"))
    keys = jnp.asarray(np.random.default_rng(2).random((1, 2, 70)) < 0.5).at[0, 1].set(False)
    settings = {"scale": 0.125, "keys": keys, "entropy_gradient": True}

    def found(qt, k, v):
        return r_step.r_step(qt, k, (v,), **settings, block_sizes=SIZES)

    def oracle(qt, k, v):
        return r_reference.r_step(qt, k, (v,), **settings)

    step, pullback = jax.vjp(found, qt, k, v)
    expected = oracle(*wide(qt, k, v))
    for name in ("al", "cl", "lse"):
        kind = "forward" if name == "al" else "lse"
        assert_close(getattr(step, name), getattr(expected, name), "bfloat16", kind, name)
    assert_close(step.ys[0], expected.ys[0], "bfloat16", "forward", "Y")
    cotangents = jax.tree.map(lambda x: arrays([x.shape], x.dtype, x.ndim)[0], step)
    cotangents = cotangents._replace(lse=jnp.zeros_like(step.lse))
    wanted = oracle_gradient(oracle, (qt, k, v), cotangents)
    for x, expected in zip(pullback(cotangents), wanted, strict=True):
        assert_close(x, expected, "bfloat16", "gradient", "masked")


def test_a_padded_grid():
    """Blocks that do not divide the grid, so that some of their tokens are padding."""
    query, key, value = arrays([(1, 30, 1, 64)] * 3, "bfloat16")
    settings = {"grid": (5, 2, 3), "block": (2, 2, 3), "return_lse": True, "recompute_frames": 0}
    out, lse = vm.vmonarch_attention(query, key, value, implementation="pallas_gpu", **settings)
    wanted = vm.vmonarch_attention(*wide(query, key, value), implementation="reference", **settings)
    assert_close(out, wanted[0], "bfloat16", "forward", "out")
    assert_close(lse, wanted[1], "bfloat16", "lse", "lse")
