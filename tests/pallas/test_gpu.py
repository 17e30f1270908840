"""The GPU kernels on a CPU, by Mosaic GPU's interpreter: threads, copies and barriers are real.

wgmma, register layouts and the copy engine's refusals are not: those are for the compiler
(`tests/aot_gpu`).
"""

import contextlib
import functools
import math

import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas.attention_inputs import arrays, attention, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.attend import gpu as attend
from vmonarch_jax.pallas_kernels.attend import reference
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.gpu import mode
from vmonarch_jax.pallas_kernels.l_step import gpu as l_step
from vmonarch_jax.pallas_kernels.l_step import reference as l_reference
from vmonarch_jax.pallas_kernels.r_step import gpu as r_step
from vmonarch_jax.pallas_kernels.r_step import reference as r_reference

import vmonarch_jax as vm

pytestmark = pytest.mark.usefixtures("gpu_interpreted")
SIZES = BlockSizes()


def tolerance_of(dtype):
    """float16 is held to bfloat16's bounds."""
    return "bfloat16" if dtype == "float16" else dtype


def l_inputs(size, dtype):
    g, m, blocks, n, d, e = size
    q, al, y = arrays([(g, m, n, d), (g, blocks, n, d), (g, blocks, n, e)], "float32")
    cl = -3 * jnp.abs(arrays([(g, blocks, n)], "float32", 1)[0])
    return q.astype(dtype), (2 * d**-0.5 * al).astype(dtype), y.astype(dtype), cl


def wide(*trees):
    return jax.tree.map(lambda x: x.astype(jnp.float32), trees)


# Groups, frames of q, frames of k, positions, head dim, value dim; dtype; entries of the batch.
L_SIZES = [
    ((2, 5, 5, 2, 64, 64), "float16", 1),
    ((2, 21, 21, 5, 128, 64), "bfloat16", 2),
    pytest.param((1, 70, 40, 3, 128, 128), "bfloat16", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "dtype", "entries"), L_SIZES)
def test_l_step(size, dtype, entries):
    q, al, y, cl = l_inputs(size, dtype)
    settings = {"gain": 1.5, "entries": entries, "block_sizes": SIZES}
    out, lse = l_step.last(q, al, cl, y, **settings)
    qt = l_step.middle(q, al, cl, floor=0.1, **settings)
    assert (out.dtype, lse.dtype, qt.dtype) == (dtype, jnp.float32, dtype)
    q, al, cl, y = wide(q, al, cl, y)
    expected, expected_lse = l_reference.last(q, 1.5 * al, cl, y)
    assert_close(out, expected, tolerance_of(dtype), "forward", "out")
    assert_close(lse, expected_lse, tolerance_of(dtype), "lse", "lse")
    expected = l_reference.middle(q, 1.5 * al, cl, floor=0.1)
    assert_close(qt, expected, tolerance_of(dtype), "forward", "qt")


def test_l_step_with_masks():
    g, m, n = 2, 6, 2
    q, al, y, cl = l_inputs((g, m, m, n, 64, 64), "bfloat16")
    key_blocks = jnp.ones((g, m), bool).at[0, 2:4].set(False).at[1].set(False)
    queries = jnp.asarray(np.random.default_rng(2).random((g, m, n)) < 0.6)
    masks = {"key_blocks": key_blocks}
    out, lse = l_step.last(q, al, cl, y, **masks, block_sizes=SIZES)
    expected, expected_lse = l_reference.last(*wide(q, al, cl, y), **masks)
    assert_close(out, expected, "bfloat16", "forward", "out")
    assert_close(lse, expected_lse, "bfloat16", "lse", "lse")
    masks["queries"] = queries
    qt = l_step.middle(q, al, cl, floor=0.1, **masks, block_sizes=SIZES)
    expected = l_reference.middle(*wide(q, al, cl), floor=0.1, **masks)
    assert_close(qt, expected, "bfloat16", "forward", "qt")


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_of_the_l_step(masked):
    n, gain = 1 + masked, 0.75
    size = (2, 5, 7, n, 64, 128)
    q, al, y, cl = l_inputs(size, "bfloat16")
    cl = cl - 2  # some key blocks below the floor, some above
    masks = {}
    if masked:
        masks["key_blocks"] = jnp.ones((2, 7), bool).at[0, 2:4].set(False)
    queries = jnp.asarray(np.random.default_rng(2).random((2, 5, n)) < 0.6) if masked else None
    of_last = arrays([(2, 5, n, 128)], "bfloat16", 3)[0], arrays([(2, 5, n)], "float32", 4)[0]
    of_middle = arrays([(2, 7, n, 64)], "bfloat16", 5)[0]

    def both(steps, times=1.0, **more):
        def last(q, al, cl, y):
            return steps.last(q, times * al, cl, y, **masks, **more)

        def middle(q, al, cl):
            return steps.middle(q, times * al, cl, floor=0.5, queries=queries, **masks, **more)

        return (last, (q, al, cl, y), of_last), (middle, (q, al, cl), of_middle)

    ours = both(l_step, gain=gain, entries=1 + masked, block_sizes=SIZES)
    for found, wanted in zip(ours, both(l_reference, gain), strict=True):
        function, inputs, cotangents = found
        gradients = jax.vjp(function, *inputs)[1](cotangents)
        for x, expected in zip(gradients, oracle_gradient(*wanted), strict=True):
            assert_close(x, expected, "bfloat16", "gradient", function.__name__)


# Groups, rows, keys, head dim: tails of rows and keys, fewer keys than a block, several blocks.
ROW_SIZES = [
    ((2, 70, 52, 64), "float16"),
    ((1, 130, 200, 128), "bfloat16"),
    pytest.param((1, 40, 700, 64), "bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "dtype"), ROW_SIZES)
def test_attend(size, dtype):
    g, n, s, d = size
    q, k, v = (x.astype(dtype) for x in arrays([(g, n, d), (g, s, d), (g, s, d)], "float32"))
    (out,), lse = attend.attend(q, k, (v,), scale=d**-0.5, block_sizes=SIZES)
    (expected,), expected_lse = attention(q, k, (v,), scale=d**-0.5)
    assert_close(out, expected, tolerance_of(dtype), "forward", "out")
    assert_close(lse, expected_lse, tolerance_of(dtype), "lse", "lse")


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(("size", "dtype"), ROW_SIZES[1:])
def test_r_step(size, dtype, count):
    g, n, s, d = size
    shapes = [(g, 1, n, d), *[(g, 1, s, d)] * (1 + count)]
    qt, k, *values = (x.astype(dtype) for x in arrays(shapes, "float32"))
    step = r_step.r_step(qt, k, tuple(values), scale=d**-0.5, block_sizes=SIZES)
    gains = (d**-0.5, *[1.0] * count)
    expected, lse = attention(qt, k, (k, *values), scale=d**-0.5, gains=gains)
    assert_close(step.lse, lse, dtype, "lse", "lse")
    for found, wanted in zip((step.al, *step.ys), expected, strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, dtype, "forward", "averages")
    # cL is that of the rounded aL, to float32's own rounding.
    entropy = (np.asarray(qt, np.float64) * np.asarray(step.al, np.float64)).sum(-1) - lse
    assert_close(step.cl, entropy, "float32", "forward", "cL")


def test_extreme_scores():
    """Rows whose scores are all far below or far above zero, with a tail of keys."""
    q, k, v = (
        x.astype("bfloat16") for x in arrays([(1, 64, 64), (1, 70, 64), (1, 70, 64)], "float32")
    )
    for shift in (-60.0, 60.0):
        pushed = q + shift * jnp.ones_like(q)
        drawn = jnp.abs(k)
        (out,), lse = attend.attend(pushed, drawn, (v,), scale=0.125, block_sizes=SIZES)
        (expected,), expected_lse = attention(pushed, drawn, (v,), scale=0.125)
        assert_close(out, expected, "bfloat16", "forward", f"{shift}")
        assert_close(lse, expected_lse, "bfloat16", "lse", f"{shift}")


@pytest.mark.parametrize("by", ["cudnn", "xla"])
def test_gradients_of_known_results(by):
    """No kernel runs forward: its results are given. The backward pass must be theirs.

    For cuDNN this value is too wide, and for the kernel of the gradient too.
    """
    width = 64 if by == "cudnn" else 128
    q, k, v = (
        x.astype("bfloat16") for x in arrays([(2, 9, 64), (2, 11, 64), (2, 11, width)], "float32")
    )
    settings = {"scale": 0.125, "gains": (1.0,)}
    part = reference.attend(q, k, (v,), **settings)
    known = jax.tree.map(lambda x: x.astype(jnp.bfloat16), part[0]), part[1]
    cotangents = (arrays([known[0][0].shape], "bfloat16", 3)[0],), arrays([(2, 9)], "float32", 4)[0]

    def one(q, k, v):
        return attend.attend(q, k, (v,), **settings, known=known, block_sizes=SIZES)

    def oracle(q, k, v):
        return reference.attend(q, k, (v,), **settings)

    with cudnn_stand_in.standing_in() if by == "cudnn" else contextlib.nullcontext():
        found = jax.vjp(one, q, k, v)[1](cotangents)
    for x, wanted in zip(found, oracle_gradient(oracle, (q, k, v), cotangents), strict=True):
        assert_close(x, wanted, "bfloat16", "gradient", by)


@pytest.mark.parametrize("by", ["cudnn", "xla"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradients_of_a_known_r_step(by, entropy_gradient):
    """Two values are more than the kernel of the gradient takes."""
    shapes = [(1, 2, 9, 64), *[(1, 2, 11, 64)] * 3]
    qt, k, *values = (x.astype("bfloat16") for x in arrays(shapes, "float32"))
    settings = {"scale": 0.125, "entropy_gradient": entropy_gradient}
    known = r_reference.r_step(qt, k, tuple(values), **settings)
    cotangents = jax.tree.map(lambda x: arrays([x.shape], x.dtype, x.ndim)[0], known)

    def one(qt, k, *values):
        return r_step.r_step(qt, k, values, **settings, known=known, block_sizes=SIZES)

    def oracle(qt, k, *values):
        return r_reference.r_step(qt, k, values, **settings)

    with cudnn_stand_in.standing_in() if by == "cudnn" else contextlib.nullcontext():
        found = jax.vjp(one, qt, k, *values)[1](cotangents)
    for x, wanted in zip(found, oracle_gradient(oracle, (qt, k, *values), cotangents), strict=True):
        assert_close(x, wanted, "bfloat16", "gradient", by)


# Entries of the batch, heads, grid.
WHOLE = [(1, 1, (3, 2, 3)), pytest.param(2, 2, (2, 1, 2), marks=pytest.mark.slow)]


@pytest.mark.parametrize(("batch", "heads", "grid"), WHOLE)
def test_the_whole_method(batch, heads, grid):
    query, key, value = arrays([(batch, math.prod(grid), heads, 64)] * 3, "bfloat16")
    settings = {"grid": grid, "return_lse": True}
    out, lse = vm.vmonarch_attention(query, key, value, implementation="pallas_gpu", **settings)
    wanted = vm.vmonarch_attention(*wide(query, key, value), implementation="reference", **settings)
    assert_close(out, wanted[0], "bfloat16", "forward", "out")
    assert_close(lse, wanted[1], "bfloat16", "lse", "lse")


def test_refusals():
    q = jnp.zeros((1, 8, 64), jnp.bfloat16)
    call = functools.partial(attend.attend, scale=1.0, block_sizes=SIZES)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        call(q.astype(jnp.float32), q, (q,))
    with pytest.raises(NotImplementedError, match="head dims of 64 or 128, got 32"):
        call(q[..., :32], q[..., :32], (q,))
    with pytest.raises(NotImplementedError, match="takes no bias"):
        call(q, q, (q,), bias=jnp.zeros((1, 8)))
    with mode.interpreted(None), pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        call(q, q, (q,))
    frames = jnp.zeros((1, 129, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="up to 128 frames, got 129"):
        l_step.middle(frames, frames, jnp.zeros((1, 129, 1)), floor=0.1, block_sizes=SIZES)
