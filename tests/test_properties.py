"""What is true at every size: exact cases, the certificate, the algebra, symmetries."""

import functools

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import jit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES, assert_close

import vmonarch_jax as vm

# Every new shape is a new compilation, so a few examples of each property have to do; they are
# the same in every run.
few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
IMPLEMENTATIONS = st.sampled_from(["reference", "xla"])
DTYPES = st.sampled_from(["float32", "float32", "bfloat16"])
side = st.integers(1, 4)


@st.composite
def layouts(draw):
    """A grid, a block inside it, and now and then a tile (a multiple of the block)."""
    grid = draw(st.tuples(side, side, side))
    block = tuple(draw(st.integers(1, n)) for n in grid)
    tile = None
    if draw(st.booleans()):
        tile = tuple(b * draw(st.integers(1, n // b)) for n, b in zip(grid, block, strict=True))
    return {"grid": grid, "block": block, "tile": tile, "steps": draw(st.integers(1, 3))}


def make_inputs(tokens, dtype="float32", seed=0, dim=4, batch=1, heads=2):
    """Logits of several units, so that nothing here is close to dense attention by chance."""
    rng = np.random.default_rng(seed + 1000 * tokens)
    scale = 2.0 if dtype == "float32" else 1.0
    shape = (batch, tokens, heads, dim)
    return [jnp.asarray(rng.normal(size=shape) * scale, dtype) for _ in range(3)]


def count(grid):
    return int(np.prod(grid))


@functools.cache
def compiled(function, **keywords):
    return jit(functools.partial(function, return_lse=True, **keywords))


@functools.cache
def compiled_gap():
    return jit(vm.attention_gap)


def monarch(arrays, grid, block, tile, steps, implementation, **keywords):
    key_mask = keywords.pop("key_mask", None)
    function = compiled(
        vm.vmonarch_attention,
        grid=vm.VideoGrid(*grid),
        block=block,
        tile=tile,
        steps=steps,
        implementation=implementation,
        **({"recompute_frames": 0} | keywords),
    )
    return function(*arrays, key_mask=key_mask)


# --- against the oracle, anywhere -----------------------------------------------------------------


@few
@given(layouts(), IMPLEMENTATIONS, DTYPES)
def test_any_layout(layout, implementation, dtype):
    arrays = make_inputs(count(layout["grid"]), dtype)
    out, lse = monarch(arrays, **layout, implementation=implementation)
    want = oracle.monarch_grid(*arrays, **layout)
    assert_close(out, want.out, dtype, "forward")
    assert_close(lse, want.lse, dtype, "lse")


@few
@given(
    st.integers(1, 20), st.integers(1, 8), st.integers(1, 3), st.sampled_from(["pre", "post"]),
    IMPLEMENTATIONS, st.booleans(),
)  # fmt: skip
def test_any_sequence(n, block_size, steps, pad, implementation, masked):
    arrays = make_inputs(n)
    mask = np.random.default_rng(n).random((1, n)) < 0.6 if masked else None
    how = {"block_size": block_size, "steps": steps, "pad": pad}
    function = compiled(vm.monarch_attention, implementation=implementation, **how)
    out, lse = function(*arrays, key_mask=None if mask is None else jnp.asarray(mask))
    want = oracle.monarch_sequence(*arrays, key_mask=mask, **how)
    assert_close(out, want.out, "float32", "forward")
    assert_close(lse, want.lse, "float32", "lse")


# --- exact cases ----------------------------------------------------------------------------------

EXACT = st.sampled_from(["one frame", "one pixel", "blocks of one token", "tiles of one token"])


@few
@given(EXACT, st.tuples(side, side, side), st.integers(1, 3), IMPLEMENTATIONS, DTYPES)
def test_exact_cases_are_dense(case, grid, steps, implementation, dtype):
    frames, height, width = grid
    grid = {"one frame": (1, height, width), "one pixel": (frames, 1, 1)}.get(case, grid)
    one = (1, 1, 1)
    block = one if "token" in case else (1, *grid[1:])
    tile = one if case == "tiles of one token" else None
    arrays = make_inputs(count(grid), dtype)
    out, lse = monarch(arrays, grid, block, tile, steps, implementation)
    want = oracle.dense(*arrays)
    assert_close(out, want.out, dtype, "forward")
    assert_close(lse, want.lse, dtype, "lse")


# --- the certificate ------------------------------------------------------------------------------


@few
@given(layouts(), IMPLEMENTATIONS)
def test_certificate_is_the_divergence(layout, implementation):
    arrays = make_inputs(count(layout["grid"]))
    out, lse = monarch(arrays, **layout, implementation=implementation)
    exact = oracle.dense(*arrays)
    by_definition = oracle.kl(oracle.monarch_grid(*arrays, **layout).matrix, exact.matrix)
    query, key, value = arrays
    gap = compiled_gap()(query, key, lse)
    assert gap.shape == lse.shape
    assert_close(gap, by_definition, "float32", "kl")
    slack = TOLERANCES["float32", "kl"] * max(1, np.abs(exact.lse).max())
    assert np.min(gap) >= -slack
    # Pinsker: what the certificate promises about the output holds.
    error = np.abs(np.asarray(out) - exact.out).max(-1)
    bound = 2 * np.sqrt(np.maximum(gap, 0) / 2 + slack) * np.abs(value).max()
    assert (error <= bound + 1e-5).all()


@few
@given(st.integers(1, 12), st.booleans())
def test_gap_of_some_rows(rows, masked):
    n = 24
    arrays = make_inputs(n, batch=2)
    mask = np.random.default_rng(3).random((2, n)) < 0.5 if masked else None
    part = oracle.monarch_sequence(*arrays, block_size=6, key_mask=mask)
    by_definition = oracle.kl(part.matrix, oracle.dense(*arrays, key_mask=mask).matrix)
    picked = np.random.default_rng(rows).permutation(n)[:rows]
    gap = compiled_gap()(
        *arrays[:2], jnp.asarray(part.lse, jnp.float32), rows=jnp.asarray(picked),
        key_mask=None if mask is None else jnp.asarray(mask),
    )  # fmt: skip
    assert gap.shape == (2, rows, 2)
    assert gap.dtype == jnp.float32
    assert_close(gap, by_definition[:, picked], "float32", "kl")


@few
@given(layouts(), IMPLEMENTATIONS, DTYPES)
def test_certificate_is_never_negative(layout, implementation, dtype):
    query, key, value = make_inputs(count(layout["grid"]), dtype, seed=5)
    _, lse = monarch((query, key, value), **layout, implementation=implementation)
    slack = TOLERANCES[dtype, "kl"] * max(1, np.abs(lse).max())
    assert np.min(oracle.dense(query, key, value).lse - lse) >= -slack


# --- the algebra ----------------------------------------------------------------------------------


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), IMPLEMENTATIONS, DTYPES)
def test_merging_is_joint_attention(first, second, queries, implementation, dtype):
    query, key, value = make_inputs(first + second + queries, dtype, batch=2)
    query, cut = query[:, :queries], slice(first, first + second)
    attend = compiled(vm.dense_attention, implementation=implementation)
    parts = [attend(query, key[:, s], value[:, s]) for s in (slice(0, first), cut)]
    out, lse = jit(vm.merge_attention)(parts)
    want = oracle.dense(query, key[:, : first + second], value[:, : first + second])
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    assert_close(out, want.out, dtype, "forward")
    assert_close(lse, want.lse, dtype, "lse")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("exact_frames", [(0,), (1, 3)])
def test_exact_key_frames_with_a_monarch_remainder(exact_frames, implementation):
    # Every query sees the keys of the chosen frames exactly; Monarch does the others, as a
    # sequence of one block a frame whose exact frames are masked, with the identity intact.
    frames, pixels = 5, 6
    query, key, value = make_inputs(frames * pixels)
    rows = oracle.frame_rows((frames, 1, pixels), exact_frames)
    mask = np.ones((1, frames * pixels), bool)
    mask[:, rows] = False

    exact = compiled(vm.dense_attention, implementation=implementation)
    rest = compiled(vm.monarch_attention, block_size=pixels, implementation=implementation)
    out, lse = vm.merge_attention(
        [
            exact(query, key[:, rows], value[:, rows]),
            rest(query, key, value, key_mask=jnp.asarray(mask)),
        ]
    )
    dense = oracle.dense(query, key, value)
    kept = oracle.dense(query, key, value, key_mask=~mask)
    remainder = oracle.monarch_sequence(query, key, value, block_size=pixels, key_mask=mask)
    weights, _ = oracle.softmax_lse(np.stack([kept.lse, remainder.lse]), 0)
    matrix = sum(
        np.moveaxis(w, 1, 2)[..., None] * p.matrix
        for w, p in zip(weights, (kept, remainder), strict=True)
    )
    by_definition = oracle.kl(matrix, dense.matrix)
    assert_close(out, np.einsum("zhqk,zkhd->zqhd", matrix, np.asarray(value)), "float32", "forward")
    assert_close(compiled_gap()(query, key, lse), by_definition, "float32", "kl")
    assert by_definition.max() > 0.05, "an easy case proves nothing"


def test_merging_with_a_part_that_saw_nothing():
    query, key, value = make_inputs(6)
    attend = compiled(vm.dense_attention)
    part = attend(query, key, value)
    nothing = attend(query, key, value, key_mask=jnp.zeros((1, 6), bool))
    for parts in ([part, nothing], [nothing, part], [part], [nothing, part, nothing]):
        out, lse = vm.merge_attention(parts)
        assert_close(out, part[0], "float32", "forward")
        assert_close(lse, part[1], "float32", "lse")
    out, lse = vm.merge_attention([nothing, nothing])
    assert not np.any(out)
    assert np.isneginf(lse).all()


# --- bounds and symmetries ------------------------------------------------------------------------


@few
@given(layouts(), IMPLEMENTATIONS)
def test_tangent_planes_bound_from_below(layout, implementation):
    # With the keys of one block alone, lse is that block's tangent plane F: never above the
    # block's own log-sum-exp, whatever the mean query it was taken at.
    arrays = make_inputs(count(layout["grid"]))
    tokens = oracle.place_grid(layout["grid"], layout["block"], layout["tile"])[0, -1]
    mask = np.isin(np.arange(count(layout["grid"])), tokens)[None]
    _, lse = monarch(arrays, **layout, implementation=implementation, key_mask=jnp.asarray(mask))
    exact = oracle.dense(*arrays, key_mask=mask)
    slack = TOLERANCES["float32", "lse"] * np.abs(lse).max()
    assert (lse <= exact.lse + slack).all()
    want = oracle.monarch_grid(*arrays, **layout, key_mask=mask)
    assert_close(lse, want.lse, "float32", "lse")


SYMMETRIC = [
    {"grid": (3, 2, 3), "block": (1, 2, 3), "tile": None, "steps": 2},
    {"grid": (3, 3, 4), "block": (2, 1, 2), "tile": (2, 3, 4), "steps": 2},
]
over_both = pytest.mark.parametrize("implementation", ["reference", "xla"])


@over_both
@pytest.mark.parametrize("layout", SYMMETRIC, ids=str)
def test_symmetries(layout, implementation):
    arrays = make_inputs(count(layout["grid"]), batch=3, heads=3)
    call = functools.partial(monarch, **layout, implementation=implementation, recompute_frames=1)
    out, lse = call(arrays)

    order = [2, 0, 1]
    for axis in (0, 2):  # batch elements and heads do not see each other
        moved = call([jnp.take(a, jnp.array(order), axis=axis) for a in arrays])
        assert_close(moved[0], np.take(out, order, axis), "float32", "forward")
        assert_close(moved[1], np.take(lse, order, axis), "float32", "lse")

    query, key, value = arrays
    shifted, same_lse = call((query, key, value + 7.0))  # rows sum to one
    assert_close(shifted, out + 7.0, "float32", "forward")
    assert_close(same_lse, lse, "float32", "lse")

    scaled, _ = call((query, key, -3.0 * value))
    assert_close(scaled, -3.0 * out, "float32", "forward")

    # A key that moves everywhere by c moves a row's logits by q . c alike: the same attention.
    c = jnp.array([0.3, -0.2, 0.1, 0.4])
    along, along_lse = call((query, key + c, value))
    assert_close(along, out, "float32", "forward")
    rise = np.einsum("zqhd,d->zqh", query, c) * query.shape[-1] ** -0.5
    assert_close(along_lse, lse + rise, "float32", "lse")
