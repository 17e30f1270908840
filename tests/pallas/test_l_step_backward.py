"""The backward kernels of the L step, interpreted, against gradients of the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from pallas.attention_inputs import arrays
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.l_step import reference
from vmonarch_jax.pallas_kernels.l_step.tpu_backward import last_backward, middle_backward
from vmonarch_jax.pallas_kernels.tpu.call import interpreted

# groups, frames of q, frames of k, positions, head dim, value dim, positions of a grid step
SIZES = [
    (1, 1, 1, 1, 128, 128, 16),
    (2, 5, 5, 37, 128, 128, 16),
    (1, 9, 14, 20, 64, 64, 16),
    (2, 13, 13, 34, 128, 64, 16),
    (1, 21, 21, 24, 128, 128, 16),
    (1, 46, 46, 7, 64, 64, 16),
    (1, 70, 81, 2, 128, 128, 16),
]

# The larger float32 ones unroll into many products, which take the interpreter long to compile.
CALLS = [(size, "bfloat16") for size in SIZES] + [(size, "float32") for size in SIZES[:4]]


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def check(actual, expected, dtype, names):
    for name, got, want in zip(names, actual, expected, strict=True):
        assert_close(got, want, dtype, "gradient", name)


def last_both(
    size, dtype, *, scale=1.0, gains=(1.0,), with_dlse=True, with_shift=True, key_blocks=None,
    spread=0.3, shared=False, how=True,
):  # fmt: skip
    g, m, keys, n, d, e, block = size
    q, k, y, do, cl, dlse = arrays(
        [(g, m, n, d), (g, keys, n, d), (g, keys, n, e), (g, m, n, e), (g, keys, n), (g, m, n)],
        "float32",
    )
    q, k, y, do = ((spread * q).astype(dtype), k.astype(dtype), y.astype(dtype), do.astype(dtype))
    dk_out = arrays([(g, m, n, d)], dtype, 5)[0]
    cl = cl if with_shift else jnp.zeros_like(cl)

    def oracle(q, k, cl, y):
        out, lse = reference.last(scale * q, k, cl, y, key_blocks=key_blocks)
        if not shared:
            return gains[0] * out, lse
        more, _ = reference.last(scale * q, k, cl, k, key_blocks=key_blocks)
        return gains[0] * more, gains[1] * out, lse

    (*outs, lse), pullback = jax.vjp(oracle, *wide((q, k, cl, y)))
    some = jnp.isfinite(lse)
    douts = (dk_out, do) if shared else (do,)
    dlse = jnp.where(some, dlse, 0) if with_dlse else None
    wanted = pullback((*wide(douts), jnp.zeros_like(lse) if dlse is None else dlse))
    values = (k, y) if shared else (y,)
    with interpreted(how):
        dq, dk, dshift, dvalues = last_backward(
            q, k, cl if with_shift else None, values,
            tuple(x.astype(dtype) for x in outs), lse, douts, dlse,
            scale=scale, gains=gains, key_blocks=key_blocks,
            block_sizes=BlockSizes(tpu_positions=block),
        )  # fmt: skip
    assert dq.dtype == dk.dtype == dvalues[-1].dtype == dtype
    if shared:
        dk = dk.astype(jnp.float32) + dvalues[0].astype(jnp.float32)
    if with_shift:
        assert dshift.dtype == jnp.float32
        check((dq, dk, dshift, dvalues[-1]), wanted, dtype, ("q", "k", "shift", "value"))
    else:
        assert dshift is None
        check((dq, dk, dvalues[-1]), (*wanted[:2], wanted[3]), dtype, ("q", "k", "value"))


def middle_both(
    size, dtype, *, floor=0.1, queries=None, key_blocks=None, spread=0.1, want_dcl=True, how=True,
    shift=0.0,
):  # fmt: skip
    g, m, keys, n, d, _, block = size
    q, al, dqt, cl = arrays(
        [(g, m, n, d), (g, keys, n, d), (g, keys, n, d), (g, keys, n)], "float32"
    )
    q, al, dqt = ((spread * q).astype(dtype), al.astype(dtype), dqt.astype(dtype))
    cl = cl + shift

    def oracle(q, al, cl):
        return reference.middle(q, al, cl, floor=floor, queries=queries, key_blocks=key_blocks)

    qt, pullback = jax.vjp(oracle, *wide((q, al, cl)))
    wanted = pullback(wide(dqt))
    with interpreted(how):
        dq, dal, dcl = middle_backward(
            q, al, cl, qt.astype(dtype), dqt,
            floor=floor, queries=queries, key_blocks=key_blocks, want_dcl=want_dcl,
            block_sizes=BlockSizes(tpu_positions=block),
        )  # fmt: skip
    assert dq.dtype == dal.dtype == dtype
    if want_dcl:
        assert dcl.dtype == jnp.float32
        check((dq, dal, dcl), wanted, dtype, ("q", "al", "cl"))
    else:
        assert dcl is None
        check((dq, dal), wanted[:2], dtype, ("q", "al"))


@pytest.mark.parametrize(("size", "dtype"), CALLS, ids=str)
def test_last(size, dtype):
    last_both(size, dtype)


@pytest.mark.parametrize(("size", "dtype"), CALLS, ids=str)
def test_middle(size, dtype):
    middle_both(size, dtype)


def some_blocks(size, kept=0.6, none=None):
    mask = np.random.default_rng(3).random((size[0], size[2])) < kept
    mask[:, -1] = True
    if none is not None:
        mask[none] = False
    return jnp.asarray(mask)


FEW = (2, 13, 13, 18, 128, 128, 16)


def test_last_as_an_r_step():
    size = (2, 12, 12, 20, 64, 64, 16)
    last_both(size, "bfloat16", scale=0.3, gains=(0.3, 1.0), shared=True, with_shift=False)


@pytest.mark.parametrize("none", [None, 1])
def test_last_masked(none):
    mask = some_blocks(FEW, none=none)
    last_both(FEW, "float32", key_blocks=mask, with_dlse=False)


@pytest.mark.parametrize("none", [None, 1])
@pytest.mark.parametrize("size", [FEW, (2, 9, 14, 20, 64, 64, 16)], ids=str)
def test_middle_masked(size, none):
    rows = np.random.default_rng(4).random((size[0], size[1], size[3])) < 0.7
    mask = some_blocks(size, none=none)
    middle_both(size, "float32", queries=jnp.asarray(rows), key_blocks=mask)


@pytest.mark.parametrize("floor", [0.0, 0.8])
def test_middle_floor(floor):
    middle_both(FEW, "float32", floor=floor, want_dcl=False)


def test_extreme_scores():
    # Logits of up to 75, whose sums of 2^x pass the largest that is trusted; and rows that all
    # underflow. (Float32 logits much larger than that are rounded to more than the tolerance.)
    last_both(FEW, "float32", spread=1.0)
    middle_both(FEW, "float32", spread=1.5)
    middle_both(FEW, "float32", shift=400.0)
    middle_both((1, 13, 13, 16, 128, 128, 16), "bfloat16", shift=-400.0)


def test_nan_stays_nan():
    g, m, n, d = 1, 9, 16, 128
    q, k, dout = arrays([(g, m, n, d)] * 3, "float32")
    cl = jnp.zeros((g, m, n))
    q = q.at[0, 2, 3, 4].set(jnp.nan)
    with interpreted():
        dq, dal, _ = middle_backward(
            0.1 * q, k, cl, None, dout, floor=0.1, block_sizes=BlockSizes()
        )
    assert jnp.isnan(dq[0, :, 3]).all()
    assert jnp.isnan(dal[0, :, 3]).all()


def test_too_many_frames():
    x = jnp.zeros((1, 129, 16, 128))
    with interpreted(), pytest.raises(NotImplementedError, match="128"):
        middle_backward(x, x, x[..., 0], None, x, floor=0.1, block_sizes=BlockSizes())


CAREFUL = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.slow
@pytest.mark.parametrize("both", [last_both, middle_both])
def test_races_and_uninitialised_memory(both):
    both((1, 13, 13, 40, 128, 128, 16), "bfloat16", how=CAREFUL)
