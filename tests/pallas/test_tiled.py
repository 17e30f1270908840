"""The fused tiled kernels, interpreted, against float32 einsums and float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.tiled import reference
from vmonarch_jax.pallas_kernels.tiled.tpu import tiled
from vmonarch_jax.pallas_kernels.tpu.call import interpreted, without_slow_path


def inputs(shape, dtype, masked=False, gain=1.0, offset=0.0):
    g, a, f, m, b, d, e = shape
    rng = np.random.default_rng(sum(shape))
    q = gain * rng.standard_normal((g, a, m, b, d)) + offset
    k = rng.standard_normal((g, f, m, b, d)) - offset
    v = rng.standard_normal((g, f, m, b, e))
    keys = None
    if masked:
        keys = rng.random((g, f, m, b)) < 0.6
        keys[:, 0, 0] = False
        keys = jnp.asarray(keys)
    return [jnp.asarray(x, dtype) for x in (q, k, v)], keys


def function(dtype, keys, sizes=None, entropy_gradient=False, how=True):
    def run(q, k, v):
        with interpreted(how):
            return tiled(
                q, k, v,
                scale=q.shape[-1] ** -0.5, keys=keys, entropy_gradient=entropy_gradient,
                block_sizes=BlockSizes(**(sizes or {})),
            )  # fmt: skip

    return jax.jit(run)


def wanted(arrays, keys, **settings):
    wide = [x.astype(jnp.float32) for x in arrays]
    run = functools.partial(
        reference.tiled, scale=arrays[0].shape[-1] ** -0.5, keys=keys, **settings
    )
    return jax.jit(run), wide


def check(arrays, keys, dtype, **settings):
    out, lse = function(dtype, keys, **settings)(*arrays)
    run, wide = wanted(arrays, keys)
    want_out, want_lse = run(*wide)
    assert out.dtype == arrays[2].dtype
    assert lse.dtype == jnp.float32
    assert_close(out.astype(jnp.float32), want_out, dtype, "forward")
    assert_close(lse, want_lse, dtype, "lse")


# batch, query tiles, key tiles, blocks, positions, head dim, value dim
FORWARD = [
    ((2, 2, 3, 3, 5, 64, 64), "float32", False, {}),
    ((1, 2, 3, 4, 6, 128, 128), "bfloat16", False, {"tpu_keys": 24}),
    ((1, 3, 2, 3, 4, 128, 64), "bfloat16", True, {"tpu_tiles": 2}),
    ((1, 1, 2, 1, 130, 64, 128), "float32", True, {}),
    ((1, 1, 1, 1, 1, 128, 128), "bfloat16", False, {}),
]


@pytest.mark.parametrize(("shape", "dtype", "masked", "sizes"), FORWARD, ids=str)
def test_forward(shape, dtype, masked, sizes):
    arrays, keys = inputs(shape, dtype, masked)
    with without_slow_path():
        check(arrays, keys, dtype, sizes=sizes)


@pytest.mark.parametrize(
    ("gain", "offset", "masked"), [(40.0, 0.0, True), (1.0, 3.5, False)], ids=["large", "negative"]
)
def test_extreme_scores_take_the_safe_kernel(gain, offset, masked):
    """Logits of +-300, and rows whose every score is about -100."""
    arrays, keys = inputs((1, 1, 2, 3, 4, 64, 64), "float32", masked, gain, offset)
    with without_slow_path():
        assert np.isnan(function("float32", keys)(*arrays)[1]).any()
    check(arrays, keys, "float32")


def test_nan_stays_nan():
    arrays, keys = inputs((1, 1, 2, 2, 3, 64, 64), "float32")
    arrays[0] = arrays[0].at[0, 0, 1, 2, 0].set(jnp.nan)
    out, lse = function("float32", keys)(*arrays)
    assert np.isnan(out[0, 0, 1, 2]).all()
    assert np.isnan(lse[0, 0, 1, 2])


def test_no_keys_at_all():
    arrays, _ = inputs((1, 1, 2, 2, 3, 64, 64), "float32")
    out, lse = function("float32", jnp.zeros((1, 2, 2, 3), bool))(*arrays)
    assert (np.asarray(out) == 0).all()
    assert np.isneginf(lse).all()


def test_equals_the_float64_oracle():
    """Tiles are the frames of a grid, blocks their rows."""
    grid, heads = (3, 2, 4), 1
    arrays, _ = inputs((heads, *grid[:1], *grid, 64, 64), "float32")
    tokens = [np.asarray(x).reshape(1, -1, heads, 64) for x in arrays]
    part = oracle.monarch_grid(
        *tokens, grid=grid, block=(1, 1, 4), tile=(1, 2, 4), steps=1, recompute_frames=0
    )
    with without_slow_path():
        out, lse = function("float32", None)(*arrays)
    assert_close(out.reshape(part.out.shape), part.out, "float32", "forward")
    assert_close(lse.reshape(part.lse.shape), part.lse, "float32", "lse")


GRADIENTS = [
    ((1, 2, 3, 3, 3, 64, 64), "float32", False, False, {"tpu_keys": 9}),
    ((2, 1, 2, 4, 3, 128, 128), "bfloat16", False, True, {}),
    ((1, 2, 2, 3, 4, 128, 64), "bfloat16", True, True, {"tpu_tiles": 2}),
    ((1, 1, 2, 1, 66, 64, 64), "float32", True, False, {}),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "masked", "entropy_gradient", "sizes"), GRADIENTS, ids=str
)
def test_gradients(shape, dtype, masked, entropy_gradient, sizes):
    arrays, keys = inputs(shape, dtype, masked)
    rng = np.random.default_rng(1)
    run, wide = wanted(arrays, keys, entropy_gradient=entropy_gradient)
    out, pull = jax.vjp(run, *wide)
    bars = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in out]
    bars[0] = bars[0].astype(dtype)
    want = pull((bars[0].astype(jnp.float32), bars[1]))
    with without_slow_path(), interpreted():
        kernel = function(dtype, keys, sizes, entropy_gradient)
        got = jax.jit(lambda *x: jax.vjp(kernel, *x)[1](tuple(bars)))(*arrays)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == arrays[0].dtype
        assert_close(one.astype(jnp.float32), other, dtype, "gradient")


def test_gradients_of_extreme_scores():
    arrays, keys = inputs((1, 1, 2, 2, 4, 64, 64), "float32", gain=40.0)
    run, wide = wanted(arrays, keys)
    kernel = function("float32", keys)

    def loss(run, arrays):
        out, lse = run(*arrays)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

    with interpreted():
        got = jax.grad(functools.partial(loss, kernel))(arrays)
    want = jax.grad(functools.partial(loss, run))(wide)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, "float32", "gradient")


def test_vmap_folds_into_the_groups():
    arrays, _ = inputs((4, 1, 2, 2, 3, 64, 64), "float32")
    kernel = function("float32", None)
    out, lse = kernel(*arrays)
    split = [x.reshape(2, 2, *x.shape[1:]) for x in arrays]
    mapped, mapped_lse = jax.jit(jax.vmap(kernel))(*split)
    assert_close(mapped.reshape(out.shape), out, "float32", "forward")
    assert_close(mapped_lse.reshape(lse.shape), lse, "float32", "lse")


def test_refuses_what_it_cannot_serve():
    arrays, _ = inputs((1, 1, 1, 2, 3, 64, 64), "float16")
    with pytest.raises(NotImplementedError, match="bfloat16 or float32"):
        function("float16", None)(*arrays)
    big = jax.ShapeDtypeStruct((1, 1, 2, 1560, 64), jnp.bfloat16)  # a frame a block
    with pytest.raises(NotImplementedError, match="1560 tokens"):
        jax.eval_shape(function("bfloat16", None), big, big, big)


@pytest.mark.slow
def test_no_races_and_no_uninitialised_memory():
    how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arrays, keys = inputs((1, 2, 2, 3, 3, 64, 64), "bfloat16", True)
    with without_slow_path(), interpreted(how):
        check(arrays, keys, "bfloat16", sizes={"tpu_keys": 9}, how=how)
        kernel = function("bfloat16", keys, {"tpu_keys": 9}, True, how=how)
        grads = jax.grad(lambda *x: kernel(*x)[0].astype(jnp.float32).sum(), (0, 1, 2))(*arrays)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in grads)
