"""The gradients of attention and of R steps on a GPU, on a CPU by Mosaic GPU's interpreter.

It adds up dq without the copy engine's reduction, which is for the compiler (`tests/aot_gpu`) and
for a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from pallas.attention_inputs import arrays, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.attend import gpu as attend
from vmonarch_jax.pallas_kernels.attend import gpu_backward, reference
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.gpu import mode
from vmonarch_jax.pallas_kernels.r_step import gpu as r_step
from vmonarch_jax.pallas_kernels.r_step import reference as r_reference

pytestmark = pytest.mark.usefixtures("gpu_interpreted")
SIZES = BlockSizes()


def check(function, oracle, inputs, cotangents, dtype):
    found = jax.vjp(function, *inputs)[1](cotangents)
    expected = oracle_gradient(oracle, inputs, cotangents)
    for name, x, wanted in zip("qkvw", found, expected, strict=False):
        assert x.dtype == dtype
        # float16 is held to bfloat16's bounds.
        assert_close(x, wanted, "bfloat16", "gradient", name)


# Heads, rows, keys, head dim, value dim: tails of rows and of keys, fewer keys than a warpgroup
# has, several tiles of both.
ROW_SIZES = [
    pytest.param((1, 70, 52, 64, 64), "float16", marks=pytest.mark.slow),
    pytest.param((2, 150, 200, 128, 64), "bfloat16", marks=pytest.mark.slow),
    pytest.param((2, 150, 256, 128, 128), "bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "dtype"), ROW_SIZES)
def test_attend(size, dtype):
    """Without cuDNN, the kernel serves; the result is known, so that nothing runs forward."""
    g, n, s, d, e = size
    shapes = [(g, n, d), (g, s, d), (g, s, e)]
    q, k, v = (x.astype(dtype) for x in arrays(shapes, "float32"))
    part = reference.attend(q, k, (v,), scale=d**-0.5, gains=(2.0,))
    known = jax.tree.map(lambda x: x.astype(dtype), part[0]), part[1]
    cotangents = (arrays([(g, n, e)], dtype, 3)[0],), arrays([(g, n)], "float32", 4)[0]
    settings = {"scale": d**-0.5, "gains": (2.0,)}

    def one(q, k, v):
        return attend.attend(q, k, (v,), **settings, known=known, block_sizes=SIZES)

    def oracle(q, k, v):
        return reference.attend(q, k, (v,), **settings)

    with mode.recording() as launches:
        check(one, oracle, (q, k, v), cotangents, dtype)
    assert [x.name for x in launches] == ["attend_backward"]
    assert launches[0].flops == 2 * g * n * s * (3 * d + 2 * e)


# Frames, rows, keys, head dim, values, whether aL is scaled, whether cL has a gradient.
STEPS = [
    ((1, 70, 150, 128, 1), False, True),
    pytest.param((1, 130, 52, 64, 0), True, False, marks=pytest.mark.slow),
    pytest.param((2, 150, 200, 128, 1), True, True, marks=pytest.mark.slow),
    pytest.param((2, 150, 130, 64, 1), False, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "unscaled", "entropy_gradient"), STEPS)
def test_r_step(size, unscaled, entropy_gradient):
    frames, n, s, d, count = size
    shapes = [(1, frames, n, d), *[(1, frames, s, d)] * (1 + count)]
    qt, k, *values = (x.astype("bfloat16") for x in arrays(shapes, "float32"))
    settings = {"scale": d**-0.5, "entropy_gradient": entropy_gradient}

    def oracle(qt, k, *values):
        step = r_reference.r_step(qt, k, values, **settings)
        return step._replace(al=step.al * d**0.5) if unscaled else step

    known = oracle(qt, k, *values)
    cotangents = jax.tree.map(lambda x: arrays([x.shape], x.dtype, x.ndim)[0], known)

    def one(qt, k, *values):
        return r_step.r_step(
            qt, k, values, **settings, known=known, unscaled=unscaled, block_sizes=SIZES
        )

    with mode.recording() as launches:
        check(one, oracle, (qt, k, *values), cotangents, "bfloat16")
    assert [x.name for x in launches] == ["r_step_backward"]
    assert launches[0].flops == 2 * frames * n * s * d * (5, 7)[count]


@pytest.mark.slow
def test_scores_far_below_zero():
    """Keys beyond the end are zeros, whose scores would be far above those of the others."""
    q, k, v = (
        x.astype("float16") for x in arrays([(1, 64, 64), (1, 70, 64), (1, 70, 64)], "float32")
    )
    q, k = q - 20, jnp.abs(k)
    part = reference.attend(q, k, (v,), scale=0.125)
    assert part[1].max() < -60  # exp(-lse) is beyond float16
    known = (part[0][0].astype("float16"),), part[1]
    cotangents = (arrays([(1, 64, 64)], "float16", 3)[0],), jnp.zeros((1, 64))

    def one(q, k, v):
        return attend.attend(q, k, (v,), scale=0.125, known=known, block_sizes=SIZES)

    def oracle(q, k, v):
        return reference.attend(q, k, (v,), scale=0.125)

    check(one, oracle, (q, k, v), cotangents, "float16")


@pytest.mark.slow
def test_masked_keys():
    """Some keys of one group, and all of another."""
    q, k, v, dout = (
        x[:, None] for x in arrays([(2, 70, 64), *[(2, 128, 64)] * 2, (2, 70, 64)], "bfloat16")
    )
    mask = jnp.arange(128) % 3 > 0
    mask = jnp.stack([mask, jnp.zeros_like(mask)])[:, None]
    dlse = arrays([(2, 1, 70)], "float32", 4)[0]

    def oracle(q, k, v):
        (out,), lse = reference.attend(q[:, 0], k[:, 0], (v[:, 0],), scale=0.125, mask=mask[:, 0])
        return out[:, None], jnp.where(jnp.isneginf(lse), -jnp.inf, lse)[:, None]

    out, lse = oracle(q, k, v)
    assert jnp.isneginf(lse[1]).all()
    dq, dk, (dv,) = gpu_backward.softmax_rows_backward(
        q, k, (v,), (out.astype("bfloat16"),), lse, (dout,), dlse,
        scale=0.125, gains=(1.0,), shared=False, name="masked", mask=mask,
    )  # fmt: skip
    expected = oracle_gradient(oracle, (q, k, v), (dout, dlse))
    for x, wanted in zip((dq, dk, dv), expected, strict=True):
        assert_close(x, wanted, "bfloat16", "gradient")
        assert not x[1].any()


@pytest.mark.slow
def test_under_vmap():
    q, k, out, dout = arrays([(2, 1, 1, 20, 64)] * 4, "bfloat16")
    lse = jnp.full((2, 1, 1, 20), 4.0)
    run = functools.partial(
        gpu_backward.softmax_rows_backward, scale=0.125, gains=(0.125,), shared=True, name="mapped"
    )

    def one(q, k, out, lse, dout):
        return run(q, k, (), (out,), lse, (dout,), jnp.zeros_like(lse))

    found = jax.vmap(one)(q, k, out, lse, dout)
    each = [one(*x) for x in zip(q, k, out, lse, dout, strict=True)]
    for x, wanted in zip(found[:2], zip(*(y[:2] for y in each), strict=True), strict=True):
        assert_close(x, jnp.stack(wanted), "float32", "forward")


def test_traces_for_a_gpu():
    """What is compiled is another launch than what is interpreted; here also under vmap."""
    q = jax.ShapeDtypeStruct((3, 1, 1, 130, 128), "bfloat16")
    line = jax.ShapeDtypeStruct(q.shape[:-1], "float32")

    def one(q, lse):
        return gpu_backward.softmax_rows_backward(
            q, q, (q,), (q, q), lse, (q, q), lse,
            scale=0.1, gains=(0.1, 1.0), shared=True, name="traced",
        )  # fmt: skip

    with mode.interpreted(None), mode.compiling_for_hopper(), mode.recording() as launches:
        dq, dk, (dv,) = jax.eval_shape(jax.vmap(one), q, line)
    assert {(x.shape, x.dtype) for x in (dq, dk, dv)} == {(q.shape, q.dtype)}
    assert [x.blocks for x in launches[-1:]] == [3 * 2]


def test_what_it_leaves_to_others():
    k = jnp.zeros((1, 1, 8, 64), "bfloat16")
    reason = functools.partial(gpu_backward.unserved, k, scale=1.0, shared=False)
    assert reason((k,), gains=(1.0,)) == ""
    assert "up to 128 columns together, got 192" in reason((k, k), gains=(1.0, 1.0))
    assert "without values" in reason((), gains=())
    assert "no gain of zero" in reason((k,), gains=(0.0,))
