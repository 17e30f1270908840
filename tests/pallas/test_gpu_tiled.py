"""The GPU kernels of tiled Monarch on a CPU, by Mosaic GPU's interpreter."""

import functools

import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from pallas.attention_inputs import arrays, oracle_gradient
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.gpu import mode
from vmonarch_jax.pallas_kernels.l_step import reference as l_reference
from vmonarch_jax.pallas_kernels.tiled import gpu, gpu_forward, reference
from vmonarch_jax.pallas_kernels.tiled.gpu import tiled
from vmonarch_jax.pallas_kernels.tiled.gpu_l_step_backward import l_step_backward

import vmonarch_jax as vm

pytestmark = pytest.mark.usefixtures("gpu_interpreted")


def inputs(shape, dtype):
    g, a, f, m, b, d, e = shape
    return arrays([(g, a, m, b, d), (g, f, m, b, d), (g, f, m, b, e)], dtype)


def check(shape, dtype, size=None, gain=1.0):
    q, k, v = inputs(shape, dtype)
    q, scale = (gain * q).astype(dtype), q.shape[-1] ** -0.5
    out, lse = tiled(q, k, v, scale=scale, block_sizes=BlockSizes(copy_bytes=size))
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, expected_lse = reference.tiled(*wide, scale=scale)
    # float16 is held to bfloat16's bounds.
    assert_close(out, expected, "bfloat16", "forward", "out")
    assert_close(lse, expected_lse, "bfloat16", "lse", "lse")


# Groups, query tiles, key tiles, blocks, positions, head dim, value dim; bytes of a copy.
FORWARD = [
    ((1, 2, 3, 3, 5, 64, 64), "float16", None),
    pytest.param((2, 1, 2, 2, 7, 128, 64), "bfloat16", 1, marks=pytest.mark.slow),  # in two chunks
    pytest.param((1, 2, 2, 2, 35, 64, 64), "bfloat16", 1, marks=pytest.mark.slow),
    pytest.param((1, 1, 5, 70, 2, 64, 128), "bfloat16", None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "dtype", "size"), FORWARD, ids=str)
def test_forward(shape, dtype, size):
    check(shape, dtype, size)


@pytest.mark.slow
def test_large_scores():
    check((1, 1, 2, 2, 3, 64, 64), "bfloat16", gain=30.0)


@pytest.mark.parametrize(("groups", "n", "most", "expected"), [
    (12, 1680, 2**28, (1, 448)),  # 21x45x80
    (12, 1092, 2**28, (1, 384)),
    (12, 40, 2**40, (12, 64)),
    (12, 40, 2**27, (4, 64)),
    (3, 200, 1, (1, 64)),
])  # fmt: skip
def test_chunks(groups, n, most, expected):
    assert gpu_forward.chunk(groups, n, 483_840, most) == expected


# Blocks, key blocks, positions, head dim, value dim: one step of keys and a tail; slots used again.
L_STEPS = [(5, 70, 1, 64, 64), pytest.param((3, 200, 2, 64, 128), marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", L_STEPS)
def test_gradients_of_the_l_step(size):
    m, blocks, n, d, e = size
    shapes = [(1, m, n, d), (1, blocks, n, d), (1, blocks, n, e), (1, m, n, e)]
    q, al, y, dout = arrays(shapes, "bfloat16")
    al = (2 * d**-0.5 * al).astype(al.dtype)
    cl, dlse = arrays([(1, blocks, n), (1, m, n)], "float32", 1)
    cl = -3 * jnp.abs(cl)
    out, lse = l_reference.last(*(x.astype(jnp.float32) for x in (q, al, cl, y)))
    delta = (dout.astype(jnp.float32) * out).sum(-1) - dlse
    found = l_step_backward(q, al, cl, y, lse, dout, delta)
    wanted = oracle_gradient(l_reference.last, (q, al, cl, y), (dout, dlse))
    for name, x, expected in zip(("dq", "daL", "dcL", "dY"), found, wanted, strict=True):
        assert_close(x, expected, "bfloat16", "gradient", name)


# With how many bytes at once: the second takes a group and a query tile at a time.
GRADIENTS = [
    ((1, 2, 2, 2, 2, 64, 64), False, "xla", None),
    ((2, 2, 2, 1, 2, 64, 64), True, "kernels", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "entropy_gradient", "by", "size"), GRADIENTS, ids=str)
def test_gradients_of_a_known_result(monkeypatch, shape, entropy_gradient, by, size):
    """Forward no kernel runs: the result is given. The gradient must be the attention's."""
    if by == "xla":
        monkeypatch.setattr(gpu, "LONGEST", 0)
    q, k, v = inputs(shape, "bfloat16")
    settings = {"scale": 0.125, "entropy_gradient": entropy_gradient}
    known = reference.tiled(q, k, v, **settings)
    cotangents = arrays([q.shape], "bfloat16", 3)[0], arrays([q.shape[:-1]], "float32", 4)[0]
    sizes = BlockSizes(copy_bytes=size)
    one = functools.partial(tiled, **settings, known=known, block_sizes=sizes)
    with cudnn_stand_in.standing_in():
        found = jax.vjp(one, q, k, v)[1](cotangents)
    wanted = oracle_gradient(functools.partial(reference.tiled, **settings), (q, k, v), cotangents)
    for x, expected in zip(found, wanted, strict=True):
        assert_close(x, expected, "bfloat16", "gradient", by)


@pytest.mark.slow
def test_the_whole_method():
    grid = (3, 2, 2)
    query, key, value = arrays([(2, 12, 1, 64)] * 3, "bfloat16")
    out, lse = vm.tiled_monarch_attention(
        query, key, value, grid=grid, implementation="pallas_gpu", return_lse=True
    )
    wide = (np.asarray(x, np.float64) for x in (query, key, value))
    part = oracle.monarch_grid(
        *wide, grid=grid, block=(1, 1, 2), tile=(1, 2, 2), steps=1, recompute_frames=0
    )
    assert_close(out, part.out, "bfloat16", "forward", "out")
    assert_close(lse, part.lse, "bfloat16", "lse", "lse")


@pytest.mark.slow
def test_vmap():
    q, k, v = inputs((2, 1, 2, 2, 3, 64, 64), "bfloat16")
    one = functools.partial(tiled, scale=0.125, block_sizes=BlockSizes())
    out, lse = jax.vmap(one)(*(x[:, None] for x in (q, k, v)))
    expected, expected_lse = reference.tiled(
        *(x.astype(jnp.float32) for x in (q, k, v)), scale=0.125
    )
    assert_close(out[:, 0], expected, "bfloat16", "forward", "out")
    assert_close(lse[:, 0], expected_lse, "bfloat16", "lse", "lse")


def test_refusals():
    q = jnp.zeros((1, 1, 2, 8, 64), jnp.bfloat16)
    call = functools.partial(tiled, scale=1.0, block_sizes=BlockSizes())
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        call(q.astype(jnp.float32), q, q)
    with pytest.raises(NotImplementedError, match="no masked keys"):
        call(q, q, q, keys=jnp.ones(q.shape[:-1], bool))
    long = jnp.zeros((1, 1, 2, 129, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="up to 128 tokens, got 129"):
        call(long, long, long)
    with mode.interpreted(None), pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        call(q, q, q)
