"""Three-dimensional windows of attention as maps over blocks of neighbouring tokens.

A block-sparse kernel knows runs of tokens and nothing of space and time. So tokens are put in an
order in which a run of them is a tile of the video, and put back afterwards.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from .grid import Shape3, VideoGrid


def tile_of(block_size: int) -> Shape3:
    """The most cubic `(frames, height, width)` of `block_size` tokens, the width the longest.

    Example:
        >>> tile_of(64), tile_of(128)
        ((4, 4, 4), (4, 4, 8))
    """
    shapes = [
        (t, h, block_size // (t * h))
        for t in range(1, round(block_size ** (1 / 3)) + 1)
        if block_size % t == 0
        for h in range(t, block_size + 1)
        if block_size // t % h == 0 and block_size // (t * h) >= h
    ]
    return min(shapes, key=lambda shape: shape[2] - shape[0])


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """The tokens of a grid in an order in which blocks of them are tiles of space and time.

    The video is cut into strips of `tile[0]` frames by `tile[1]` rows, over the whole width. A
    strip is walked column by column (`tile[0] * tile[1]` tokens each), and the strips one after
    the other, there and back again, as an ox ploughs. Blocks are runs of `frames * height * width`
    tokens of the tile along that walk.

    So where the tile divides the grid, the blocks are its tiles exactly. Where it does not, the
    last strips are thinner, and blocks in them longer, and a block that ends a strip goes on in
    the next one just beside it. Every block is full but the very last one: no token is padding,
    whatever the grid, and none is in two blocks.

    Args:
        grid: of the tokens.
        tile: `(frames, height, width)`, in tokens; it may exceed the grid.
    """

    grid: VideoGrid
    tile: Shape3

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return int(np.prod(self.tile))

    @property
    def blocks(self) -> int:
        """Blocks of the grid; the last one may be short."""
        return -(-self.grid.tokens // self.block)

    def reorder(self, x: Shaped[Array, "batch seq *rest"]) -> Shaped[Array, "batch seq *rest"]:
        """Tokens in the order of the grid, put in this order."""
        order, inverse = _orders(self)
        return _permute(x, _Order(order), _Order(inverse))

    def restore(self, x: Shaped[Array, "batch seq *rest"]) -> Shaped[Array, "batch seq *rest"]:
        """The inverse of `reorder`."""
        order, inverse = _orders(self)
        return _permute(x, _Order(inverse), _Order(order))

    @property
    def tokens(self) -> Int[np.ndarray, " seq"]:
        """The index in the grid of each token in this order."""
        return _orders(self)[0]

    @property
    def centres(self) -> Float[np.ndarray, "blocks 3"]:
        """The mean place of each block's tokens; a token's own is its middle, 0.5 at the first."""
        places = np.stack(np.unravel_index(self.tokens, self.grid.shape), axis=-1) + 0.5
        starts = np.arange(0, self.grid.tokens, self.block)
        sizes = np.minimum(self.block, self.grid.tokens - starts)
        return np.add.reduceat(places, starts, axis=0) / sizes[:, None]


class _Order:
    """A permutation as a static argument: equal, and hashed, by identity of a cached array."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Order) and self.order is other.order

    def __hash__(self) -> int:
        return id(self.order)


# With a gradient of its own: that of a gather is a scatter with additions, which is slow, and here
# each token goes to one place only.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _permute(x: Array, order: _Order, inverse: _Order) -> Array:
    return jnp.take(x, order.order, axis=1, unique_indices=True, mode="clip")


def _permute_forward(x: Array, order: _Order, inverse: _Order) -> tuple[Array, None]:
    return _permute(x, order, inverse), None


def _permute_backward(order: _Order, inverse: _Order, _: None, gradient: Array) -> tuple[Array]:
    return (_permute(gradient, inverse, order),)


_permute.defvjp(_permute_forward, _permute_backward)


@functools.lru_cache(maxsize=64)
def _orders(order: TileOrder) -> tuple[np.ndarray, np.ndarray]:
    """The walk, and its inverse."""
    index = np.arange(order.grid.tokens, dtype=np.int32).reshape(order.grid.shape)
    deep, high, _ = order.tile
    strips, forward = [], True
    for slab, first in enumerate(range(0, index.shape[0], deep)):
        rows = range(0, index.shape[1], high)
        for row in rows if slab % 2 == 0 else reversed(rows):
            strip = index[first : first + deep, row : row + high].transpose(2, 0, 1)
            strips.append((strip if forward else strip[::-1]).reshape(-1))
            forward = not forward
    walk = np.concatenate(strips)
    inverse = np.empty_like(walk)
    inverse[walk] = np.arange(len(walk), dtype=np.int32)
    return walk, inverse


def window_map(order: TileOrder, window: Shape3) -> Bool[np.ndarray, "blocks blocks"]:
    """Which key blocks lie in the window of each query block.

    The window is a box of `window` tokens around the centre of the query block, moved inside where
    it would stick out of the grid. A key block is kept if its centre lies in it (an upper face
    does not count). Where the tile divides grid and window, that is exactly
    `prod(window / tile)` tiles for every query.

    Args:
        order: of the tokens.
        window: `(frames, height, width)`, in tokens; sizes beyond the grid mean all of it.

    Reference: Sliding Tile Attention (arXiv 2502.04507), whose windows are moved inside likewise.
    """
    return _window(order, tuple(window))


def nearest_map(order: TileOrder, keep: int) -> Bool[np.ndarray, "blocks blocks"]:
    """The `keep` key blocks nearest to each query block.

    Near is measured as a box grows that has the proportions of the grid: the largest, over the
    axes, of the distance of the centres over the size of the grid; among equals the smallest sum
    over the axes, then the lowest index. So near the border the window reaches further inwards,
    and every query has as many keys.

    Args:
        order: of the tokens.
        keep: how many, in `1..blocks`.
    """
    return _nearest(order, keep)


@functools.lru_cache(maxsize=64)
def _window(order: TileOrder, window: Shape3) -> np.ndarray:
    centres = order.centres
    inside = np.ones((len(centres), len(centres)), bool)
    for axis, (whole, size) in enumerate(zip(order.grid.shape, window, strict=True)):
        place, half = centres[:, axis], min(size, whole) / 2
        middle = np.clip(place, half, whole - half)[:, None]
        inside &= (middle - half <= place) & (place < middle + half)
    return inside


@functools.lru_cache(maxsize=64)
def _nearest(order: TileOrder, keep: int) -> np.ndarray:
    places = order.centres / order.grid.shape
    inside = np.zeros((len(places), len(places)), bool)
    for row, place in zip(inside, places, strict=True):
        apart = np.abs(places - place)
        # Rounded, so that equal distances are equal whatever the order of the arithmetic.
        far, total = apart.max(-1).round(9), apart.sum(-1).round(9)
        row[np.lexsort((total, far))[:keep]] = True
    return inside


def pooled_scores(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    block: int,
) -> Float[Array, "batch heads blocks blocks"]:
    """The product of the mean query of each block with the mean key of each, in float32.

    Tokens must be in the order of the blocks; the last one may be short.
    """

    def means(x: Array) -> Array:
        seq = x.shape[1]
        starts = range(0, seq, block)
        sizes = jnp.array([min(block, seq - start) for start in starts], jnp.float32)
        more = len(starts) * block - seq
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, more), (0, 0), (0, 0)))
        sums = x.reshape(x.shape[0], -1, block, *x.shape[2:]).sum(2)
        return sums / sizes[:, None, None]

    return jnp.einsum(
        "zphd,zchd->zhpc", means(query), means(key), precision=jax.lax.Precision.HIGHEST
    )
