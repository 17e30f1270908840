"""SALAD: windows, the best blocks, the linear branch and the layer, against float64 loops."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import salad_oracle as oracle
from compiling import jit
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

import vmonarch_jax as vm
from vmonarch_jax.windows import TileOrder, nearest_map, tile_of, window_map

# Grids that the tile divides, leaves a rest of on every axis, and is larger than.
GRIDS = [((4, 4, 4), (2, 2, 2)), ((5, 3, 7), (2, 2, 3)), ((3, 2, 3), (4, 1, 2))]


def inputs(shape, dtype="float32", heads=2, d=8):
    rng = np.random.default_rng(7)
    drawn = rng.normal(size=(3, 2, np.prod(shape), heads, d))
    arrays = [jnp.asarray(x, dtype) for x in drawn]
    return arrays, [np.asarray(x, np.float64) for x in arrays]


shapes = st.tuples(*[st.integers(1, 6)] * 3)
tiles = st.tuples(*[st.integers(1, 3)] * 3)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, tile=tiles, window=st.tuples(*[st.integers(1, 7)] * 3), share=st.floats(0, 1))
def test_maps_of_any_grid(shape, tile, window, share):
    order = TileOrder(vm.VideoGrid(*shape), tile)
    np.testing.assert_array_equal(order.tokens, oracle.walk(shape, tile))
    assert sorted(order.tokens) == list(range(len(order.tokens)))
    near = window_map(order, window)
    np.testing.assert_array_equal(near, oracle.window_map(shape, tile, window))
    assert near.diagonal().all()
    keep = 1 + int(share * (order.blocks - 1))
    near = nearest_map(order, keep)
    np.testing.assert_array_equal(near, oracle.nearest_map(shape, tile, keep))
    assert (near.sum(-1) == keep).all()


def test_windows_of_tiles():
    order = TileOrder(vm.VideoGrid(8, 6, 10), (2, 3, 2))
    places = np.stack(np.unravel_index(order.tokens, (8, 6, 10)), -1).reshape(order.blocks, 12, 3)
    # Where the tile divides the grid, every block is a tile.
    assert (places.max(1) - places.min(1) + 1 == (2, 3, 2)).all()
    # A window of whole tiles has the same number of them everywhere, inside the grid.
    near = window_map(order, (6, 3, 4))
    assert (near.sum(-1) == 3 * 1 * 2).all()
    assert window_map(order, (99, 99, 99)).all()
    first = np.flatnonzero(near[0])
    assert places[first].reshape(-1, 3).max(0).tolist() == [5, 2, 3]


def test_order_is_undone_and_has_the_gradient_of_a_permutation():
    order = TileOrder(vm.VideoGrid(5, 3, 7), (2, 2, 3))
    x = jnp.arange(2 * 105 * 3.0).reshape(2, 105, 3)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype)
    chex.assert_trees_all_equal(order.restore(order.reorder(x)), x)
    assert x[0, order.tokens[17], 1] == order.reorder(x)[0, 17, 1]
    gradient = jax.grad(lambda x: (order.reorder(x) * weights).sum())(x)
    chex.assert_trees_all_equal(gradient, order.restore(weights))


@pytest.mark.parametrize(
    ("block", "tile"),
    [(64, (4, 4, 4)), (128, (4, 4, 8)), (16, (2, 2, 4)), (7, (1, 1, 7)), (1, (1, 1, 1))],
)
def test_most_cubic_tile(block, tile):
    assert tile_of(block) == tile


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "tile"), GRIDS)
@pytest.mark.parametrize("kind", ["window", "sparsity", "top_k"])
def test_sparse_branch(kind, shape, tile, dtype, implementation):
    (q, k, v), (q64, k64, v64) = inputs(shape, dtype)
    size = int(np.prod(tile))
    window = (3, 2, 4)
    keep = max(1, int(0.4 * len(oracle.blocks_of(shape, tile)) + 0.5))
    method, kept = {
        "window": (
            vm.SlidingWindow(window=window, tile=tile, block_size=size, scale=0.5),
            oracle.window_map(shape, tile, window),
        ),
        "sparsity": (
            vm.Salad(sparsity=0.6, tile=tile, block_size=size, scale=0.5),
            oracle.nearest_map(shape, tile, keep),
        ),
        "top_k": (
            vm.Salad(sparse="top_k", sparsity=0.6, tile=tile, block_size=size, scale=0.5),
            oracle.top_map(q64, k64, shape, tile, keep),
        ),
    }[kind]
    out, lse, weights = oracle.sparse(q64, k64, v64, kept, shape, tile, 0.5)

    @jit
    def run(q, k, v):
        how = {"grid": shape, "implementation": implementation}
        part = method(q, k, v, **how, return_lse=True)
        return part, vm.attention_gap(q, k, part.lse, scale=0.5)

    part, gap = run(q, k, v)
    assert_close(part.out, out, dtype, "forward")
    assert_close(part.lse, lse, dtype, "lse")
    # The certificate: KL of each row from the dense one, by its definition.
    x = np.einsum("znhd,zshd->zhns", q64, k64) * 0.5
    dense = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    kl = np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1) / dense), 0)
    assert_close(gap, kl.sum(-1).transpose(0, 2, 1), dtype, "kl")
    assert method.kept(vm.VideoGrid(*shape)) == kept.sum() // (1 if kept.ndim == 2 else 4)


@pytest.mark.parametrize("sparse", ["window", "top_k"])
def test_sparsity_zero_is_dense(sparse):
    (q, k, v), _ = inputs((3, 4, 5))
    method = vm.Salad(sparse=sparse, sparsity=0, block_size=8)
    part = method(q, k, v, grid=(3, 4, 5), return_lse=True)
    expected = vm.dense_attention(q, k, v, return_lse=True)
    chex.assert_trees_all_close(part, expected, atol=2e-6)


def directional(function, arrays, names, argument, gradient, dtype="float32"):
    """Each gradient along a random direction against a central difference in float64."""
    rng = np.random.default_rng(3)
    for name in names:
        direction = rng.normal(size=arrays[name].shape)
        step = 1e-6
        ends = [
            function({**arrays, name: arrays[name] + sign * step * direction}) for sign in (1, -1)
        ]
        expected = ((ends[0] - ends[1]) * argument).sum() / (2 * step)
        actual = (np.asarray(gradient[name], np.float64) * direction).sum()
        # What a direction adds up to is as large as its length, whatever cancels.
        size = np.sqrt((np.asarray(gradient[name], np.float64) ** 2).sum())
        assert_close(actual / max(size, 1), expected / max(size, 1), dtype, "gradient", name)


@pytest.mark.parametrize("sparse", ["window", "top_k"])
def test_sparse_gradients(sparse):
    shape, tile = (5, 3, 4), (2, 2, 2)
    arrays, wide = inputs(shape)
    method = vm.Salad(sparse=sparse, sparsity=0.5, tile=tile, block_size=8)
    names = ("q", "k", "v")
    weights = np.random.default_rng(1).normal(size=wide[2].shape)
    keep = (len(oracle.blocks_of(shape, tile)) + 1) // 2
    kept = {
        "window": lambda: oracle.nearest_map(shape, tile, keep),
        "top_k": lambda: oracle.top_map(*wide[:2], shape, tile, keep),
    }[sparse]()

    def by_hand(a):
        return oracle.sparse(a["q"], a["k"], a["v"], kept, shape, tile, 8**-0.5)[0]

    def loss(a):
        return (method(a["q"], a["k"], a["v"], grid=shape) * weights).sum()

    gradient = jit(jax.grad(loss))(dict(zip(names, arrays, strict=True)))
    directional(by_hand, dict(zip(names, wide, strict=True)), names, weights, gradient)


def turner(angles):
    """The oracle's rotation, for JAX."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def rotate(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        pair = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return pair.reshape(x.shape).astype(x.dtype)

    return rotate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("feature_map", ["relu", "elu"])
def test_linear_attention(dtype, feature_map):
    arrays, wide = inputs((3, 4, 5), dtype)
    angles = np.random.default_rng(2).normal(size=(60, 4))
    phi = {
        "relu": lambda x: np.maximum(x, 0),
        "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    }[feature_map]
    for turned in (None, angles):
        rotate = None if turned is None else turner(jnp.asarray(turned, jnp.float32))
        run = functools.partial(vm.linear_attention, rotate=rotate, feature_map=feature_map)
        out = jit(run)(*arrays)
        assert out.dtype == jnp.dtype(dtype)
        assert_close(out, oracle.linear(*wide, turned, phi), dtype, "forward")


def test_linear_attention_of_queries_without_features():
    (q, k, v), _ = inputs((2, 3, 4))
    q = q.at[:, 5].set(-1.0)
    run = jit(vm.linear_attention)
    assert (run(q, k, v)[:, 5] == 0).all()
    gradients = jit(jax.grad(lambda *a: vm.linear_attention(*a).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)


def test_linear_gradients():
    arrays, wide = inputs((2, 3, 4))
    names = ("q", "k", "v")
    angles = np.random.default_rng(2).normal(size=(24, 4))
    weights = np.random.default_rng(1).normal(size=wide[2].shape)
    rotate = turner(jnp.asarray(angles, jnp.float32))

    def loss(a):
        return (vm.linear_attention(a["q"], a["k"], a["v"], rotate=rotate) * weights).sum()

    gradient = jit(jax.grad(loss))(dict(zip(names, arrays, strict=True)))

    def by_hand(a):
        return oracle.linear(a["q"], a["k"], a["v"], angles)

    directional(by_hand, dict(zip(names, wide, strict=True)), names, weights, gradient)


SHAPE, TILE, HEADS, DIM = (3, 4, 3), (2, 2, 2), 2, 16
METHOD = vm.Salad(sparsity=0.5, tile=TILE, block_size=8)


def awake_layer(**options):
    """A layer without zeros, its parameters by name, and what it is called with."""
    layer = vm.nn.SaladAttention(DIM, HEADS, attention=METHOD, rngs=nnx.Rngs(0), **options)
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(4)
    flat = [
        (path, leaf.replace(jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    state = nnx.from_flat_state(flat)
    params = {".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in flat}
    x = jnp.asarray(rng.normal(size=(2, np.prod(SHAPE), DIM)), jnp.float32)
    angles = rng.normal(size=(np.prod(SHAPE), DIM // HEADS // 2))
    return graph, state, params, x, angles


@pytest.mark.parametrize("gate_tokens", [False, True])
def test_layer_forward_and_gradients(gate_tokens):
    graph, state, params, x, angles = awake_layer(gate_tokens=gate_tokens)
    weights = np.random.default_rng(5).normal(size=x.shape)
    rotate = turner(jnp.asarray(angles, jnp.float32))

    @jit
    def run(state, x):
        def loss(state, x):
            out = nnx.merge(graph, state)(x, grid=SHAPE, rotate=rotate)
            return (out * weights).sum(), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    (of_state, of_x), out = run(state, x)
    keep = oracle.nearest_map(SHAPE, TILE, (len(oracle.blocks_of(SHAPE, TILE)) + 1) // 2)

    def by_hand(a):
        a = dict(a)
        return oracle.layer(a, a.pop("x"), keep, SHAPE, TILE, angles, HEADS, gate_tokens)

    arrays = params | {"x": np.asarray(x, np.float64)}
    assert_close(out, by_hand(arrays), "float32", "forward")
    gradient = {".".join(map(str, p)): leaf[...] for p, leaf in nnx.to_flat_state(of_state)}
    directional(by_hand, arrays, arrays, weights, gradient | {"x": of_x})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_layer_is_its_sparse_branch(dtype):
    x = jax.random.normal(jax.random.key(1), (2, np.prod(SHAPE), DIM), dtype)
    layer = vm.nn.SaladAttention(DIM, HEADS, attention=METHOD, dtype=dtype, rngs=nnx.Rngs(0))
    plain = vm.nn.VideoSelfAttention(DIM, HEADS, attention=METHOD, dtype=dtype, rngs=nnx.Rngs(0))
    rotate = turner(jax.random.normal(jax.random.key(2), (np.prod(SHAPE), DIM // HEADS // 2)))
    for method in (METHOD, vm.Dense()):
        how = {"grid": SHAPE, "rotate": rotate, "attention": method}
        chex.assert_trees_all_equal(layer(x, **how), plain(x, **how))
    # What is at zero can still be learnt.
    gradient = nnx.grad(lambda layer: (layer(x, grid=SHAPE) ** 2).sum().astype(jnp.float32))(layer)
    assert jnp.abs(gradient.linear_out.kernel[...]).max() > 0


def test_flops_count_kept_blocks():
    grid = vm.VideoGrid(5, 3, 7)
    order_blocks = len(oracle.blocks_of(grid.shape, (2, 2, 3)))
    keep = int(0.3 * order_blocks + 0.5)
    sizes = {"heads": 3, "head_dim": 8, "value_dim": 10}
    method = vm.Salad(sparsity=0.7, tile=(2, 2, 3), block_size=12)
    expected = 3 * order_blocks * keep * 2 * 12 * 12 * (8 + 10)
    assert vm.flops.attention(method, grid, **sizes) == expected
    top = vm.Salad(sparse="top_k", sparsity=0.7, tile=(2, 2, 3), block_size=12)
    pooled = 3 * 2 * order_blocks**2 * 8
    assert vm.flops.attention(top, grid, **sizes) == expected + pooled
    # A window that holds everything costs what dense attention does, where no block is short.
    everything = vm.SlidingWindow(window=(8, 8, 8), block_size=64)
    dense = vm.flops.attention(vm.Dense(), (8, 8, 8), heads=2, head_dim=16)
    assert vm.flops.attention(everything, (8, 8, 8), heads=2, head_dim=16) == dense
    n, dim = grid.tokens, 24
    branch = 3 * (2 * 2 * n * 8 * 8 + 2 * n * 8) + 2 * n * dim * dim + 2 * dim
    assert vm.flops.linear_branch(grid, heads=3, head_dim=8) == branch


def test_explain_says_what_is_kept():
    report = str(vm.explain(vm.Salad(), vm.VideoGrid(21, 30, 52)))
    assert "512 blocks of 64 tokens (tiles of 4x4x4), 51.0 kept a row: 90.0% sparse" in report
    assert "does not divide" in report
    assert "does not divide" not in str(vm.explain(vm.Salad(), vm.VideoGrid(8, 8, 8)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vm.Salad(sparse="best"), r"`sparse` must be one of \('window', 'top_k'\), got"),
        (lambda: vm.Salad(sparsity=1.0), r"`sparsity` must lie in \[0, 1\), got 1.0"),
        (lambda: vm.Salad(sparsity="most"), "`sparsity` must be a finite number, got 'most'"),
        (lambda: vm.Salad(tile=(4, 4, 2)), r"`tile` must hold block_size = 64 tokens, got \(4, 4"),
        (lambda: vm.Salad(tile=(4, 4)), r"`tile` must be a \(frames, height, width\) tuple, got"),
        (lambda: vm.Salad(window=(4, 0, 2)), r"`window\[1\]` must be a positive integer, got 0"),
        (lambda: vm.Salad(block_size=0), "`block_size` must be a positive integer, got 0"),
        (lambda: vm.Salad(sparse="top_k", window=(4, 4, 4)), "`window` must be None with"),
        (lambda: vm.SlidingWindow(scale=float("nan")), "`scale` must be a finite number, got nan"),
        (lambda: call(vm.Salad(), (3, 4, 4)), r"frames\*height\*width = 48, got 24"),
        (
            lambda: vm.linear_attention(*inputs((2, 3, 4))[0], feature_map="gelu"),
            r"`feature_map` must be one of \['elu', 'relu'\], got 'gelu'",
        ),
        (
            lambda: vm.linear_attention(*inputs((2, 3, 4))[0], rotate=lambda x: x[:, :1]),
            r"`rotate` must keep the shape \(2, 24, ",
        ),
        (
            lambda: vm.nn.SaladAttention(16, 2, feature_map="gelu", rngs=nnx.Rngs(0)),
            r"`feature_map` must be one of \['elu', 'relu'\], got 'gelu'",
        ),
        (
            lambda: vm.nn.SaladAttention(16, 2, gate_bias=float("inf"), rngs=nnx.Rngs(0)),
            "`gate_bias` must be a finite number, got inf",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def call(method, grid):
    return method(*inputs((2, 3, 4))[0], grid=grid)


def test_values_are_hashable_and_take_lists():
    method = vm.Salad(window=[4, 4, 4], tile=[2, 2, 2], block_size=8)
    assert hash(method) == hash(vm.Salad(window=(4, 4, 4), tile=(2, 2, 2), block_size=8))
    (q, k, v), _ = inputs((4, 4, 4))
    run = jax.jit(lambda method, q, k, v: method(q, k, v, grid=(4, 4, 4)), static_argnums=0)
    chex.assert_trees_all_close(run(method, q, k, v), method(q, k, v, grid=(4, 4, 4)), atol=2e-6)
