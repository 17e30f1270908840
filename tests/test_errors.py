"""A caller's mistake is a `ValueError` at once, with the expected and the got, everywhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vmonarch_jax as vm

GRID = vm.VideoGrid(3, 2, 4)
X = jnp.ones((2, 24, 3, 4))
OTHER = {
    "short": X[:, :20],
    "rank 3": X[0],
    "rank 5": X[None],
    "integers": jnp.ones(X.shape, jnp.int32),
    "booleans": jnp.ones(X.shape, bool),
    "complex": jnp.ones(X.shape, jnp.complex64),
    "bfloat16": X.astype(jnp.bfloat16),
    "2 heads": X[:, :, :2],
    "dim 5": jnp.ones((2, 24, 3, 5)),
    "batch 1": X[:1],
    "empty": X[:, :, :0],
}
IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", ("pallas_tpu", "xla"), None]
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)

video = {
    "vmonarch": (vm.vmonarch_attention, {"grid": GRID}),
    "tiled": (vm.tiled_monarch_attention, {"grid": GRID}),
}
every = video | {
    "dense": (vm.dense_attention, {}),
    "monarch": (vm.monarch_attention, {"block_size": 6}),
}


def raises(*fragments):
    """A ValueError whose message has all these words, in this order."""
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, fragments)))


def call(name, arrays=(X, X, X), **keywords):
    function, usual = every[name]
    return function(*arrays, **(usual | keywords))


# --- arrays ---------------------------------------------------------------------------------------

ARRAYS = [
    ("query", "rank 3", ["`query`", "[batch, seq, heads, head_dim]", "(24, 3, 4)"]),
    ("key", "rank 5", ["`key`", "[batch, seq, heads, head_dim]", "(1, 2, 24, 3, 4)"]),
    ("value", "rank 3", ["`value`", "[batch, seq, heads, head_dim]", "(24, 3, 4)"]),
    ("query", "integers", ["`query`", "float", "int32"]),
    ("key", "booleans", ["`key`", "float", "bool"]),
    ("value", "complex", ["`value`", "float", "complex64"]),
    ("key", "bfloat16", ["dtype", "float32", "bfloat16", "float32"]),
    ("key", "2 heads", ["`key`", "(2, 24, 3, 4)", "(2, 24, 2, 4)"]),
    ("key", "dim 5", ["`key`", "(2, 24, 3, 4)", "(2, 24, 3, 5)"]),
    ("key", "batch 1", ["`key`", "(2, 24, 3, 4)", "(1, 24, 3, 4)"]),
    ("value", "2 heads", ["`value`", "2, 24, 3", "(2, 24, 2, 4)"]),
    ("value", "short", ["`value`", "2, 24, 3", "(2, 20, 3, 4)"]),
    ("query", "empty", ["`query`", "empty", "(2, 24, 0, 4)"]),
]


@over_implementations
@pytest.mark.parametrize("function", every)
@pytest.mark.parametrize(("which", "wrong", "words"), ARRAYS)
def test_arrays(function, which, wrong, words, implementation):
    arrays = {"query": X, "key": X, "value": X} | {which: OTHER[wrong]}
    with raises(*words):
        call(function, arrays.values(), implementation=implementation)


@over_implementations
@pytest.mark.parametrize("function", ["monarch", "vmonarch", "tiled"])
def test_lengths_must_agree(function, implementation):
    with raises("seq", "24", "20"):
        call(function, (X, OTHER["short"], OTHER["short"]), implementation=implementation)


@over_implementations
@pytest.mark.parametrize("function", video)
def test_grid_and_sequence(function, implementation):
    x = jnp.ones((1, 3000, 1, 4))
    words = "`seq` must equal frames*height*width = 3120, got 3000"
    with raises(words):
        call(function, (x, x, x), grid=vm.VideoGrid(4, 26, 30), implementation=implementation)
    with raises(words):  # in the same words when traced
        jax.eval_shape(
            lambda x: call(function, (x, x, x), grid=(4, 26, 30), implementation=implementation), x
        )


# --- settings -------------------------------------------------------------------------------------

STEPS = [
    ({"steps": 0}, ["`steps`", "positive", "0"]),
    ({"steps": -1}, ["`steps`", "positive", "-1"]),
    ({"steps": 1.5}, ["`steps`", "integer", "1.5"]),
    ({"steps": True}, ["`steps`", "integer", "True"]),
    ({"c_r_floor": -0.1}, ["`c_r_floor`", "-0.1"]),
    ({"c_r_floor": float("nan")}, ["`c_r_floor`", "nan"]),
    ({"c_r_floor": "big"}, ["`c_r_floor`", "big"]),
    ({"scale": float("inf")}, ["`scale`", "inf"]),
    ({"scale": "big"}, ["`scale`", "big"]),
    ({"block_sizes": 128}, ["`block_sizes`", "BlockSizes", "128"]),
]
LAYOUT = [
    ({"grid": 24}, ["`grid`", "VideoGrid", "24"]),
    ({"grid": (3, 8)}, ["`grid`", "(frames, height, width)", "(3, 8)"]),
    ({"grid": (3, 2, 0)}, ["grid.width", "positive", "0"]),
    ({"grid": (3, 2.0, 4)}, ["grid.height", "integer", "2.0"]),
    ({"grid": None}, ["`grid`", "VideoGrid", "None"]),
    ({"block": 8}, ["`block`", "(frames, height, width)", "8"]),
    ({"block": (1, 8)}, ["`block`", "(frames, height, width)", "(1, 8)"]),
    ({"block": (1, 0, 4)}, ["`block", "positive", "0"]),
    ({"block": (1, 2, -4)}, ["`block", "positive", "-4"]),
    ({"block": (1, 2.0, 4)}, ["`block", "integer", "2.0"]),
    ({"block": (4, 2, 4)}, ["`block`", "2, 4)", "(4, 2, 4)"]),
    ({"block": (1, 2, 5)}, ["`block`", "(1, 2, 5)"]),
    ({"tile": (4, 2, 4)}, ["`tile`", "(3, 2, 4)", "(4, 2, 4)"]),
    ({"tile": (1, 2, 0)}, ["`tile", "positive", "0"]),
    ({"tile": "frame"}, ["`tile`", "(frames, height, width)", "frame"]),
    ({"tile": (1, 2, 2), "block": (1, 2, 4)}, ["(1, 2, 2)", "(1, 2, 4)"]),
    ({"tile": (1, 2, 3), "block": (1, 1, 2)}, ["`tile`", "multiple", "(1, 1, 2)", "(1, 2, 3)"]),
    ({"recompute_frames": 4}, ["`recompute_frames`", "3", "4"]),
    ({"recompute_frames": -1}, ["`recompute_frames`", "3", "-1"]),
    ({"recompute_frames": (0, 3)}, ["`recompute_frames`", "2", "3"]),
    ({"recompute_frames": (-1,)}, ["`recompute_frames`", "2", "-1"]),
    ({"recompute_frames": "first"}, ["`recompute_frames`", "first"]),
    ({"recompute_frames": 1.0}, ["`recompute_frames`", "1.0"]),
    ({"recompute_frames": (0.5,)}, ["`recompute_frames`", "0.5"]),
]
SEQUENCE = [
    ({"block_size": 0}, ["`block_size`", "positive", "0"]),
    ({"block_size": -6}, ["`block_size`", "positive", "-6"]),
    ({"block_size": 6.0}, ["`block_size`", "integer", "6.0"]),
    ({"pad": "middle"}, ["`pad`", "pre", "post", "middle"]),
    ({"pad": None}, ["`pad`", "pre", "post", "None"]),
]


@over_implementations
@pytest.mark.parametrize("function", ["monarch", "vmonarch", "tiled"])
@pytest.mark.parametrize(("wrong", "words"), STEPS, ids=str)
def test_settings(function, wrong, words, implementation):
    with raises(*words):
        call(function, implementation=implementation, **wrong)


@over_implementations
@pytest.mark.parametrize("function", video)
@pytest.mark.parametrize(("wrong", "words"), LAYOUT, ids=str)
def test_layout(function, wrong, words, implementation):
    with raises(*words):
        call(function, implementation=implementation, **wrong)


@over_implementations
@pytest.mark.parametrize(("wrong", "words"), SEQUENCE, ids=str)
def test_sequence(wrong, words, implementation):
    with raises(*words):
        call("monarch", implementation=implementation, **wrong)


MASKS = [
    (jnp.ones((2, 24)), ["`key_mask`", "bool", "float32"]),
    (jnp.ones((2, 24), jnp.int32), ["`key_mask`", "bool", "int32"]),
    (jnp.ones((2, 23), bool), ["`key_mask`", "(2, 24)", "(2, 23)"]),
    (jnp.ones((24,), bool), ["`key_mask`", "(2, 24)", "(24,)"]),
    (jnp.ones((2, 24, 3), bool), ["`key_mask`", "(2, 24)", "(2, 24, 3)"]),
]


@over_implementations
@pytest.mark.parametrize("function", every)
@pytest.mark.parametrize(("mask", "words"), MASKS)
def test_key_mask(function, mask, words, implementation):
    with raises(*words):
        call(function, key_mask=mask, implementation=implementation)


# --- implementations ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", every)
@pytest.mark.parametrize("unknown", ["triton", ("xla", "triton"), ["triton"], ""])
def test_unknown_implementation(function, unknown):
    got = unknown if isinstance(unknown, str) else unknown[-1]
    with raises("`implementation`", "cudnn", "pallas_gpu", "pallas_tpu", "reference", "xla", got):
        call(function, implementation=unknown)


@pytest.mark.parametrize("function", every)
@pytest.mark.parametrize("wrong", [(), 3])
def test_no_implementation_at_all(function, wrong):
    with raises("`implementation`", "3" if wrong else ""):
        call(function, implementation=wrong)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the kernels may run here")
@pytest.mark.parametrize("function", every)
@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu", "cudnn"])
def test_known_but_not_here(function, name):
    with pytest.raises(NotImplementedError, match=name):
        call(function, implementation=name)
    # A sequence falls through to what works, and fails loudly where nothing does.
    assert jax.eval_shape(lambda: call(function, implementation=(name, "xla"))).shape == X.shape
    with pytest.raises(NotImplementedError, match=f"(?s){name}.*pallas_gpu"):
        call(function, implementation=(name, "pallas_gpu"))


# --- the rest of the public face ------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0, 2, 4), (3, -2, 4), (3, 2, 4.5), (3, 2, "4"), (True, 2, 4)])
def test_video_grid(sizes):
    with raises("grid.", "positive integer"):
        vm.VideoGrid(*sizes)


def test_attention_gap():
    lse = jnp.zeros((2, 24, 3))
    with raises("`lse`", "(2, 24, 3)", "(2, 24)"):
        vm.attention_gap(X, X, lse[..., 0])
    with raises("`lse`", "(2, 24, 3)", "(2, 20, 3)"):
        vm.attention_gap(X, X, lse[:, :20])
    with raises("`seq` must equal frames*height*width = 30, got 24"):
        vm.attention_gap(X, X, lse, grid=(3, 2, 5))
    with raises("`key`", "(2, 24, 3, 4)", "(2, 24, 2, 4)"):
        vm.attention_gap(X, OTHER["2 heads"], lse)
    with raises("`key_mask`", "bool", "float32"):
        vm.attention_gap(X, X, lse, key_mask=jnp.ones((2, 24)))
    for rows in (jnp.array([0.5]), jnp.array([[0, 1]])):
        with raises("`rows`"):
            vm.attention_gap(X, X, lse, rows=rows)
    with raises("`rows`", "24"):
        vm.attention_gap(X, X, lse, rows=np.array([24]))


def test_merge_attention():
    part = (X, jnp.zeros((2, 24, 3)))
    with raises("at least one"):
        vm.merge_attention([])
    with raises("(2, 24, 3, 4)", "(2, 20, 3, 4)"):
        vm.merge_attention([part, (X[:, :20], part[1][:, :20])])
    with raises("(2, 24, 3)", "(2, 24)"):
        vm.merge_attention([(X, part[1][..., 0])])


@pytest.mark.parametrize("method", [vm.VMonarch, vm.TiledMonarch])
def test_methods(method):
    for wrong, words in STEPS[:7]:
        with raises(*words):
            method(**wrong)
    with raises("`seq` must equal frames*height*width = 24, got 20"):
        method()(*[OTHER["short"]] * 3, grid=GRID)
    with raises("`block`", "(3, 2, 4)", "(4, 2, 4)"):
        method(block=(4, 2, 4), tile=(3, 2, 4))(X, X, X, grid=GRID)


@pytest.mark.parametrize("wrong", ["vmonarch", vm.VMonarch, vm.AdaSpa, None])
def test_what_is_no_method_value(wrong):
    """A name, or the class where a value of it was meant."""
    x = jnp.ones((1, 12, 2, 4))
    words = "`method` must be a method value such as vm.VMonarch(), got "
    for call in (
        lambda: vm.attend(wrong, x, x, x, grid=(3, 2, 2)),
        lambda: vm.init_state(wrong, (3, 2, 2), batch=1, heads=2, head_dim=4),
        lambda: vm.Corrected(wrong),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"{words}{wrong!r}"
    assert not vm.remembers(wrong)
    with pytest.raises(TypeError, match="must be a method value, for example"):
        vm.explain(wrong, (3, 2, 2))


def test_dense_method_checks_its_grid():
    with raises("`seq` must equal frames*height*width = 24, got 20"):
        vm.Dense()(*[OTHER["short"]] * 3, grid=GRID)


@pytest.mark.parametrize("wrong", [0, -5, 1.5, True])
def test_block_sizes(wrong):
    with raises("xla_scores", str(wrong)):
        vm.BlockSizes(xla_scores=wrong)
