"""The oracle itself: it must know the cases whose answer is known without it."""

import numpy as np
import pytest
from oracle import dense, join, kl, monarch_gradients, monarch_grid, monarch_sequence

RNG = np.random.default_rng(7)


def qkv(n, dim=4, value_dim=5, batch=1, heads=2, scale=2.0):
    return [RNG.normal(size=(batch, n, heads, d)) * scale for d in (dim, dim, value_dim)]


CASES = [
    {"grid": (3, 2, 4), "block": (1, 2, 4), "steps": 2},
    {"grid": (3, 2, 4), "block": (2, 2, 3), "steps": 3},
    {"grid": (3, 4, 4), "block": (1, 1, 4), "tile": (1, 4, 4), "steps": 1},
    {"grid": (3, 3, 4), "block": (1, 1, 2), "tile": (2, 2, 4), "steps": 3, "floor": 0.0},
    {"grid": (4, 2, 2), "block": (4, 1, 1), "steps": 2, "recompute_frames": (0, 3)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_certificate_by_definition(case):
    query, key, value = qkv(int(np.prod(case["grid"])))
    exact = dense(query, key, value)
    part = monarch_grid(query, key, value, **case)
    np.testing.assert_allclose(part.matrix.sum(-1), 1, atol=1e-12)
    gap = kl(part.matrix, exact.matrix)
    np.testing.assert_allclose(exact.lse - part.lse, gap, atol=1e-12)
    assert gap.min() > -1e-12
    assert gap.max() > 0.1, "an easy case proves nothing"


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(
    ("grid", "block", "tile"),
    [
        ((1, 3, 4), (1, 3, 4), None),  # one frame
        ((5, 1, 1), (1, 1, 1), None),  # one pixel a frame
        ((2, 3, 2), (1, 1, 1), None),  # blocks of one token
        ((2, 3, 2), (1, 1, 1), (1, 1, 1)),  # tiles of one token
    ],
)
def test_exact_cases(grid, block, tile, steps):
    query, key, value = qkv(int(np.prod(grid)))
    part = monarch_grid(query, key, value, grid=grid, block=block, tile=tile, steps=steps)
    np.testing.assert_allclose(part.matrix, dense(query, key, value).matrix, atol=1e-12)


def test_blocks_draw_one_on_average():
    query, key, value = qkv(24)
    part = monarch_grid(query, key, value, grid=(3, 2, 4), block=(1, 2, 4), steps=4)
    for load in part.loads:  # [z h a f k j]
        np.testing.assert_allclose(load.mean(4), 1, atol=1e-12)
        assert load.min() < 0.1, "the floor should bind somewhere"


def test_padding_is_as_if_it_were_not_there():
    # A grid of 3 frames padded to 4 is a sequence whose last tokens are masked, whatever they hold.
    query, key, value = qkv(12)
    part = monarch_grid(query, key, value, grid=(3, 2, 2), block=(2, 2, 2), steps=2, floor=0.0)
    longer = [np.concatenate([a, 9 * np.ones_like(a[:, :4])], axis=1) for a in (query, key, value)]
    masked = monarch_sequence(*longer, block_size=8, steps=2, key_mask=np.arange(16) < 12)
    np.testing.assert_allclose(masked.out[:, :12], part.out, atol=1e-12)
    np.testing.assert_allclose(masked.lse[:, :12], part.lse, atol=1e-12)


def test_masked_everywhere():
    query, key, value = qkv(6)
    for part in (
        dense(query, key, value, key_mask=np.zeros(6, bool)),
        monarch_sequence(query, key, value, block_size=2, key_mask=np.zeros(6, bool)),
    ):
        assert not part.out.any()
        assert np.isneginf(part.lse).all()


def test_join_of_dense_parts():
    query, key, value = qkv(10)
    parts = [dense(query, key[:, s], value[:, s]) for s in (slice(0, 3), slice(3, 10))]
    joint = join(parts, [value[:, :3], value[:, 3:]])
    exact = dense(query, key, value)
    np.testing.assert_allclose(joint.matrix, exact.matrix, atol=1e-12)
    np.testing.assert_allclose(joint.lse, exact.lse, atol=1e-12)


def test_gradient_of_one_block_ignores_the_entropy_switch():
    # One step, one frame: the softmax over blocks is trivial, so cL only reaches the lse.
    arrays = qkv(4, heads=1)
    cotangents = RNG.normal(size=(1, 4, 1, 5)), np.zeros((1, 4, 1))

    def function(query, key, value, entropies=None):
        return monarch_grid(
            query, key, value, grid=(1, 2, 2), block=(1, 2, 2), steps=1, entropies=entropies
        )

    for one, other in zip(
        monarch_gradients(function, arrays, cotangents, entropy_gradient=True),
        monarch_gradients(function, arrays, cotangents, entropy_gradient=False),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-8)
