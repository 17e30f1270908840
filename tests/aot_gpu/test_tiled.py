"""The kernels of tiled Monarch through the compilers of an H100, with no GPU: `make aot-gpu`."""

import functools
import importlib.util
import os

import jax
import pytest
from vmonarch_jax.pallas_kernels.gpu import mode
from vmonarch_jax.pallas_kernels.tiled import gpu_l_step, gpu_l_step_backward, gpu_r_step

import vmonarch_jax as vm

pytestmark = [
    pytest.mark.skipif("AOT_GPU" not in os.environ, reason="set AOT_GPU=1; see `make aot-gpu`"),
    pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="no CUDA JAX"),
]

HEADS = 12


@functools.cache
def compiler():
    from benchmarks.gpu_target import Compiler

    return Compiler("h100")


def compiled(grid, dim, dtype, backward=False):
    """Tiled Monarch with its defaults: a frame a tile, a row a block."""
    method = functools.partial(vm.tiled_monarch_attention, grid=grid, implementation="pallas_gpu")

    def gradients(q, k, v, gradient):
        return jax.vjp(method, q, k, v)[1](gradient)

    frames, height, width = grid
    x = jax.ShapeDtypeStruct((1, frames * height * width, HEADS, dim), dtype)
    return compiler()(gradients if backward else method, *(x,) * (3 + backward)), x


# 480p, 720p, 1080p (blocks of 120) and a grid with more rows than a product has.
@pytest.mark.parametrize(
    ("grid", "dim", "dtype"),
    [
        ((21, 30, 52), 128, "bfloat16"),
        ((21, 45, 80), 128, "bfloat16"),
        ((21, 45, 80), 128, "float16"),
        ((16, 28, 52), 64, "float16"),
        ((21, 45, 80), 64, "bfloat16"),
        ((3, 68, 120), 128, "bfloat16"),
    ],
    ids=str,
)
def test_forward(grid, dim, dtype):
    with mode.recording() as launches:
        program, x = compiled(grid, dim, dtype)
    assert [launch.name for launch in launches] == [gpu_r_step.NAME, gpu_l_step.NAME]
    kernels = [kernel for kernel in compiler().kernels(program) if "mosaic" in kernel.name]
    assert len(kernels) == 2
    for kernel in kernels:
        assert (kernel.spills, kernel.stack, kernel.notes) == (0, 0, ()), kernel
        assert kernel.wgmma >= 8, kernel
        print(kernel)
    # Two kernels in a loop over chunks of 512 MiB at most; q and the output in another order.
    assert len(program.calls("mosaic")) == 2
    assert program.memory.temp_size_in_bytes <= 2.5 * 2 * x.size + 2**29


@pytest.mark.parametrize("dim", [64, 128])
def test_backward(dim):
    with mode.recording() as launches:
        program, x = compiled((21, 30, 52), dim, "bfloat16", backward=True)
    assert gpu_l_step_backward.NAME in [launch.name for launch in launches]
    for kernel in compiler().kernels(program):
        if kernel.name.startswith("tiled"):
            assert (kernel.spills, kernel.stack, kernel.notes) == (0, 0, ()), kernel
            print(kernel)
    # Some query tiles' aL and Y, what they are made from, and their gradients.
    assert program.memory.temp_size_in_bytes <= 6 * 2 * x.size + 2**29
