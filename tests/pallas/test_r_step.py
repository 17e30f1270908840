"""The R step's TPU kernel, interpreted, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from pallas.attention_inputs import arrays, attention, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.r_step import RStep, reference
from vmonarch_jax.pallas_kernels.r_step.tpu import r_step
from vmonarch_jax.pallas_kernels.tpu.call import interpreted

SCALE = 0.125


def wanted(qt, k, values, keys=None):
    """By definition: `cL` is the sum of `R log R`."""
    g, blocks = qt.shape[:2]
    flat = [np.asarray(x, np.float64).reshape(g * blocks, *x.shape[2:]) for x in (qt, k, *values)]
    mask = None if keys is None else np.asarray(keys).reshape(g * blocks, -1)
    eye = np.broadcast_to(np.eye(k.shape[2]), (g * blocks, k.shape[2], k.shape[2]))
    outs, lse = attention(
        flat[0], flat[1], [flat[1], *flat[2:], eye], scale=SCALE, mask=mask,
        gains=(SCALE,) + (1.0,) * (len(values) + 1),
    )  # fmt: skip
    r = outs.pop()
    cl = np.sum(r * np.log(np.where(r > 0, r, 1)), axis=-1)
    shaped = [x.reshape(g, blocks, *x.shape[1:]) for x in (*outs, cl, lse)]
    return RStep(shaped[0], tuple(shaped[1:-2]), shaped[-2], shaped[-1])


def compare(step, want, dtype, kind="forward"):
    assert_close(step.al, want.al, dtype, kind)
    for y, want_y in zip(step.ys, want.ys, strict=True):
        assert_close(y, want_y, dtype, kind)
    assert_close(step.cl, want.cl, dtype, "lse")
    assert_close(step.lse, want.lse, dtype, "lse")


# batch, key blocks, positions, keys of a block, head dim, value dim (0: none), block sizes
SIZES = [
    (1, 3, 56, 56, 128, 128, {}),
    (2, 2, 24, 50, 64, 0, {}),
    (2, 3, 13, 29, 64, 64, {}),
    (1, 1, 1, 1, 128, 128, {}),
    (2, 21, 6, 6, 64, 64, {}),
    (1, 2, 300, 100, 64, 64, {"tpu_rows": 128}),
    (1, 2, 60, 330, 64, 0, {"tpu_keys": 128}),
    (1, 2, 150, 260, 64, 64, {"tpu_rows": 128, "tpu_keys": 128}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(size, dtype):
    g, blocks, n, b, d, e, sizes = size
    shapes = [(g, blocks, n, d), (g, blocks, b, d)] + [(g, blocks, b, e)] * (e > 0)
    qt, k, *values = arrays(shapes, dtype)
    with interpreted():
        step = r_step(qt, k, tuple(values), scale=SCALE, block_sizes=BlockSizes(**sizes))
    assert [x.dtype for x in jax.tree.leaves(step)] == (
        [dtype] * (1 + len(values)) + ["float32", "float32"]
    )
    compare(step, wanted(qt, k, values), dtype)


@pytest.mark.parametrize("sizes", [{}, {"tpu_keys": 128}], ids=str)
def test_masked_keys(sizes):
    qt, k, v = arrays([(2, 3, 30, 64), (2, 3, 290, 64), (2, 3, 290, 64)], "float32")
    keys = np.random.default_rng(1).random((2, 3, 290)) < 0.5
    keys[0, 1] = False
    with interpreted():
        step = r_step(
            qt, k, (v,), scale=SCALE, keys=jnp.asarray(keys), block_sizes=BlockSizes(**sizes)
        )
    compare(step, wanted(qt, k, (v,), keys), "float32")
    assert (step.al[0, 1] == 0).all()
    assert (step.ys[0][0, 1] == 0).all()
    assert (step.cl[0, 1] == 0).all()


@pytest.mark.parametrize("sizes", [{}, {"tpu_keys": 128}], ids=str)
def test_extreme_scores(sizes):
    qt, k, v = arrays([(1, 2, 140, 64), (1, 2, 260, 64), (1, 2, 260, 64)], "float32")
    qt = qt.at[0, 1].multiply(40.0)  # scores of +-150 in one block
    with interpreted():
        step = r_step(qt, k, (v,), scale=SCALE, block_sizes=BlockSizes(**sizes))
    compare(step, wanted(qt, k, (v,)), "float32", "gradient")


def test_cl_is_the_tangent_plane_of_the_rounded_al():
    qt, k = arrays([(1, 2, 56, 64), (1, 2, 56, 64)], "bfloat16")
    with interpreted():
        step = r_step(qt, k, (), scale=SCALE, block_sizes=BlockSizes())
    plane = np.sum(np.float64(qt) * np.float64(step.al), axis=-1) - np.float64(step.cl)
    np.testing.assert_allclose(plane, step.lse, rtol=0, atol=3e-6)


def test_races_and_uninitialised_memory():
    qt, k, v = arrays([(1, 2, 150, 64), (1, 2, 40, 64), (1, 2, 40, 64)], "float32")
    with interpreted(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        step = r_step(qt, k, (v,), scale=SCALE, block_sizes=BlockSizes(tpu_rows=128))
    compare(step, wanted(qt, k, (v,)), "float32")


def test_known_is_handed_back():
    qt, k = arrays([(1, 2, 8, 64), (1, 2, 56, 64)], "float32")
    known = RStep(qt + 1, (), qt[..., 0], qt[..., 1])
    with interpreted():
        step = r_step(qt, k, (), scale=SCALE, known=known, block_sizes=BlockSizes())
    jax.tree.map(np.testing.assert_array_equal, step, known)


GRADIENTS = [
    # dtype, positions, keys, with values, with the gradient of cL, masked, known
    ("float32", 60, 60, True, False, False, False),
    ("bfloat16", 60, 52, True, True, False, False),
    ("float32", 60, 52, False, True, True, False),
    ("float32", 60, 52, True, True, False, True),
    ("float32", 9, 11, True, True, True, False),
]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradient(case):
    dtype, n, b, with_values, entropy, masked, is_known = case
    shapes = [(1, 3, n, 64), (1, 3, b, 64)] + [(1, 3, b, 64)] * with_values
    inputs = tuple(arrays(shapes, dtype))
    keys = None
    if masked:
        keys = np.random.default_rng(1).random((1, 3, b)) < 0.5
        keys[0, 1] = False
        keys = jnp.asarray(keys)

    def of(r_step, qt, k, *values, **more):
        step = r_step(
            qt, k, values, scale=SCALE, keys=keys, entropy_gradient=entropy,
            block_sizes=BlockSizes(), **more,
        )  # fmt: skip
        # A key block without keys is left out of everything: its -inf draws no gradient.
        return step._replace(lse=jnp.where(jnp.isneginf(step.lse), 0, step.lse))

    with interpreted():
        known = {"known": r_step(*inputs[:2], inputs[2:], scale=SCALE, keys=keys,
                                 block_sizes=BlockSizes())} if is_known else {}  # fmt: skip
        step, pullback = jax.vjp(lambda *x: of(r_step, *x, **known), *inputs)
        leaves, tree = jax.tree.flatten(step)
        cotangents = tree.unflatten(
            [arrays([x.shape], x.dtype, seed=i)[0] for i, x in enumerate(leaves)]
        )
        gradients = pullback(cotangents)
    want = oracle_gradient(lambda *x: of(reference.r_step, *x), inputs, cotangents)
    for got, wanted_one, x in zip(gradients, want, inputs, strict=True):
        assert got.dtype == x.dtype
        assert_close(got, wanted_one, dtype, "gradient")


def test_jit_and_vmap():
    qt, k = arrays([(2, 1, 3, 56, 64), (2, 1, 3, 56, 64)], "float32")
    with interpreted():
        steps = jax.jit(jax.vmap(
            lambda qt, k: r_step(qt, k, (), scale=SCALE, block_sizes=BlockSizes())
        ))(qt, k)  # fmt: skip
    for i in range(2):
        compare(jax.tree.map(lambda x, i=i: x[i], steps), wanted(qt[i], k[i], ()), "float32")
