"""The token grid of a video, and how it is cut into tiles, blocks and positions.

Every reshape between tokens and grid in this library happens here.
"""

import dataclasses
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

Shape3 = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class VideoGrid:
    """`frames x height x width` tokens, flattened with the frame slowest and the width fastest.

    Args:
        frames: latent frames, T (for Wan: `(video frames - 1) / 4 + 1`).
        height: token rows of a frame, H (tokens after patchify, not pixels).
        width: token columns of a frame, W.

    Raises:
        ValueError: if a size is not a positive integer.

    Example:
        >>> VideoGrid(frames=21, height=30, width=52).tokens
        32760
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for field in ("frames", "height", "width"):
            value = positive_int(f"grid.{field}", getattr(self, field))
            object.__setattr__(self, field, value)

    @property
    def shape(self) -> Shape3:
        """`(frames, height, width)`."""
        return self.frames, self.height, self.width

    @property
    def tokens(self) -> int:
        """Number of tokens N = frames * height * width."""
        return self.frames * self.height * self.width

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame, height * width."""
        return self.height * self.width

    @classmethod
    def of(cls, grid: Any) -> "VideoGrid":
        """`grid` itself, or the grid of a `(frames, height, width)` tuple.

        Raises:
            ValueError: if it is neither.
        """
        if isinstance(grid, cls):
            return grid
        if isinstance(grid, (tuple, list)) and len(grid) == 3:
            return cls(*grid)
        raise ValueError(
            f"`grid` must be a VideoGrid or a (frames, height, width) tuple, got {grid!r}"
        )


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A grid cut into tiles, each tile into blocks, each block into positions.

    Tokens `[..., N, d]` become `[..., a, m, b, d]`: `a` tiles, `m` blocks in a tile, `b`
    positions in a block. Where a shape does not divide the grid, the grid is padded at the end
    of each axis, and `mask` says which positions hold a token.
    """

    grid: VideoGrid
    block: Shape3
    tile: Shape3

    @classmethod
    def of(cls, grid: VideoGrid, block: Any, tile: Any) -> "Tiling":
        """Check the shapes against the grid and build the tiling.

        Raises:
            ValueError: if a shape is no triple of positive integers, exceeds the grid (or the
                block its tile), or a tile that is smaller than the grid is no multiple of the
                block.
        """
        tile = _shape("tile", tile, grid.shape, "the grid")
        block = _shape("block", block, tile, "the tile" if tile != grid.shape else "the grid")
        for size, inner, whole in zip(tile, block, grid.shape, strict=True):
            if size < whole and size % inner:
                raise ValueError(
                    f"`tile` must be a multiple of `block` on each axis that it cuts, "
                    f"expected multiples of {block}, got {tile}"
                )
        # A tile as large as the grid grows to a whole number of blocks.
        tile = tuple(-(-size // inner) * inner for size, inner in zip(tile, block, strict=True))
        return cls(grid, block, tile)  # pyright: ignore[reportArgumentType]

    @property
    def padded(self) -> Shape3:
        """The grid's shape after padding to whole tiles."""
        pairs = zip(self.grid.shape, self.tile, strict=True)
        return tuple(-(-whole // size) * size for whole, size in pairs)  # pyright: ignore

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`(a, m, b)`: tiles, blocks in a tile, positions in a block."""
        tiles = np.prod(self.padded) // np.prod(self.tile)
        blocks = np.prod(self.tile) // np.prod(self.block)
        return int(tiles), int(blocks), int(np.prod(self.block))

    @property
    def scores(self) -> int:
        """Scores of an R step over all pairs of tiles: what a head's work is measured by."""
        tiles, blocks, positions = self.sizes
        return tiles * tiles * blocks * positions * positions

    @property
    def mask(self) -> Bool[np.ndarray, "a m b"] | None:
        """True where a position holds a token; `None` where all do."""
        if self.padded == self.grid.shape:
            return None
        return np.asarray(self.split(np.ones((self.grid.tokens, 1), bool), numpy=True))[..., 0]

    @property
    def _factors(self) -> tuple[list[int], list[int]]:
        """Sizes that the three grid axes split into, and the order that tiles want them in.

        Factors of size one are left out: a transpose of nothing but such axes looks like work to
        a compiler, and it copies whole arrays for it.
        """
        sizes = [
            size
            for whole, tile, block in zip(self.padded, self.tile, self.block, strict=True)
            for size in (whole // tile, tile // block, block)
        ]
        kept = [i for i in (0, 3, 6, 1, 4, 7, 2, 5, 8) if sizes[i] > 1]
        present = sorted(kept)
        return [sizes[i] for i in present], [present.index(i) for i in kept]

    def split(self, x: Any, numpy: bool = False) -> Any:
        """Tokens to tiles, blocks and positions: `[..., N, d] -> [..., a, m, b, d]`."""
        lead = x.shape[:-2]
        x = x.reshape(*lead, *self.grid.shape, x.shape[-1])
        if self.padded != self.grid.shape:
            extra = [(0, p - g) for p, g in zip(self.padded, self.grid.shape, strict=True)]
            pad = np.pad if numpy else jnp.pad
            x = pad(x, [(0, 0)] * len(lead) + extra + [(0, 0)])
        sizes, order = self._factors
        x = x.reshape(*lead, *sizes, x.shape[-1])
        x = x.transpose(*self._axes(len(lead), order))
        return x.reshape(*lead, *self.sizes, x.shape[-1])

    def join(self, x: Shaped[Array, "*lead a m b d"]) -> Shaped[Array, "*lead n d"]:
        """The inverse of `split`; what padding held is dropped."""
        sizes, order = self._factors
        lead = x.shape[:-4]
        x = x.reshape(*lead, *(sizes[i] for i in order), x.shape[-1])
        inverse = sorted(range(len(order)), key=order.__getitem__)
        x = x.transpose(*self._axes(len(lead), inverse))
        if self.padded == self.grid.shape:
            return x.reshape(*lead, self.grid.tokens, x.shape[-1])
        x = x.reshape(*lead, *self.padded, x.shape[-1])
        frames, height, width = self.grid.shape
        x = x[..., :frames, :height, :width, :]
        return x.reshape(*lead, self.grid.tokens, x.shape[-1])

    @staticmethod
    def _axes(lead: int, order: list[int]) -> list[int]:
        return [*range(lead), *(lead + i for i in order), lead + len(order)]


def positive_int(name: str, value: Any) -> int:
    """`value` as an int, if it is a positive integer.

    Raises:
        ValueError: if it is not.
    """
    try:
        if not isinstance(value, bool) and operator.index(value) > 0:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"`{name}` must be a positive integer, got {value!r}")


def _shape(name: str, shape: Any, limit: Shape3, whole: str) -> Shape3:
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise ValueError(f"`{name}` must be a (frames, height, width) tuple, got {shape!r}")
    shape = tuple(positive_int(f"{name}[{i}]", size) for i, size in enumerate(shape))
    if any(size > most for size, most in zip(shape, limit, strict=True)):
        raise ValueError(f"`{name}` must fit {whole}, expected at most {limit}, got {shape}")
    return shape  # pyright: ignore[reportReturnType]
