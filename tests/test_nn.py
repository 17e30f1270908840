"""The Flax module: the formula by hand, any method, gradients, Linen."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vmonarch_jax as vm

GRID = vm.VideoGrid(3, 2, 4)


def layer_and_input(**keywords):
    layer = vm.nn.VideoSelfAttention(dim=16, heads=2, rngs=nnx.Rngs(0), **keywords)
    return layer, jax.random.normal(jax.random.key(1), (2, GRID.tokens, 16))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_dense_by_hand(qk_norm):
    layer, x = layer_and_input(attention=vm.Dense(), qk_norm=qk_norm)
    w, b = (np.asarray(p[...], np.float64) for p in (layer.qkv.kernel, layer.qkv.bias))
    q, k, v = np.split(np.asarray(x, np.float64) @ w + b, 3, axis=-1)
    heads = []
    for h in range(2):
        qh, kh, vh = (y[..., 8 * h : 8 * h + 8] for y in (q, k, v))
        if qk_norm:
            qh, kh = (y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) for y in (qh, kh))
        weights = np.exp(qh @ kh.swapaxes(1, 2) / np.sqrt(8))
        heads.append(weights / weights.sum(-1, keepdims=True) @ vh)
    out = np.concatenate(heads, -1) @ np.asarray(layer.out.kernel[...]) + layer.out.bias[...]
    chex.assert_trees_all_close(layer(x, grid=GRID), out, atol=2e-5)


def test_methods_and_rotation():
    layer, x = layer_and_input()
    monarch = layer(x, grid=GRID)
    dense = layer(x, grid=GRID, attention=vm.Dense())
    assert not np.allclose(monarch, dense, atol=1e-5)
    turned = layer(x, grid=GRID, rotate=lambda y: y[..., ::-1])
    # The same permutation of q's and k's channels leaves every logit alone.
    chex.assert_trees_all_close(turned, monarch, atol=2e-5)
    chex.assert_trees_all_close(layer(x, grid=(3, 2, 4)), monarch)
    assert not np.allclose(layer(x, grid=GRID, rotate=lambda y: 2 * y), monarch, atol=1e-4)


def test_gradients_reach_every_weight():
    layer, x = layer_and_input()
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x, grid=GRID) ** 2))(layer)
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.abs(leaf[...]).max() > 0, path


def test_linen():
    linen = nnx.bridge.to_linen(vm.nn.VideoSelfAttention, dim=16, heads=2)
    x = layer_and_input()[1]
    variables = linen.init(jax.random.key(0), x, grid=GRID)
    chex.assert_shape(linen.apply(variables, x, grid=GRID), x.shape)


def test_errors():
    with pytest.raises(ValueError, match=r"multiple of `heads` = 3, got 16"):
        vm.nn.VideoSelfAttention(dim=16, heads=3, rngs=nnx.Rngs(0))
    layer, x = layer_and_input()
    with pytest.raises(ValueError, match=r"frames\*height\*width = 12, got 24"):
        layer(x, grid=(3, 2, 2))
    with pytest.raises(
        ValueError, match=r"`x` must be \[batch, seq, dim = 16\], got shape \(2, 24, 6\)"
    ):
        layer(x[..., :6], grid=(4, 3, 2))
    with pytest.raises(
        ValueError, match=r"`x` must be \[batch, seq, dim = 16\], got shape \(24, 16\)"
    ):
        layer(x[0], grid=(4, 3, 2))
    with pytest.raises(ValueError, match="`rotate` must keep the shape"):
        layer(x, grid=(4, 3, 2), rotate=lambda y: y[:, :1])
    with pytest.raises(AttributeError, match="no attribute 'moe'"):
        vm.moe  # noqa: B018
