"""The lean promise: no tensor larger than a small multiple of q, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import pytest

import vmonarch_jax as vm

GRID = vm.VideoGrid(21, 30, 52)
X = jax.ShapeDtypeStruct((1, GRID.tokens, 2, 64), jnp.float32)
BYTES = X.size * 4
FUNCTIONS = {
    "dense": vm.dense_attention,
    "vmonarch": functools.partial(vm.vmonarch_attention, grid=GRID),
    "tubes": functools.partial(vm.vmonarch_attention, grid=GRID, block=(21, 1, 1)),
    "tiled": functools.partial(vm.tiled_monarch_attention, grid=GRID),
    "monarch": functools.partial(vm.monarch_attention, block_size=181),
}


def temporary(function, arrays):
    """Bytes that a compiled program needs beside its inputs and outputs, in multiples of q."""
    compiled = jax.jit(function).lower(*[X] * arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes / BYTES


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward(name):
    # Blocks cut across the token order keep their rearranged copy of q for the L step.
    limit = 7 if name in ("tubes", "monarch") else 6
    assert temporary(functools.partial(FUNCTIONS[name], implementation="xla"), 3) <= limit


@pytest.mark.parametrize(
    "name",
    ["vmonarch", "tiled"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("dense", "tubes", "monarch")],
)
def test_all_three_gradients(name):
    function = functools.partial(FUNCTIONS[name], implementation="xla")

    def gradients(query, key, value, out_bar):
        return jax.vjp(function, query, key, value)[1](out_bar)

    assert temporary(gradients, 4) <= 16
