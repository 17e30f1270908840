"""Monarch attention on the token grid of a video: VMonarch and tiled Monarch (MonarchRT)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from . import checks
from .dispatch import Backend, Implementation, dispatch
from .grid import Shape3, Tiling, VideoGrid
from .heads import by_heads, dense_part, monarch_part
from .parts import Part, with_rows


def vmonarch_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads value_dim"],
    *,
    grid: VideoGrid | Shape3,
    steps: int = 2,
    block: Shape3 | None = None,
    tile: Shape3 | None = None,
    recompute_frames: int | tuple[int, ...] = 1,
    c_r_floor: float = 0.1,
    entropy_gradient: bool = False,
    scale: float | None = None,
    implementation: Implementation = None,
    return_lse: bool = False,
    key_mask: Bool[Array, "batch seq"] | None = None,
    block_sizes: Any = None,
) -> Float[Array, "batch seq heads value_dim"] | Part:
    """VMonarch: attention by a spatio-temporal Monarch matrix, found by alternating updates.

        A[(l,j),(k,i)] = L[j,l,k] R[k,j,i]      l, k: frames;  j, i: pixels of a frame

    `L` holds, for each pixel, attention between frames; `R`, for each frame, attention between
    pixels. `steps` alternating updates fit them to `softmax(scale Q K^T)`; `monarch_tile` has
    the formulas. The rows of `recompute_frames` are computed densely instead. Matmul FLOPs a
    head: `(10 T b^2 + 8 b T^2) d` for 2 steps and b pixels a frame, against `4 (T b)^2 d`.

    Args:
        query: `[batch, seq, heads, head_dim]`, tokens in the order of `grid`, after RoPE.
        key: as `query`.
        value: `[batch, seq, heads, value_dim]`.
        grid: a `vm.VideoGrid` (or `(frames, height, width)`), in tokens.
        steps: iterations, each an R step and an L step.
        block: `(frames, height, width)` of a block, in tokens; `None`: one frame (of a tile).
            Shapes that do not divide the grid are padded and masked inside.
        tile: `(frames, height, width)` of a tile; each pair of tiles has a Monarch matrix of its
            own, with one softmax over all. `None`: one tile, the whole grid.
        recompute_frames: how many first frames, or which frames, get exact rows.
        c_r_floor: least attention mass by which a block's mean query is divided (mean mass: 1
            with one tile).
        entropy_gradient: whether gradients flow through the entropy `cL`.
        scale: of the logits; `None`: `head_dim**-0.5`.
        implementation: "reference", "xla", a sequence of names, or `None` for the best that
            works here.
        return_lse: also return the log-sum-exp, which certifies the error (`vm.attention_gap`).
        key_mask: `[batch, seq]`, True where a key is attended to; the masked keys can be
            attended to exactly and merged (`vm.merge_attention`).
        block_sizes: a `vm.BlockSizes`; changes the speed only.

    Returns:
        `out`, `[batch, seq, heads, value_dim]`, or the part `(out, lse)` with `lse`
        `[batch, seq, heads]` in float32.

    Raises:
        ValueError: if shapes, dtypes or options are wrong.
        NotImplementedError: if no named implementation can do the call.

    Example:
        >>> grid = vm.VideoGrid(frames=21, height=30, width=52)
        >>> out = vm.vmonarch_attention(query, key, value, grid=grid)

    Reference: VMonarch (arXiv 2601.22275), section 3. The entropy comes from the identity
    `cL = qt . aL - lse` instead of the paper's online accumulator, and padded, tiled and
    other-than-frame blocks are this library's.
    """
    query, key, value = checks.attention_inputs(query, key, value, same_length=True)
    grid = checks.grid_of(grid, query.shape[1])
    tile = grid.shape if tile is None else tile
    tiling = Tiling.of(grid, (1, *tile[1:]) if block is None else block, tile)
    exact_frames = checks.frames_of(recompute_frames, grid)
    key_mask = checks.mask_of("key_mask", key_mask, *key.shape[:2])
    block_sizes = checks.block_sizes_of(block_sizes)
    scale = checks.scale_of(scale, query.shape[-1])
    settings = {
        "steps": checks.steps_of(steps),
        "c_r_floor": checks.finite("c_r_floor", c_r_floor, least=0),
        "entropy_gradient": bool(entropy_gradient),
        "scale": scale,
        "block_sizes": block_sizes,
    }
    exactly = {"scale": scale, "block_sizes": block_sizes}

    def part(backend: Backend) -> Part:
        def heads(backend: Backend, q: Any, k: Any, v: Any, keys: Any) -> Part:
            if len(exact_frames) == grid.frames:
                return dense_part(backend, q, k, v, keys, **exactly)
            masks = _masks(tiling, keys, q.shape[0])
            cut = [tiling.split(x) for x in (q, k, v)]
            part = monarch_part(backend, cut[0], cut[1], cut[2], *masks, **settings)
            part = Part(tiling.join(part.out), tiling.join(part.lse[..., None])[..., 0])
            if not exact_frames:
                return part
            rows = token_rows(exact_frames, grid)
            exact = dense_part(backend, q[:, :, rows], k, v, keys, **exactly)
            return with_rows(part, rows, exact)

        scores = tiling.scores + len(exact_frames) * grid.frame_tokens * grid.tokens
        on = {"backend": backend, "block_sizes": block_sizes}
        return by_heads(heads, (query, key, value), key_mask, scores=scores, **on)

    out, lse = dispatch(implementation, part)
    return Part(out, lse) if return_lse else out


def tiled_monarch_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads value_dim"],
    *,
    grid: VideoGrid | Shape3,
    steps: int = 1,
    block: Shape3 | None = None,
    tile: Shape3 | None = None,
    recompute_frames: int | tuple[int, ...] = 0,
    c_r_floor: float = 0.1,
    entropy_gradient: bool = False,
    scale: float | None = None,
    implementation: Implementation = None,
    return_lse: bool = False,
    key_mask: Bool[Array, "batch seq"] | None = None,
    block_sizes: Any = None,
) -> Float[Array, "batch seq heads value_dim"] | Part:
    """Tiled Monarch (MonarchRT): a Monarch matrix for each pair of tiles, one joint softmax.

        A[(a,l,j),(f,k,i)] = L[a,j,l,(f,k)] R[a,f,k,j,i]      a, f: query and key tiles

    By default a tile is a frame and a block a row of it, with one iteration. It is
    `vm.vmonarch_attention` with these defaults; arguments, results and errors are the same.

    Example:
        >>> out = vm.tiled_monarch_attention(query, key, value, grid=(21, 30, 52))

    Reference: MonarchRT (arXiv 2602.12271). There the gradient flows through the entropy:
    `entropy_gradient=True`.
    """
    shape = VideoGrid.of(grid).shape
    tile = (1, *shape[1:]) if tile is None else tile
    if block is None:
        block = (1, 1, tile[-1])
    return vmonarch_attention(
        query, key, value,
        grid=grid, steps=steps, block=block, tile=tile, recompute_frames=recompute_frames,
        c_r_floor=c_r_floor, entropy_gradient=entropy_gradient, scale=scale,
        implementation=implementation, return_lse=return_lse, key_mask=key_mask,
        block_sizes=block_sizes,
    )  # fmt: skip


def _masks(tiling: Tiling, key_mask: Any, batch: int) -> tuple[Any, Any]:
    """Which queries and which keys are real, `[z, a, m, b]`; `None` where all are."""
    padding = tiling.mask
    queries = None
    if padding is not None:
        queries = jnp.broadcast_to(jnp.asarray(padding), (batch, *padding.shape))
    if key_mask is None:
        return queries, queries
    # Padding splits to False, so this covers it too.
    return queries, tiling.split(key_mask[..., None])[..., 0]


def token_rows(frames: tuple[int, ...], grid: VideoGrid) -> Any:
    """Token indices of whole frames; a slice where they are the first ones, for speed."""
    if frames == tuple(range(len(frames))):
        return slice(0, len(frames) * grid.frame_tokens)
    within = np.arange(grid.frame_tokens)
    return (np.asarray(frames)[:, None] * grid.frame_tokens + within).reshape(-1)
