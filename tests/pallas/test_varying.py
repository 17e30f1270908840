"""Kernels inside `jax.shard_map` as it comes, which checks along which axes results vary.

Traced for the chips that they are written for; nothing runs.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from vmonarch_jax.pallas_kernels.gpu import mode
from vmonarch_jax.pallas_kernels.tpu import chips

import vmonarch_jax as vm

GRID = vm.VideoGrid(4, 16, 16)
METHODS = {
    "dense": vm.Dense(),
    "vmonarch": vm.VMonarch(),
    "padded": vm.VMonarch(block=(1, 16, 7)),
    "tiled": vm.TiledMonarch(),
    "block-sparse": vm.Salad(sparse="top_k", sparsity=0.5),
    "guided": vm.Guided(vm.VMonarch(block=(4, 1, 1), recompute_frames=0), exact_blocks=2),
}


TARGETS = {
    "xla": contextlib.nullcontext,
    "pallas_tpu": lambda: chips.tracing_for("v6e"),
    "pallas_gpu": mode.compiling_for_hopper,
    "cudnn": mode.compiling_for_hopper,
}


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_shard_map(name, implementation):
    method = METHODS[name]
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    q = jax.ShapeDtypeStruct((2, GRID.tokens, 2, 128), jnp.bfloat16)
    # Masks of padded grids are beyond cuDNN.
    options = {"grid": GRID, "implementation": tuple(dict.fromkeys((implementation, "xla")))}

    def loss(q, k, v):
        out = jax.shard_map(
            lambda *arrays: method(*arrays, **options),
            mesh=mesh, in_specs=P("data"), out_specs=P("data"),
        )(q, k, v)  # fmt: skip
        return out.astype(jnp.float32).sum()

    with TARGETS[implementation]():
        gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), q, q, q)
    for x in gradients:
        assert (x.shape, x.dtype) == (q.shape, q.dtype)
