"""The transformer: shapes, positions, execution options and the injected attention."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from vmonarch_jax.models import (
    CONFIGS,
    VideoDiT,
    VideoDiTConfig,
    capture_qkv,
    patchify,
    split_params,
    unpatchify,
)
from vmonarch_jax.models.rope import apply_rope, axis_dims, rope_angles
from vmonarch_jax.models.spectrum import wiener

import vmonarch_jax as vm

SMALL = VideoDiTConfig(
    frames=2, height=8, width=6, patch=(1, 2, 2), dim=24, depth=2, heads=2, caption_dim=5, classes=4
)


def inputs(config: VideoDiTConfig, batch: int = 2, size=None):
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (batch, *(size or config.video_shape[:3]), 3)
    x = jax.random.normal(keys[0], shape)
    t = jax.random.uniform(keys[1], (batch,))
    caption = jax.random.normal(keys[2], (batch, config.caption_dim))
    return x, t, jnp.arange(batch) % (config.classes + 1), caption


def test_named_configurations():
    tiny = CONFIGS["tiny"]
    assert tiny.grid == vm.VideoGrid(16, 8, 8)
    assert tiny.head_dim == 64
    _, params = split_params(nnx.eval_shape(lambda: VideoDiT(tiny, rngs=nnx.Rngs(0))))
    total = sum(p.size for p in params.values())
    assert 2_000_000 < total < 4_000_000
    blocks = sum(p.size for name, p in params.items() if name.startswith("blocks."))
    assert blocks > 0.8 * total, "the parameters should go into the layers"


@pytest.mark.parametrize("size", [None, (1, 2, 2), (3, 4, 10)])
def test_velocity_has_the_shape_of_the_video(size, awake, forward):
    x, t, label, caption = inputs(SMALL, size=size)
    out = forward(awake(SMALL), x, t, label, caption)
    chex.assert_shape(out, x.shape)
    chex.assert_type(out, jnp.float32)
    chex.assert_tree_all_finite(out)


def test_patchify_order_and_inverse():
    x = jnp.arange(2 * 4 * 4 * 6 * 3).reshape(2, 4, 4, 6, 3)
    tokens = patchify(x, (2, 2, 3))
    chex.assert_shape(tokens, (2, 2 * 2 * 2, 2 * 2 * 3 * 3))
    # token 5 of a 2 x 2 x 2 grid is (1, 0, 1): frame slowest, width fastest
    expected = np.asarray(x)[1, 2:4, 0:2, 3:6].reshape(-1)
    np.testing.assert_array_equal(tokens[1, 5], expected)
    np.testing.assert_array_equal(unpatchify(tokens, (2, 2, 3), vm.VideoGrid(2, 2, 2)), x)


def test_rope_matches_complex_rotation():
    grid, dim, theta = vm.VideoGrid(2, 3, 4), 16, 50.0
    x = np.random.default_rng(0).normal(size=(1, grid.tokens, 2, dim)).astype(np.float32)
    got = apply_rope(jnp.asarray(x), rope_angles(grid, dim, theta))
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    for n, place in enumerate(np.ndindex(2, 3, 4)):
        start = 0
        for position, dims in zip(place, axis_dims(dim), strict=True):
            for p in range(dims // 2):
                pairs[0, n, :, start + p] *= np.exp(1j * position * theta ** (-2 * p / dims))
            start += dims // 2
    np.testing.assert_allclose(got[..., 0::2], pairs.real, atol=1e-5)
    np.testing.assert_allclose(got[..., 1::2], pairs.imag, atol=1e-5)


def test_rope_products_depend_on_the_offset_alone():
    grid = vm.VideoGrid(4, 4, 4)
    rng = np.random.default_rng(0)
    q, k = (jnp.broadcast_to(rng.normal(size=24), (1, 64, 1, 24)) for _ in range(2))
    angles = rope_angles(grid, 24)
    q, k = (np.asarray(apply_rope(v, angles))[0, :, 0].reshape(4, 4, 4, 24) for v in (q, k))
    first = q[1, 0, 2] @ k[2, 1, 0]
    np.testing.assert_allclose(q[2, 2, 3] @ k[3, 3, 1], first, rtol=1e-4)
    for other in (k[3, 1, 0], k[2, 2, 0], k[2, 1, 1]):
        assert abs(q[1, 0, 2] @ other - first) > 1e-3, "each axis must matter"


def test_rope_split_of_a_wan_head():
    assert axis_dims(128) == (44, 42, 42)


def test_an_untrained_model_is_the_best_linear_denoiser(forward):
    x, t, label, caption = inputs(SMALL)
    out = forward(VideoDiT(SMALL, rngs=nnx.Rngs(0)), x, t, label, caption)
    chex.assert_trees_all_close(out, wiener(x, t, SMALL.spectrum)[1], atol=1e-5)


@pytest.mark.parametrize("options", [{"scan_layers": True}, {"remat": True}])
def test_execution_options_change_nothing(options, awake):
    args = inputs(SMALL)

    def run(config):
        rebuild, params = split_params(awake(config))

        def loss(params):
            return jnp.sum(jnp.sin(rebuild(params)(*args)))

        return jax.jit(jax.value_and_grad(loss))(params)

    plain = run(SMALL)
    chex.assert_trees_all_close(
        run(dataclasses.replace(SMALL, **options)), plain, rtol=2e-4, atol=2e-4
    )
    assert all(jnp.abs(g).max() > 0 for g in plain[1].values()), "each parameter gets a gradient"


def test_remat_and_scan_are_really_there(awake):
    deep = dataclasses.replace(SMALL, depth=4)
    args = inputs(deep)

    def jaxpr(**options):
        return str(jax.make_jaxpr(awake(dataclasses.replace(deep, **options)))(*args))

    plain, scan, remat = jaxpr(), jaxpr(scan_layers=True), jaxpr(remat=True)
    assert len(scan) < 0.7 * len(plain)
    words = ("remat", "checkpoint")
    assert sum(map(remat.count, words)) >= deep.depth + sum(map(plain.count, words))


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A stand-in method that is easy to recognise."""

    factor: float

    def __call__(self, q, k, v, *, grid):
        assert q.shape == k.shape == v.shape
        assert q.shape[1] == grid.tokens
        return self.factor * v


def test_injected_attention_is_used(awake, forward):
    args = inputs(SMALL)
    model = awake(SMALL, attention=Scaled(1.0))
    one = forward(model, *args)
    assert jnp.abs(forward(model, *args, attention=Scaled(2.0)) - one).max() > 1e-3
    assert jnp.abs(forward(model, *args, attention=vm.Dense()) - one).max() > 1e-3
    chex.assert_trees_all_equal(forward(awake(SMALL), *args, attention=Scaled(1.0)), one)
    mixed = [Scaled(1.0), Scaled(2.0)]
    by_layer = forward(model, *args, attention=mixed)
    assert jnp.abs(by_layer - one).max() > 1e-3
    chex.assert_trees_all_equal(forward(awake(SMALL, attention=mixed), *args), by_layer)


@pytest.mark.parametrize("method", [vm.VMonarch(), vm.TiledMonarch(), vm.VMonarch(block=(2, 1, 1))])
def test_gradients_flow_through_every_method(method, awake):
    args = inputs(SMALL)
    rebuild, params = split_params(awake(SMALL, attention=method))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(rebuild(p)(*args)))))(params)
    chex.assert_tree_all_finite(gradient)
    assert all(jnp.abs(gradient[f"blocks.{n}.attention.qkv.kernel"]).max() > 0 for n in range(2))


def test_conditions_matter(awake, forward):
    model = awake(SMALL)
    x, t, label, caption = inputs(SMALL)
    base, *others, dropped, zero = forward_each(
        forward,
        model,
        (x, t, label, caption),
        (x, 1 - t, label, caption),
        (x, t, label + 1, caption),
        (x, t, label, -caption),
        (x, t, label),
        (x, t, label, 0 * caption),
    )
    for other in (*others, dropped):
        assert jnp.abs(other - base).max() > 1e-3
    chex.assert_trees_all_close(dropped, zero, atol=1e-5)


def forward_each(forward, model, *calls):
    return [forward(model, *call) for call in calls]


def test_bfloat16_stays_near_float32(awake, forward):
    args = inputs(SMALL)
    full = forward(awake(SMALL), *args)
    seen = []

    def method(q, k, v, *, grid):
        seen.append((q.dtype, k.dtype, v.dtype))
        return vm.Dense()(q, k, v, grid=grid)

    half = forward(awake(dataclasses.replace(SMALL, dtype="bfloat16")), *args, attention=method)
    assert set(seen) == {(jnp.bfloat16.dtype,) * 3}
    chex.assert_type(half, jnp.float32)
    error = jnp.linalg.norm(half - full) / jnp.linalg.norm(full)
    assert 0 < error < 0.05


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": True}])
def test_capture_returns_what_each_layer_attends_with(options, awake):
    model = awake(dataclasses.replace(SMALL, **options))
    args = inputs(SMALL)
    captured = jax.jit(lambda *a: capture_qkv(model, *a))(*args)
    assert len(captured) == SMALL.depth
    chex.assert_shape(jax.tree.leaves(captured), (2, SMALL.grid.tokens, 2, 12))
    expected = jax.jit(lambda *a: spied(awake(SMALL), *a))(*args)
    chex.assert_trees_all_close(captured, expected, atol=1e-4)


def spied(model, *args):
    seen = []

    def spy(q, k, v, *, grid):
        seen.append((q, k, v))
        return vm.Dense()(q, k, v, grid=grid)

    model(*args, attention=spy)
    return seen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": (1, 3, 2)}, "patch (1, 3, 2) divides"),
        ({"patch": (1, 2)}, "patch of 3"),
        ({"dim": 25}, "got dim 25 and heads 2"),
        ({"depth": 0}, "expected depth >= 1, got 0"),
        ({"dtype": "float16"}, "got 'float16'"),
        ({"caption_dim": -1}, "got 4 and -1"),
        ({"rope_theta": 0.0}, "expected rope_theta > 0, got 0.0"),
        ({"spectrum": {"time": -1.0}}, "expected positive numbers, got Spectrum("),
    ],
)
def test_configuration_errors(change, words):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(SMALL, **change)
    assert words in str(error.value)


def test_call_errors(awake):
    model = awake(SMALL)
    x, t, label, caption = inputs(SMALL)
    bad = [
        ((x[0], t, label), "expected x [batch, frames, height, width, 3]"),
        ((x[..., :2], t, label), "got (2, 2, 8, 6, 2)"),
        ((x, t[:1], label), "expected t and label of shape (2,)"),
        ((x, t, label, caption[:, :4]), "expected caption of shape (2, 5), got (2, 4)"),
        ((x[:, :, :7], t, label), "patch (1, 2, 2) divides, got (2, 7, 6)"),
        ((x, t, label, None, [vm.Dense()]), "each of 2 layers, got 1"),
    ]
    for args, words in bad:
        with pytest.raises(ValueError) as error:
            model(*args)
        assert words in str(error.value)
    with pytest.raises(ValueError, match="same attention in all scanned layers"):
        awake(dataclasses.replace(SMALL, scan_layers=True))(
            x, t, label, attention=[vm.Dense(), vm.VMonarch()]
        )
