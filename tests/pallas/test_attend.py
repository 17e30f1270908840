"""The TPU kernel of `attend`, interpreted, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from pallas.attention_inputs import arrays, attention, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.attend import reference
from vmonarch_jax.pallas_kernels.attend.tpu import attend
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.tpu.call import interpreted

# groups, rows, keys, head dim, value dim, rows and keys of a grid step
SIZES = [
    (2, 40, 40, 128, 128, None, None),
    (3, 13, 29, 64, 64, None, None),
    (5, 1, 1, 128, 128, None, None),
    (1, 300, 200, 64, 64, 128, None),
    (2, 48, 400, 128, 128, None, 80),
    (1, 150, 333, 64, 64, 128, 128),
    (21, 6, 7, 128, 128, None, None),
    (2, 33, 50, 128, 64, None, None),
]


def both(q, k, values, dtype, *, sizes=BlockSizes(), scale=0.1, **more):  # noqa: B008
    with interpreted():
        outs, lse = attend(q, k, values, scale=scale, block_sizes=sizes, **more)
    wanted, wanted_lse = attention(q, k, values, scale=scale, **more)
    for out, want, v in zip(outs, wanted, values, strict=True):
        assert out.dtype == v.dtype
        assert_close(out, want, dtype, "forward")
    assert lse.dtype == jnp.float32
    assert_close(lse, wanted_lse, dtype, "lse")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(size, dtype):
    g, n, s, d, e, rows, keys = size
    q, k, v = arrays([(g, n, d), (g, s, d), (g, s, e)], dtype)
    both(q, k, (v,), dtype, sizes=BlockSizes(tpu_rows=rows, tpu_keys=keys))


@pytest.mark.parametrize("keys", [None, 128])
@pytest.mark.parametrize("case", ["bias", "mask", "both", "empty"])
def test_bias_and_mask(case, keys):
    q, k, v, bias = arrays([(3, 24, 64), (3, 300, 64), (3, 300, 64), (3, 300)], "float32")
    mask = np.random.default_rng(1).random((3, 300)) < 0.5
    if case == "empty":
        mask[1] = False
        mask[2, :128] = False
    both(
        q, k, (v,), "float32",
        bias=3 * bias if case in ("bias", "both") else None,
        mask=None if case == "bias" else jnp.asarray(mask),
        sizes=BlockSizes(tpu_keys=keys),
    )  # fmt: skip


@pytest.mark.parametrize("keys", [None, 128])
@pytest.mark.parametrize("extreme", ["large", "low", "late", "one row"])
def test_extreme_scores(extreme, keys):
    """Scores of hundreds take the careful path."""
    q, k, v = arrays([(2, 140, 64), (2, 300, 64), (2, 300, 64)], "float32")
    if extreme == "large":
        q = 5 * q  # scores of +-150
    if extreme == "low":
        q, k = jnp.abs(q), -3 * jnp.abs(k)  # every score near -120
    if extreme == "late":
        k = k.at[:, 200:].multiply(4.0)  # only in a later block
    if extreme == "one row":
        q = q.at[1, 77].multiply(8.0)
    both(q, k, (v,), "float32", sizes=BlockSizes(tpu_keys=keys), scale=1.0)


def test_several_values_and_gains():
    q, k, v, w = arrays([(2, 24, 64), (2, 56, 64), (2, 56, 64), (2, 56, 128)], "float32")
    both(q, k, (v, w, k), "float32", gains=(0.5, 1.0, -2.0))


@pytest.mark.parametrize("keys", [None, 128])
def test_nan_stays_in_its_row(keys):
    q, k, v = arrays([(1, 40, 64), (1, 256, 64), (1, 256, 64)], "float32")
    with interpreted():
        (out,), lse = attend(
            q.at[0, 3, 5].set(jnp.nan), k, (v,), scale=0.1, block_sizes=BlockSizes(tpu_keys=keys)
        )
    rows = np.arange(40) == 3
    np.testing.assert_array_equal(np.isnan(lse[0]), rows)
    np.testing.assert_array_equal(np.isnan(out[0]).all(-1), rows)
    np.testing.assert_array_equal(np.isnan(out[0]).any(-1), rows)


def test_refusals():
    x = jnp.zeros((1, 8, 64))
    with pytest.raises(NotImplementedError, match="need a TPU"):
        attend(x, x, (x,), scale=1.0, block_sizes=BlockSizes())
    x = x.astype(jnp.float16)
    with interpreted(), pytest.raises(NotImplementedError, match="float16"):
        attend(x, x, (x,), scale=1.0, block_sizes=BlockSizes())
    empty = jnp.zeros((1, 0, 64))
    with interpreted(), pytest.raises(NotImplementedError, match="empty"):
        attend(jnp.zeros((1, 8, 64)), empty, (empty,), scale=1.0, block_sizes=BlockSizes())


def test_known_is_handed_back():
    q, k, v = arrays([(1, 8, 64), (1, 16, 64), (1, 16, 64)], "float32")
    known = ((jnp.ones((1, 8, 64)),), jnp.zeros((1, 8)))
    with interpreted():
        (out,), lse = attend(q, k, (v,), scale=1.0, known=known, block_sizes=BlockSizes())
    assert out is known[0][0] or (out == 1).all()
    assert (lse == 0).all()


@pytest.mark.parametrize("keys", [None, 128])
def test_races_and_uninitialised_memory(keys):
    q, k, v = arrays([(2, 150, 64), (2, 256, 64), (2, 256, 64)], "float32")
    scale = 0.1
    with interpreted(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        (out,), lse = attend(
            q, k, (v,), scale=scale, block_sizes=BlockSizes(tpu_rows=128, tpu_keys=keys)
        )
    (want,), want_lse = attention(q, k, (v,), scale=scale)
    assert_close(out, want, "float32", "forward")
    assert_close(lse, want_lse, "float32", "lse")


def test_jit_and_vmap():
    q, k, v = arrays([(3, 2, 16, 64), (3, 2, 40, 64), (3, 2, 40, 64)], "float32")

    def one(q, k, v):
        return attend(q, k, (v,), scale=0.1, block_sizes=BlockSizes())

    with interpreted():
        (out,), _ = jax.jit(jax.vmap(one))(q, k, v)
    for i in range(3):
        (want,), _ = attention(q[i], k[i], (v[i],), scale=0.1)
        assert_close(out[i], want, "float32", "forward")


GRADIENTS = [
    ("float32", {}, None),
    ("bfloat16", {}, None),
    ("float32", {"tpu_rows": 128, "tpu_keys": 128}, None),
    ("float32", {}, "bias"),
    ("float32", {}, "mask"),
]


@pytest.mark.parametrize(("dtype", "sizes", "extra"), GRADIENTS, ids=str)
def test_gradient(dtype, sizes, extra):
    n, s = (150, 260) if sizes else (24, 37)
    q, k, v, dout = arrays([(2, n, 64), (2, s, 64), (2, s, 64), (2, n, 64)], dtype)
    bias, dlse = arrays([(2, s), (2, n)], "float32", seed=1)
    mask = jnp.asarray(np.random.default_rng(1).random((2, s)) < 0.5) if extra == "mask" else None
    arguments = (q, k, v) if extra != "bias" else (q, k, v, bias)

    def of(attend, q, k, v, bias=None):
        (out,), lse = attend(
            q, k, (v,), scale=0.1, bias=bias, mask=mask, block_sizes=BlockSizes(**sizes)
        )
        return out, lse

    with interpreted():
        _, pullback = jax.vjp(functools.partial(of, attend), *arguments)
        gradients = pullback((dout, dlse))
    want = oracle_gradient(functools.partial(of, reference.attend), arguments, (dout, dlse))
    for got, wanted, x in zip(gradients, want, arguments, strict=True):
        assert got.dtype == x.dtype
        assert_close(got, wanted, dtype, "gradient")
