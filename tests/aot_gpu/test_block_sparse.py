"""The block-sparse GPU kernels through the compilers of an H100, with no GPU: `make aot-gpu`.

Wan's sizes at 480p and 720p, 12 heads, 90% sparsity: ptxas must find registers for everything and
leave the products asynchronous, and what XLA makes of the lists must stay small.
"""

import functools
import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import pytest
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.block_sparse import gpu

pytestmark = [
    pytest.mark.skipif("AOT_GPU" not in os.environ, reason="set AOT_GPU=1; see `make aot-gpu`"),
    pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="no CUDA JAX"),
]

HEADS, SHARE = 12, 0.1


@functools.cache
def compiler():
    from benchmarks.gpu_target import Compiler

    return Compiler("h100")


# Products in the kernels' text, at least: each of their inner products is as deep as a head.
PRODUCTS = {"block_sparse": 16, "block_sparse_dq": 24, "block_sparse_dkv": 16, "block_mass": 8}

# Tokens, block, head dim, value dim, dtype.
SIZES = [
    (32760, 64, 128, 128, "bfloat16"),
    (32760, 128, 128, 128, "bfloat16"),
    (75600, 64, 128, 128, "float16"),
    (75600, 128, 128, 128, "bfloat16"),
    (32760, 64, 64, 64, "bfloat16"),
    (32760, 128, 64, 128, "float16"),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_gradient_and_masses(size):
    tokens, block, d, e, dtype = size
    blocks = -(-tokens // block)
    keys, values = (jax.ShapeDtypeStruct((HEADS, blocks * block, w), dtype) for w in (d, e))
    line = jax.ShapeDtypeStruct(keys.shape[:2], jnp.float32)
    indices = jax.ShapeDtypeStruct((HEADS, blocks, math.ceil(SHARE * blocks)), jnp.int32)
    counts = jax.ShapeDtypeStruct((HEADS, blocks), jnp.int32)
    how = {"block": block, "length": tokens, "scale": 0.1, "block_sizes": BlockSizes()}

    def everything(q, k, v, indices, counts, dout, dlse):
        def part(q, k, v):
            return gpu.block_sparse(q, k, v, indices, counts, **how)

        (out, lse), pullback = jax.vjp(part, q, k, v)
        return out, gpu.block_mass(q, k, lse, **how), pullback((dout, dlse))

    compiled = compiler()(everything, keys, keys, values, indices, counts, values, line)
    kernels = {
        kernel.name.removesuffix("_mosaic_gpu_kernel"): kernel
        for kernel in compiler().kernels(compiled)
        if "mosaic" in kernel.name
    }
    assert set(kernels) == set(PRODUCTS)
    for name, kernel in kernels.items():
        assert (kernel.spills, kernel.stack, kernel.notes) == (0, 0, ()), kernel
        assert kernel.wgmma >= PRODUCTS[name], kernel
        print(kernel)
    # Maps and lists of blocks, nothing that has a number for each pair of tokens.
    pairs = HEADS * blocks * blocks
    temporaries = compiled.memory.temp_size_in_bytes
    print(f"temporaries: {temporaries / pairs:.1f} bytes a pair of blocks")
    assert temporaries < 16 * pairs + 4 * HEADS * tokens * (d + e)
