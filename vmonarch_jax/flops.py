"""Exact matmul counts of attention methods and of whole video transformers.

Every count is an integer number of floating-point operations of one forward pass, a multiply-add
being two. Only matrix products count: softmax, norms and RoPE are left out, as in the papers.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from . import checks
from .grid import Tiling, VideoGrid, positive_int
from .methods import Dense, TiledMonarch, VMonarch


@dataclasses.dataclass(frozen=True)
class TransformerShape:
    """The sizes of a video transformer that its matmul count depends on.

    Args:
        dim: width of a token, d_model.
        heads: attention heads; the head dimension is `dim / heads`.
        layers: transformer blocks.
        ffn: width of the feed-forward layer.
        text_tokens: tokens that each block's cross-attention reads.

    Raises:
        ValueError: if a size is no positive integer, or `heads` does not divide `dim`.
    """

    dim: int
    heads: int
    layers: int
    ffn: int
    text_tokens: int = 512

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            positive_int(field.name, getattr(self, field.name))
        if self.dim % self.heads:
            raise ValueError(f"`dim` must be a multiple of `heads` = {self.heads}, got {self.dim}")


WAN_1_3B = TransformerShape(dim=1536, heads=12, layers=30, ffn=8960)
WAN_5B = TransformerShape(dim=3072, heads=24, layers=30, ffn=14336)
WAN_14B = TransformerShape(dim=5120, heads=40, layers=40, ffn=13824)


@runtime_checkable
class _Counted(Protocol):
    """A method value that counts its own matmuls."""

    def matmul_flops(
        self, grid: VideoGrid, *, heads: int, head_dim: int, value_dim: int, step: int | None
    ) -> int:
        """FLOPs of one call on a denoising step, over all heads; `None`: an ordinary step."""
        ...


def attention(
    method: Any,
    grid: Any,
    *,
    heads: int = 12,
    head_dim: int = 128,
    value_dim: int | None = None,
    step: int | None = None,
) -> int:
    """Matmul FLOPs of one forward self-attention of `method` on `grid`, over all heads.

        dense      2 N^2 (d + e)
        Monarch    an R step 4 P d and an L step 4 S d for each iteration, and at the last one
                   2 (d + e) instead of 4 d in the L step and 2 P e for Y, where
                   P = m b^2 a^2 pairs of positions in the same key block (a tiles, m blocks of b)
                   and S = b (m a)^2 pairs of blocks
        exact rows 2 n N (d + e) for the n tokens of recomputed frames

    With one tile, 2 iterations and e = d this is `(10 T b^2 + 8 b T^2) d` a head, the papers'
    formula. Padded positions count as real ones: the work is done.

    Args:
        method: a method value.
        grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.
        heads: number of heads.
        head_dim: d, of query and key.
        value_dim: e; `None`: `head_dim`.
        step: of denoising, from 0, for methods that do not do the same on every step; `None`: an
            ordinary one, without warm-up, search or refresh.

    Returns:
        The count, an int; for one entry of a batch.

    Raises:
        ValueError: if an option is wrong.
        TypeError: if `method` is no method value that this counts.

    Example:
        >>> grid = vm.VideoGrid(21, 30, 52)
        >>> vm.flops.attention(vm.Dense(), grid) / vm.flops.attention(vm.VMonarch(), grid)
    """
    grid = VideoGrid.of(grid)
    heads, d = positive_int("heads", heads), positive_int("head_dim", head_dim)
    e = d if value_dim is None else positive_int("value_dim", value_dim)
    n = grid.tokens
    if isinstance(method, Dense):
        return 2 * n * n * (d + e) * heads
    if isinstance(method, _Counted) and not isinstance(method, type):
        return method.matmul_flops(grid, heads=heads, head_dim=d, value_dim=e, step=step)
    if not isinstance(method, VMonarch):
        raise TypeError(f"`method` must be a method value, for example vm.VMonarch(), got {method}")
    exact = len(checks.frames_of(method.recompute_frames, grid)) * grid.frame_tokens
    if exact == n:
        return 2 * n * n * (d + e) * heads
    a, m, b = tiling_of(method, grid).sizes
    in_block = a * a * m * b * b
    between_blocks = b * (m * a) ** 2
    steps = method.steps * 4 * d * (in_block + between_blocks)
    last = 2 * in_block * e + 2 * between_blocks * (e - d)
    return (steps + last + 2 * exact * n * (d + e)) * heads


def sampling(method: Any, grid: Any, steps: int, **sizes: Any) -> int:
    """Matmul FLOPs of one layer's attention over all denoising steps of a sampler.

    Args:
        method: a method value.
        grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.
        steps: denoising steps, one call each; guidance makes two.
        **sizes: `heads`, `head_dim` and `value_dim` of `vm.flops.attention`.

    Raises:
        ValueError: if an option is wrong.

    Example:
        >>> vm.flops.sampling(vm.AdaSpa(), grid, 50) / vm.flops.sampling(vm.Dense(), grid, 50)
    """
    steps = positive_int("steps", steps)
    return sum(attention(method, grid, step=step, **sizes) for step in range(steps))


def linear_branch(
    grid: Any, *, heads: int = 12, head_dim: int = 128, value_dim: int | None = None
) -> int:
    """Matmul FLOPs of SALAD's linear branch (`vm.nn.SaladAttention`) in one forward pass.

        states and their reading 4 N d e, normalisers 2 N d    for each head
        projection 2 N (h e)^2, gate 2 h e                     for all h heads

    It comes on top of `attention` of the sparse branch. The projection is most of it.

    Args:
        grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.
        heads: number of heads.
        head_dim: d, of query and key.
        value_dim: e; `None`: `head_dim`.

    Returns:
        The count, an int; for one entry of a batch.

    Raises:
        ValueError: if an option is wrong.

    Example:
        >>> grid = vm.VideoGrid(21, 30, 52)
        >>> vm.flops.attention(vm.Salad(), grid) + vm.flops.linear_branch(grid)
        837575224320
    """
    n, heads, d = VideoGrid.of(grid).tokens, positive_int("heads", heads), head_dim
    d = positive_int("head_dim", d)
    e = d if value_dim is None else positive_int("value_dim", value_dim)
    return heads * (4 * n * d * e + 2 * n * d) + 2 * n * (heads * e) ** 2 + 2 * heads * e


def tiling_of(method: VMonarch, grid: VideoGrid) -> Tiling:
    """The tiling that a Monarch method value means on a grid.

    Raises:
        ValueError: if its shapes do not fit the grid.
    """
    tiled = isinstance(method, TiledMonarch)
    tile = method.tile or ((1, *grid.shape[1:]) if tiled else grid.shape)
    block = method.block or ((1, 1, tile[-1]) if tiled else (1, *tile[1:]))
    return Tiling.of(grid, block, tile)


def transformer(shape: TransformerShape, method: Any, grid: Any) -> int:
    """Matmul FLOPs of one forward pass of a whole video transformer.

    A block holds self-attention (q, k, v and output projections and `attention`),
    cross-attention to `text_tokens` (q and output on video tokens, k and v on text, scores and
    averages) and a feed-forward layer of two products. Embeddings and modulation, well below a
    thousandth, are left out.

    Args:
        shape: the sizes, for example `vm.flops.WAN_14B`.
        method: a method value.
        grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.

    Raises:
        ValueError: if an option is wrong.

    Example:
        >>> vm.flops.transformer(vm.flops.WAN_14B, vm.Dense(), (24, 44, 80)) / 1e12
        7903.8...

    Reference: the FLOPs columns of VMonarch (arXiv 2601.22275), where attention leaves out the
    recomputed frame: `vm.VMonarch(recompute_frames=0)`.
    """
    n = VideoGrid.of(grid).tokens
    dim, text = shape.dim, shape.text_tokens
    own = attention(method, grid, heads=shape.heads, head_dim=dim // shape.heads)
    projections = 8 * n * dim * dim
    cross = 4 * n * dim * dim + 4 * text * dim * dim + 4 * n * text * dim
    feed_forward = 4 * n * dim * shape.ffn
    return shape.layers * (own + projections + cross + feed_forward)
