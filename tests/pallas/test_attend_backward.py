"""The backward TPU kernel of `attend`, interpreted, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from pallas.attention_inputs import arrays, attention
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.attend import tpu_backward
from vmonarch_jax.pallas_kernels.attend.tpu_backward import backward
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.tpu import chips
from vmonarch_jax.pallas_kernels.tpu.call import interpreted, recording

# groups, rows, keys, head dim, widths of the values past K, rows and keys of a grid step
SIZES = [
    (2, 40, 40, 128, (), None, None),
    (3, 13, 29, 64, (64,), None, None),
    (2, 24, 40, 128, (128,), None, None),
    (5, 1, 1, 128, (), None, None),
    (1, 300, 200, 64, (64,), 112, None),
    (1, 528, 64, 128, (128,), None, None),
    (2, 48, 400, 128, (), None, 80),
    (1, 150, 333, 64, (64,), 64, 128),
    (12, 6, 7, 128, (), None, None),
    (6, 52, 60, 64, (64,), None, None),
    (2, 33, 50, 128, (64,), None, None),
]


def gradients(q, k, values, douts, dlse, *, scale, gains, bias=None, mask=None):
    """`(dq, dk, dvalues, dbias)`, with each gradient written out in float64."""
    _, lse = attention(q, k, values, scale=scale, bias=bias, mask=mask)
    q, k, dlse, *rest = (np.asarray(x, np.float64) for x in (q, k, dlse, *values, *douts))
    values, douts = rest[: len(values)], rest[len(values) :]
    x = scale * np.einsum("gnd,gsd->gns", q, k)
    if bias is not None:
        x = x + np.asarray(bias, np.float64)[:, None]
    if mask is not None:
        x = np.where(np.asarray(mask)[:, None], x, -np.inf)
    p = np.where(np.isfinite(x), np.exp(x - np.where(np.isfinite(lse), lse, 0)[..., None]), 0)
    dp = sum(
        gain * np.einsum("gne,gse->gns", dout, value)
        for gain, dout, value in zip(gains, douts, values, strict=True)
    )
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + dlse[..., None])
    dvalues = [
        gain * np.einsum("gns,gne->gse", p, dout) for gain, dout in zip(gains, douts, strict=True)
    ]
    dq = scale * np.einsum("gns,gsd->gnd", ds, k)
    return dq, scale * np.einsum("gns,gnd->gsd", ds, q), dvalues, ds.sum(1)


def check(
    size, dtype, *, shared, how=True, loud=1.0, dlse=True, biased=False, mask=None, gains=None
):
    g, n, s, d, widths, rows, keys = size
    all_widths = (d, *widths) if shared else widths or (d,)
    gains = gains or (d**-0.5, 1.0, 1.0)[: len(all_widths)]
    q, k, bias, dlse_ = arrays([(g, n, d), (g, s, d), (g, s), (g, n)], dtype)
    values = arrays([(g, s, w) for w in all_widths[int(shared) :]], dtype, 1)
    douts = arrays([(g, n, w) for w in all_widths], dtype, 2)
    q, scale = (loud * q).astype(dtype), d**-0.5
    bias = bias.astype(jnp.float32) if biased else None
    dlse_ = dlse_.astype(jnp.float32) * (1.0 if dlse else 0.0)
    every = [k, *values] if shared else values
    outs, lse = attention(q, k, every, scale=scale, gains=gains, bias=bias, mask=mask)
    line = bias
    if mask is not None:
        line = jnp.where(mask, 0.0 if bias is None else bias, -1e30)
    with interpreted(how):
        got = jax.jit(
            lambda *arrays: backward(
                *arrays, scale=scale, gains=gains, bias=line, shared=shared,
                block_sizes=BlockSizes(tpu_rows=rows, tpu_keys=keys),
            )
        )(
            q, k, tuple(values), tuple(jnp.asarray(x, dtype) for x in outs),
            jnp.asarray(lse, jnp.float32), tuple(douts), dlse_ if dlse else None,
        )  # fmt: skip
    dq, dk, dvalues, dbias = gradients(
        q, k, every, douts, dlse_, scale=scale, gains=gains, bias=bias, mask=mask
    )
    if shared:
        dk, dvalues = dk + dvalues[0], dvalues[1:]
    for x, want in zip((*got[:2], *got[2]), (dq, dk, *dvalues), strict=True):
        assert x.dtype == q.dtype
        assert_close(x, want, dtype, "gradient")
    assert (got[3] is None) == (line is None)
    if biased:
        assert_close(got[3], dbias, dtype, "gradient")
    return got


@pytest.mark.parametrize("shared", [True, False], ids=["r_step", "attend"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, shared):
    check(size, "float32", shared=shared)


@pytest.mark.parametrize("shared", [True, False], ids=["r_step", "attend"])
@pytest.mark.parametrize("size", SIZES[2:10:2], ids=str)
def test_bfloat16(size, shared):
    check(size, "bfloat16", shared=shared)


@pytest.mark.parametrize("wide", [(), tuple(chips.CHIPS)], ids=["narrow", "wide"])
def test_any_matmul_unit(monkeypatch, wide):
    """Chips differ in which operand of dq's product is turned."""
    monkeypatch.setattr(tpu_backward, "WIDE", wide)
    check((1, 300, 40, 128, (128,), None, None), "bfloat16", shared=True)


@pytest.mark.parametrize("keys", [None, 128])
@pytest.mark.parametrize("case", ["bias", "mask", "both", "empty"])
def test_bias_and_mask(case, keys):
    shared = case == "both"
    mask = np.random.default_rng(1).random((3, 300)) < 0.5
    if case == "empty":
        mask[1] = False
        mask[2, :128] = False
    mask = None if case == "bias" else jnp.asarray(mask)
    size = (3, 24, 300, 64, (64,), None, keys)
    got = check(size, "float32", shared=shared, biased=case in ("bias", "both"), mask=mask)
    if case == "empty":
        assert not any(np.asarray(x[1]).any() for x in jax.tree.leaves(got))


def test_extreme_scores():
    """Scores of some hundreds: weights of 0 and 1, nothing that overflows."""
    check((2, 40, 56, 64, (64,), None, None), "float32", shared=False, loud=60.0, dlse=False)


def test_padded_keys_under_very_low_rows():
    """Keys that only fill up a block must not weigh on rows whose own scores are all very low."""
    g, n, s, d = 1, 16, 150, 64
    q, k, v, dout = arrays([(g, n, d), (g, s, d), (g, s, d), (g, n, d)], "float32")
    q, k = 20 * jnp.abs(q), -jnp.abs(k)
    outs, lse = attention(q, k, [v], scale=1.0)
    assert lse.max() < -300
    with interpreted():
        dq, dk, (dv,), _ = backward(
            q, k, (v,), (jnp.asarray(outs[0], jnp.float32),), jnp.asarray(lse, jnp.float32),
            (dout,), None, scale=1.0, gains=(1.0,), shared=False,
            block_sizes=BlockSizes(tpu_keys=128),
        )  # fmt: skip
    want = gradients(q, k, [v], [dout], np.zeros((g, n)), scale=1.0, gains=(1.0,))
    # Scores near a thousand keep ten bits less of float32.
    for x, y in zip((dq, dk, dv), (want[0], want[1], want[2][0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-3 * np.abs(y).max())


def test_rows_split_over_launches(monkeypatch):
    """Where dq of all rows does not fit the VMEM, several launches share the rows."""
    monkeypatch.setattr(tpu_backward, "_parts", lambda *_: [range(2), range(2, 3)])
    with recording() as launches:
        check((1, 330, 300, 64, (64,), 112, 128), "float32", shared=True, biased=True)
    assert [launch.grid for launch in launches] == [(1, 3, 2), (1, 3, 1)]


def test_nan_reaches_the_gradient():
    q, k, v = arrays([(2, 16, 64)] * 3, "float32")
    q = q.at[0, 3, 0].set(jnp.nan)
    outs, lse = attention(q, k, [v], scale=0.1)
    with interpreted():
        dq, dk, _, _ = backward(
            q, k, (v,), (jnp.asarray(outs[0], jnp.float32),), jnp.asarray(lse, jnp.float32),
            (v,), None, scale=0.1, gains=(1.0,), shared=False, block_sizes=BlockSizes(),
        )  # fmt: skip
    assert np.isnan(dq[0, 3]).all()
    assert np.isnan(dk[0]).all()
    assert np.isfinite(dq[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["r_step", "attend"])
def test_no_races_and_no_unwritten_memory(shared):
    how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check((2, 72, 200, 64, (64,), 32, 128), "bfloat16", shared=shared, how=how, biased=True)


def test_refuses_what_it_cannot_serve():
    x = jnp.zeros((1, 8, 64), jnp.float16)
    vector = jnp.zeros((1, 8))
    with interpreted(), pytest.raises(NotImplementedError, match="float16"):
        backward(
            x, x, (x,), (x,), vector, (x,), None,
            scale=1.0, gains=(1.0,), shared=False, block_sizes=BlockSizes(),
        )  # fmt: skip
