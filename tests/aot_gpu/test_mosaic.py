"""The Mosaic GPU kernels through the compilers of an H100, with no GPU: `make aot-gpu`.

Real shapes of one head or more; ptxas must find registers for everything and leave the products
asynchronous. What they do is tested by the interpreter, how fast they are is not known here.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from vmonarch_jax.pallas_kernels.attend.gpu_forward import softmax_rows
from vmonarch_jax.pallas_kernels.l_step import gpu_forward
from vmonarch_jax.pallas_kernels.l_step.gpu import backward_of

pytestmark = [
    pytest.mark.skipif("AOT_GPU" not in os.environ, reason="set AOT_GPU=1; see `make aot-gpu`"),
    pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="no CUDA JAX"),
    pytest.mark.timeout(1800),
]


@functools.cache
def compiler():
    from benchmarks.gpu_target import Compiler

    return Compiler("h100")


def check(function, *arguments, products):
    compiled = compiler()(function, *arguments)
    kernels = [x for x in compiler().kernels(compiled) if "mosaic" in x.name]
    assert len(kernels) == 1
    (kernel,) = kernels
    assert (kernel.spills, kernel.stack, kernel.notes) == (0, 0, ()), kernel
    assert kernel.wgmma >= products, kernel
    print(kernel)


# Frames, positions, head dim, dtype.
L_STEPS = [
    (16, 1456, 128, "bfloat16"),
    (21, 1560, 128, "bfloat16"),
    (21, 3600, 128, "float16"),
    (46, 1456, 128, "bfloat16"),
    (81, 1456, 128, "bfloat16"),
    (81, 3600, 128, "bfloat16"),
    (128, 1456, 128, "bfloat16"),
    (21, 1560, 64, "bfloat16"),
    (81, 1456, 64, "float16"),
]


@pytest.mark.parametrize("size", L_STEPS)
@pytest.mark.parametrize("step", ["last", "middle"])
def test_l_step(size, step):
    frames, n, d, dtype = size
    array = jax.ShapeDtypeStruct((12, frames, n, d), dtype)
    line = jax.ShapeDtypeStruct((12, frames, n), jnp.float32)
    if step == "last":
        check(gpu_forward.last, array, array, line, array, products=6)
        return

    def middle(q, al, bias):
        return gpu_forward.middle(q, al, bias, None, floor=0.1)

    check(middle, array, array, line, products=8)


@pytest.mark.parametrize("frames", [21, 128])
def test_l_step_that_leaves_out_pairs(frames):
    array = jax.ShapeDtypeStruct((12, frames, 1560, 128), "bfloat16")
    line = jax.ShapeDtypeStruct((12, frames, 1560), jnp.float32)
    pairs = jax.ShapeDtypeStruct((12, frames, frames), bool)
    check(gpu_forward.last, array, array, line, array, pairs, products=16)


@pytest.mark.parametrize("size", L_STEPS)
@pytest.mark.parametrize("step", ["last", "middle"])
def test_l_step_backward(size, step):
    frames, n, d, dtype = size
    array = jax.ShapeDtypeStruct((12, frames, n, d), dtype)
    line = jax.ShapeDtypeStruct((12, frames, n), jnp.float32)
    backward = backward_of(array, array)
    if step == "last":
        check(backward.last_backward, array, array, line, array, array, line, products=24)
        return

    def middle(q, al, bias, dqt):
        return backward.middle_backward(q, al, bias, None, dqt, floor=0.1)

    check(middle, array, array, line, array, products=32)


# Groups, rows, keys, head dim, values beside K, whether K is a value.
ROWS = [
    (252, 1560, 1560, 128, 0, True),
    (252, 1560, 1560, 128, 1, True),
    (252, 3600, 3600, 128, 1, True),
    (972, 1456, 1456, 128, 1, True),
    (252, 1560, 1560, 64, 1, True),
    (7560, 52, 52, 128, 1, True),
    (12, 1560, 32760, 128, 1, False),
    (12, 32760, 32760, 64, 1, False),
]


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows(size, dtype):
    g, n, s, d, values, shared = size
    gains = (0.1, 1.0)[: values + shared]

    def rows(q, k, *values):
        return softmax_rows(
            q, k, values, scale=0.1, gains=gains, shared=shared, entropy=shared, name="rows"
        )

    def array(rows):
        return jax.ShapeDtypeStruct((g, rows, d), dtype)

    check(rows, array(n), *[array(s)] * (1 + values), products=8)


@pytest.mark.parametrize("values", [0, 1])
def test_rows_with_masked_keys(values):
    def rows(q, k, bias, *values):
        return softmax_rows(
            q, k, values, bias,
            scale=0.1, gains=(0.1, 1.0), shared=True, entropy=True, name="rows",
        )  # fmt: skip

    array = jax.ShapeDtypeStruct((252, 1560, 128), "bfloat16")
    bias = jax.ShapeDtypeStruct((252, 1560), jnp.float32)
    check(rows, array, array, bias, *[array] * values, products=8)
