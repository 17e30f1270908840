"""One suite over every implementation: the same calls, the same oracle, the same tolerances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    IMPLEMENTATIONS,
    expected,
    inputs_of,
    library,
    make,
    mask_of,
    oracle_of,
    run,
)
from compiling import jit
from tolerances import assert_close

import vmonarch_jax as vm

CASES = [
    make("dense", 17, 17, value_dim=6),
    make("dense", 7, 23, masked=True),
    make("dense", 23, 5, scale=0.2, batch=1),
    make("dense", 1, 1, batch=1, heads=1),
    make("monarch", 24, block_size=6),
    make("monarch", 23, block_size=5, steps=3, pad="pre", value_dim=6),
    make("monarch", 23, block_size=5, steps=2, pad="post", masked=True),
    make("monarch", 19, block_size=4, steps=2, pad="pre", masked=True, c_r_floor=0.3),
    make("monarch", 11, block_size=16, steps=1, batch=1, heads=1),
    make("vmonarch", 3, 2, 4, steps=1, recompute_frames=0),
    make("vmonarch", 3, 2, 4, value_dim=6),
    make("vmonarch", 5, 1, 3, steps=3, entropy_gradient=True, scale=0.5),
    make("vmonarch", 7, 3, 1, recompute_frames=(0, 5), entropy_gradient=True),
    make("vmonarch", 1, 3, 5),  # one frame
    make("vmonarch", 7, 1, 1, batch=1, heads=1),  # one pixel a frame
    make("vmonarch", 1, 1, 1, recompute_frames=0),  # one token
    make("vmonarch", 4, 2, 2, block=(2, 2, 2), recompute_frames=3),
    make("vmonarch", 5, 2, 2, block=(2, 2, 2), steps=3),  # the last block is half empty
    make("vmonarch", 3, 3, 4, block=(1, 1, 4), entropy_gradient=True),
    make("vmonarch", 5, 2, 3, block=(5, 1, 1), recompute_frames=0),
    make("vmonarch", 3, 3, 4, block=(2, 2, 3), steps=2, c_r_floor=0.0),
    make("vmonarch", 4, 3, 2, tile=(2, 3, 2), steps=2, c_r_floor=0.5),
    make("vmonarch", 4, 2, 3, masked=True, recompute_frames=(2,)),
    make("tiled", 3, 4, 4, entropy_gradient=True),
    make("tiled", 2, 4, 3, tile=(1, 2, 3), value_dim=6, recompute_frames=1),
    make("tiled", 3, 3, 4, tile=(2, 2, 2), block=(1, 1, 2), steps=2, entropy_gradient=True),
    make("tiled", 2, 3, 5, tile=(1, 2, 4), block=(1, 1, 2), steps=1, entropy_gradient=False),
    make("tiled", 2, 3, 2, tile=(1, 1, 1), block=(1, 1, 1), batch=1),  # dense attention
]
BFLOAT16_CASES = [
    make("dense", 17, 11, value_dim=6),
    make("monarch", 23, block_size=5, masked=True),
    make("vmonarch", 5, 2, 3, steps=3, value_dim=6),
    make("vmonarch", 3, 3, 4, block=(2, 2, 3), entropy_gradient=True),
    make("tiled", 3, 4, 4, tile=(1, 2, 4)),
]
FEW = [
    make("dense", 7, 23, masked=True),
    make("monarch", 23, block_size=5, masked=True),
    make("vmonarch", 5, 2, 2, block=(2, 2, 2), steps=3),
    make("tiled", 3, 3, 4, tile=(2, 2, 2), block=(1, 1, 2), steps=2),
]
pytestmark = pytest.mark.usefixtures("tpu_interpreted")
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def check(case, implementation, dtype):
    out, lse, gradients = run(case, implementation, dtype)
    want_out, want_lse, want_gradients = expected(case, dtype)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    assert_close(out, want_out, dtype, "forward")
    assert_close(lse, want_lse, dtype, "lse")
    for name, got, want in zip(("query", "key", "value"), gradients, want_gradients, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, dtype, "gradient", name)


@over_implementations
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case, implementation):
    check(case, implementation, "float32")


@over_implementations
@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=str)
def test_bfloat16(case, implementation):
    check(case, implementation, "bfloat16")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", FEW[1:3], ids=str)
def test_eager_is_jit(case, implementation):
    function = library(case, **IMPLEMENTATIONS[implementation])
    eager, compiled = function(*inputs_of(case)), jit(function)(*inputs_of(case))
    for got, want, kind in zip(eager, compiled, ("forward", "lse"), strict=True):
        assert_close(got, want, "float32", kind)


@over_implementations
@pytest.mark.parametrize("case", FEW, ids=str)
def test_vmap(case, implementation):
    function = library(case, **IMPLEMENTATIONS[implementation])
    # Fresh numbers in each of the mapped calls; the key mask is shared.
    many = [jnp.stack([a, a[::-1] * 0.7, a + 0.1]) for a in inputs_of(case)]
    out, lse = jit(jax.vmap(function))(*many)
    for index in range(3):
        want = oracle_of(case, mask_of(case))(*(a[index] for a in many))
        assert_close(out[index], want.out, "float32", "forward")
        assert_close(lse[index], want.lse, "float32", "lse")


@over_implementations
def test_out_alone(implementation):
    case = FEW[2]
    how = IMPLEMENTATIONS[implementation]
    arrays = inputs_of(case)
    alone = jit(library(case, return_lse=False, **how))(*arrays)
    both = jit(library(case, **how))(*arrays)
    assert_close(alone, both[0], "float32", "forward")


def test_default_implementation_is_right():
    case = FEW[2]
    out, lse = jit(library(case))(*inputs_of(case))
    assert_close(out, expected(case)[0], "float32", "forward")
    assert_close(lse, expected(case)[1], "float32", "lse")


GRID = vm.VideoGrid(3, 4, 4)
METHODS = [
    (vm.Dense(), vm.dense_attention, {}),
    (vm.VMonarch(), vm.vmonarch_attention, {"grid": GRID}),
    (
        vm.VMonarch(steps=3, block=(2, 4, 4), recompute_frames=(0, 2), c_r_floor=0.2),
        vm.vmonarch_attention,
        {
            "grid": GRID,
            "steps": 3,
            "block": (2, 4, 4),
            "recompute_frames": (0, 2),
            "c_r_floor": 0.2,
        },
    ),
    (vm.TiledMonarch(), vm.tiled_monarch_attention, {"grid": GRID}),
    (
        vm.TiledMonarch(tile=(1, 2, 4), steps=2),
        vm.tiled_monarch_attention,
        {"grid": GRID, "tile": (1, 2, 4), "steps": 2},
    ),
]


@pytest.mark.parametrize(
    ("method", "function", "keywords"), METHODS, ids=[str(m[0]) for m in METHODS]
)
def test_a_method_is_its_function(method, function, keywords):
    arrays = inputs_of(make("dense", 48, 48))
    got = jit(functools.partial(method, grid=GRID))(*arrays)
    want = jit(functools.partial(function, **keywords))(*arrays)
    np.testing.assert_array_equal(got, want)
    assert hash(method) == hash(type(method)(**vars(method))), "a method is a value"
    assert method == type(method)(**vars(method))


def test_a_grid_may_be_a_tuple():
    arrays = inputs_of(make("dense", 48, 48))
    got = jit(functools.partial(vm.vmonarch_attention, grid=(3, 4, 4)))(*arrays)
    want = jit(functools.partial(vm.vmonarch_attention, grid=GRID))(*arrays)
    np.testing.assert_array_equal(got, want)
