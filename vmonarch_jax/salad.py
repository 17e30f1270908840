"""The sparse attention of SALAD as method values: a sliding window, or the best blocks."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks
from .block_sparse import Blocks, block_sparse_attention, top_blocks
from .dispatch import Implementation
from .grid import Shape3, VideoGrid, positive_int
from .parts import Part
from .windows import TileOrder, nearest_map, pooled_scores, tile_of, window_map

SPARSE = ("window", "top_k")


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """Exact attention on the key blocks in a window of space and time around each query block.

        out[n] = sum_s softmax_s(scale q[n] . k[s]) v[s],  s in the window of n's block

    Tokens are put in an order in which blocks of `block_size` are tiles of the video, go through
    `vm.block_sparse_attention`, and are put back. Every block but the very last one is full, on any
    grid: where the tile does not divide it, blocks bend around the edge instead of being padded
    (`windows.TileOrder`). The window is either given, a box moved inside at the border
    (`windows.window_map`), or follows from `sparsity`, and then every query block has the same
    number of key blocks, the nearest (`windows.nearest_map`).

    Matmul FLOPs a head: `2 block_size^2 (d + e)` for each kept pair of blocks. The result is a
    part, with a log-sum-exp that merges and certifies.

    Args:
        window: `(frames, height, width)`, in tokens; `None`: as large as `sparsity` says.
        tile: `(frames, height, width)` of a block, `block_size` tokens; `None`: the most cubic.
        sparsity: share of the key blocks that a query block leaves out, in `[0, 1)`; a row keeps
            `(1 - sparsity) blocks`, rounded, and at least one. A given `window` overrides it.
        block_size: tokens of a block.
        scale: of the logits; `None`: `head_dim**-0.5`.

    Raises:
        ValueError: if a field is wrong.

    Example:
        >>> near = vm.SlidingWindow(window=(12, 12, 20))
        >>> out = near(query, key, value, grid=vm.VideoGrid(21, 30, 52))

    Reference: Sliding Tile Attention (arXiv 2502.04507), for tiles that divide the grid.
    """

    window: Shape3 | None = None
    tile: Shape3 | None = None
    sparsity: float = 0.9
    block_size: int = 64
    scale: float | None = None

    def __post_init__(self) -> None:
        size = positive_int("block_size", self.block_size)
        for name in ("window", "tile"):
            shape = getattr(self, name)
            if shape is not None:
                object.__setattr__(self, name, _shape3(name, shape))
        if self.tile is not None and math.prod(self.tile) != size:
            raise ValueError(
                f"`tile` must hold block_size = {size} tokens, got {self.tile}, "
                f"which holds {math.prod(self.tile)}"
            )
        if not 0 <= checks.finite("sparsity", self.sparsity) < 1:
            raise ValueError(f"`sparsity` must lie in [0, 1), got {self.sparsity!r}")
        if self.scale is not None:
            checks.finite("scale", self.scale)

    def order(self, grid: VideoGrid) -> TileOrder:
        """The order of the tokens of a grid in which blocks are tiles."""
        return TileOrder(grid, self.tile or tile_of(self.block_size))

    def keep(self, grid: VideoGrid) -> int:
        """Key blocks that a query block keeps where `sparsity` decides."""
        blocks = self.order(grid).blocks
        return min(blocks, max(1, math.floor((1 - self.sparsity) * blocks + 0.5)))

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        grid: VideoGrid | Shape3,
        implementation: Implementation = None,
        return_lse: bool = False,
        block_sizes: Any = None,
    ) -> Any:
        """Attention of `[batch, seq, heads, head_dim]` arrays on `grid`, or the part.

        Raises:
            ValueError: if shapes, dtypes or options are wrong.
        """
        query, key, value = checks.attention_inputs(query, key, value, same_length=True)
        order = self.order(checks.grid_of(grid, query.shape[1]))
        q, k, v = (order.reorder(x) for x in (query, key, value))
        out, lse = block_sparse_attention(
            q, k, v, self.blocks(q, k, order), self.block_size,
            scale=self.scale, implementation=implementation, return_lse=True,
            block_sizes=block_sizes,
        )  # fmt: skip
        out = order.restore(out)
        return Part(out, order.restore(lse)) if return_lse else out

    def blocks(self, query: Any, key: Any, order: TileOrder) -> Blocks:
        """The key blocks of each query block, for arrays in the order of the blocks."""
        keep = self._map(order)
        counts = keep.sum(-1)
        indices = np.argsort(~keep, axis=-1, kind="stable")[:, : counts.max()]
        lead = query.shape[0], query.shape[2]
        wide = (np.broadcast_to(x, (*lead, *x.shape)) for x in (indices, counts))
        return Blocks(*(jnp.asarray(x, jnp.int32) for x in wide))

    def _map(self, order: TileOrder) -> np.ndarray:
        if self.window is not None:
            return window_map(order, self.window)
        return nearest_map(order, self.keep(order.grid))

    def matmul_flops(
        self,
        grid: VideoGrid,
        *,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        step: int | None = None,
    ) -> int:
        """Matmul FLOPs of one forward pass over all heads; every kept block counted, as a full one.

        `step` is taken for the sake of methods that differ from step to step; this one does not.
        """
        size = self.block_size
        value_dim = head_dim if value_dim is None else value_dim
        return 2 * self.kept(grid) * size * size * (head_dim + value_dim) * heads

    def kept(self, grid: VideoGrid) -> int:
        """Kept pairs of blocks of a head."""
        return int(self._map(self.order(grid)).sum())

    def notes(self, grid: VideoGrid, **_: Any) -> list[str]:
        """What `vm.explain` says about it."""
        order = self.order(grid)
        tile, blocks = "x".join(map(str, order.tile)), order.blocks
        kept = self.kept(grid) / blocks
        sizes = f"{blocks} blocks of {self.block_size} tokens (tiles of {tile})"
        found = [f"{sizes}, {kept:.1f} kept a row: {1 - kept / blocks:.1%} sparse"]
        if any(n % size for n, size in zip(grid.shape, order.tile, strict=True)):
            found.append("the tile does not divide the grid: blocks bend around its edges")
        return found


@dataclasses.dataclass(frozen=True)
class Salad(SlidingWindow):
    """The sparse branch of SALAD: a sliding window, or for each query block its best key blocks.

    With `sparse="window"` it is `vm.SlidingWindow`. With `sparse="top_k"` each query block keeps,
    head by head, the key blocks of the largest product of the mean query with the mean key,
    `(1 - sparsity) blocks` of them; blocks are the same tiles. No gradient flows through the
    choice. The linear branch has parameters, and lives in `vm.nn.SaladAttention`, which takes this
    value, or any other, as its sparse branch.

    Args:
        window: as `vm.SlidingWindow`; for `sparse="window"` only.
        tile: as `vm.SlidingWindow`; `(1, 1, block_size)` makes blocks runs of neighbouring columns.
        sparsity: as `vm.SlidingWindow`.
        block_size: tokens of a block.
        scale: of the logits; `None`: `head_dim**-0.5`.
        sparse: "window" or "top_k".

    Raises:
        ValueError: if a field is wrong.

    Example:
        >>> out = vm.Salad(sparse="top_k")(query, key, value, grid=vm.VideoGrid(21, 30, 52))

    Reference: SALAD (arXiv 2601.16515). The paper leaves the window's proportions and the pooling
    of blocks open: here the window has those of the grid, and blocks are pooled by their mean.
    """

    sparse: str = "window"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse not in SPARSE:
            raise ValueError(f"`sparse` must be one of {SPARSE}, got {self.sparse!r}")
        if self.sparse == "top_k" and self.window is not None:
            raise ValueError(f"`window` must be None with sparse='top_k', got {self.window}")

    def blocks(self, query: Any, key: Any, order: TileOrder) -> Blocks:
        """The key blocks of each query block, for arrays in the order of the blocks."""
        if self.sparse == "window":
            return super().blocks(query, key, order)
        query, key = jax.lax.stop_gradient((query, key))
        scores = pooled_scores(query, key, self.block_size)
        if self.scale is not None and self.scale < 0:
            scores = -scores
        return Blocks(*top_blocks(scores, self.keep(order.grid)))

    def kept(self, grid: VideoGrid) -> int:
        """Kept pairs of blocks of a head."""
        if self.sparse == "window":
            return super().kept(grid)
        return self.order(grid).blocks * self.keep(grid)

    def matmul_flops(
        self,
        grid: VideoGrid,
        *,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        step: int | None = None,
    ) -> int:
        """As `vm.SlidingWindow`; with top-k also the products of mean queries and mean keys."""
        sizes = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim}
        count = super().matmul_flops(grid, **sizes, step=step)
        if self.sparse == "window":
            return count
        return count + 2 * self.order(grid).blocks ** 2 * head_dim * heads


def _shape3(name: str, shape: Any) -> Shape3:
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise ValueError(f"`{name}` must be a (frames, height, width) tuple, got {shape!r}")
    frames, height, width = (positive_int(f"{name}[{i}]", n) for i, n in enumerate(shape))
    return frames, height, width
