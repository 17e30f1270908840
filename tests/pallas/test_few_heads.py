"""Heads a few at a time, with the results of the forward pass kept for the backward one."""

import jax
import jax.numpy as jnp
import pytest
from cases import cotangents_of, expected, inputs_of, library, make
from compiling import jit
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.tpu.mode import interpreted

import vmonarch_jax as vm

CASES = [
    make("vmonarch", 3, 2, 4, batch=2, heads=2),
    make("tiled", 3, 2, 4, batch=1, heads=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_head_at_a_time(case):
    few = vm.BlockSizes(copy_bytes=1)
    function = library(case, implementation="pallas_tpu", block_sizes=few)

    @jit
    def everything(arrays, cotangents):
        results, pull = jax.vjp(lambda *a: tuple(function(*a)), *arrays)
        return *results, pull(cotangents)

    arrays, cotangents = inputs_of(case), cotangents_of(case)
    with interpreted():
        loops = str(jax.make_jaxpr(function)(*arrays))
        out, lse, gradients = everything(arrays, cotangents)
    assert "scan" in loops
    want_out, want_lse, want_gradients = expected(case)
    assert_close(out, want_out, "float32", "forward")
    assert_close(lse, want_lse, "float32", "lse")
    for got, want in zip(gradients, want_gradients, strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, want, "float32", "gradient")
