"""What every attention here must compute, in float64 NumPy: explicit matrices, nothing clever.

Each function builds the whole row-stochastic matrix `A [batch, heads, query, key]` that an
attention stands for, and takes the output from it as `A @ V`. Nothing is shared with the library:
the entropy is the plain sum of `R log R` (not the identity the library uses), tokens are placed by
counting coordinates (no reshapes), and gradients are central finite differences.

Letters: z batch, h head, d dim; a f query and key tile; l k query and key block; j i position in a
block. Padding is neither key nor query: it is left out of softmaxes over keys and of the sums over
l, and its mean query starts at zero.
"""

import itertools
from typing import NamedTuple

import numpy as np

TINY = 1e-300  # stands in for a zero `cR`, where the sum that it divides is zero too


class Part(NamedTuple):
    out: np.ndarray  # [batch, query, heads, value_dim]
    lse: np.ndarray  # [batch, query, heads]
    matrix: np.ndarray  # [batch, heads, query, key]
    entropies: tuple = ()  # cL of each step [batch, heads, a, f, k, j]
    loads: tuple = ()  # cR of each step but the last [batch, heads, a, f, k, j]


def softmax_lse(x, axis):
    """Softmax and log-sum-exp along `axis`; a slice of only -inf gives zeros and -inf."""
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    e = np.exp(x - top)
    total = e.sum(axis=axis, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    return e / np.where(total == 0, 1.0, total), np.squeeze(lse, axis)


def xlogx(p):
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)


def float64(*arrays):
    return tuple(np.asarray(a, dtype=np.float64) for a in arrays)


def broadcast_mask(mask, batch, n):
    mask = np.ones(n, bool) if mask is None else np.asarray(mask, bool)
    return np.broadcast_to(mask, (batch, n))


def part_of(matrix, lse, value, **extra):
    out = np.einsum("zhqk,zkhd->zqhd", matrix, value)
    return Part(out, np.moveaxis(lse, 1, 2), matrix, **extra)


def dense(query, key, value, *, scale=None, key_mask=None) -> Part:
    """softmax(scale Q K^T) V; `key_mask [key]` or `[batch, key]`, True where the key is there."""
    query, key, value = float64(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("zqhd,zkhd->zhqk", query, key)
    there = broadcast_mask(key_mask, key.shape[0], key.shape[1])
    logits = np.where(there[:, None, None, :], logits, -np.inf)
    return part_of(*softmax_lse(logits, -1), value)


# --- where each token sits ------------------------------------------------------------------------


def up(n, multiple):
    return -(-n // multiple) * multiple


def place_grid(grid, block, tile=None):
    """Token at `[tile, block, position]`, -1 for padding at the end of an axis."""
    grid, block = np.array(grid), np.array(block)
    tile = grid if tile is None else np.array(tile)
    tile = np.where(tile == grid, up(grid, block), tile)  # the whole grid grows to whole blocks
    assert not (tile % block).any(), (tile, block)
    tiles, blocks = up(grid, tile) // tile, tile // block
    place = np.full([tiles.prod(), blocks.prod(), block.prod()], -1)
    for where in itertools.product(*(range(n) for n in grid)):
        in_tile = where % tile
        a = np.ravel_multi_index(where // tile, tiles)
        m = np.ravel_multi_index(in_tile // block, blocks)
        p = np.ravel_multi_index(in_tile % block, block)
        place[a, m, p] = np.ravel_multi_index(where, grid)
    return place


def place_sequence(n, block_size, pad="post"):
    """One tile of blocks of `block_size`, padded after or before the sequence."""
    total = up(n, block_size)
    shift = total - n if pad == "pre" else 0
    token = np.arange(total) - shift
    return np.where((token < 0) | (token >= n), -1, token).reshape(1, -1, block_size)


# --- Monarch attention ----------------------------------------------------------------------------


def monarch_placed(
    query,
    key,
    value,
    place,
    *,
    steps,
    floor,
    scale=None,
    key_mask=None,
    query_mask=None,
    entropies=None,
):
    """Design page 1.1 line by line. `entropies` freezes the cL of each step at given values."""
    query, key, value = float64(query, key, value)
    z, n = query.shape[:2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = (place >= 0) & broadcast_mask(key_mask, z, n)[:, place]  # [z f k i]
    queries = (place >= 0) & broadcast_mask(query_mask, z, n)[:, place]  # [z a l j]
    keys, queries = keys[:, None], queries[:, None]  # the same for each head
    q_all = np.moveaxis(query, 2, 1)[:, :, place]  # [z h a l j d]
    k_all = np.where(keys[..., None], np.moveaxis(key, 2, 1)[:, :, place], 0.0)
    q_seen = np.where(queries[..., None], q_all, 0.0)
    tiles = place.shape[0]

    # L = I: the mean query of block k at position j is the query there, for every key tile.
    qt = np.repeat(q_seen[:, :, :, None], tiles, axis=3)  # [z h a f k j d]
    used, loads = [], []
    for step in range(steps):
        x = scale * np.einsum("zhafkjd,zhfkid->zhafkji", qt, k_all)
        x = np.where(keys[:, :, None, :, :, None, :], x, -np.inf)
        r, _ = softmax_lse(x, -1)
        a_l = scale * np.einsum("zhafkji,zhfkid->zhafkjd", r, k_all)
        c_l = xlogx(r).sum(-1) if entropies is None else entropies[step]
        used.append(c_l)

        f_all = np.einsum("zhaljd,zhafkjd->zhaljfk", q_all, a_l)
        f_all = f_all - np.einsum("zhafkj->zhajfk", c_l)[:, :, :, None]
        empty = ~keys.any(-1)  # a block without keys draws no attention [z 1 f k]
        f_all = np.where(empty[:, :, None, None, None], -np.inf, f_all)
        flat = f_all.reshape(*f_all.shape[:-2], -1)
        l_all, lse = softmax_lse(flat, -1)
        l_all = l_all.reshape(f_all.shape)

        if step < steps - 1:
            seen = np.where(queries[..., None, None], l_all, 0.0)
            c_r = np.einsum("zhaljfk->zhafkj", seen)
            qt = np.einsum("zhaljfk,zhaljd->zhafkjd", seen, q_seen)
            qt = qt / np.maximum(c_r, max(floor, TINY))[..., None]
            loads.append(c_r)

    blocks = np.einsum("zhaljfk,zhafkji->zhaljfki", l_all, r)
    matrix = np.zeros((z, query.shape[2], n, n))
    row_lse = np.zeros((z, query.shape[2], n))
    real = place >= 0
    tokens = place[real]
    row_lse[:, :, tokens] = lse[:, :, real]
    matrix[:, :, tokens[:, None], tokens] = blocks[:, :, real][:, :, :, real]
    return part_of(matrix, row_lse, value, entropies=tuple(used), loads=tuple(loads))


def frame_rows(grid, recompute_frames):
    """The tokens of the frames to recompute: the first few, or those named."""
    frames = recompute_frames
    frames = range(frames) if isinstance(frames, int) else frames
    return np.array(
        [f * grid[1] * grid[2] + p for f in frames for p in range(grid[1] * grid[2])], int
    )


def with_dense_rows(part, exact, rows):
    out, lse, matrix = part.out.copy(), part.lse.copy(), part.matrix.copy()
    out[:, rows], lse[:, rows] = exact.out[:, rows], exact.lse[:, rows]
    matrix[:, :, rows] = exact.matrix[:, :, rows]
    return part._replace(out=out, lse=lse, matrix=matrix)


def monarch_grid(
    query,
    key,
    value,
    *,
    grid,
    block,
    tile=None,
    steps=2,
    floor=0.1,
    recompute_frames=0,
    scale=None,
    key_mask=None,
    entropies=None,
) -> Part:
    """Any block and tile of a grid of tokens; rows of `recompute_frames` are dense attention.

    The tokens of a grid are all queries; `key_mask` leaves out keys alone.
    """
    part = monarch_placed(
        query,
        key,
        value,
        place_grid(grid, block, tile),
        steps=steps,
        floor=floor,
        scale=scale,
        key_mask=key_mask,
        entropies=entropies,
    )
    rows = frame_rows(grid, recompute_frames)
    if rows.size:
        part = with_dense_rows(part, dense(query, key, value, scale=scale, key_mask=key_mask), rows)
    return part


def monarch_sequence(
    query,
    key,
    value,
    *,
    block_size,
    steps=2,
    floor=0.0,
    pad="post",
    key_mask=None,
    scale=None,
    entropies=None,
) -> Part:
    """MonarchAttention on a plain sequence; a masked token is neither key nor query."""
    place = place_sequence(query.shape[1], block_size, pad)
    return monarch_placed(
        query,
        key,
        value,
        place,
        steps=steps,
        floor=floor,
        scale=scale,
        key_mask=key_mask,
        query_mask=key_mask,
        entropies=entropies,
    )


# --- composition and measures ---------------------------------------------------------------------


def join(parts, values) -> Part:
    """Parts over disjoint key sets, as one matrix over all their keys, in the order given."""
    lses = np.stack([np.moveaxis(p.lse, 2, 1) for p in parts])  # [parts z h q]
    weights, lse = softmax_lse(lses, 0)
    matrix = np.concatenate(
        [w[..., None] * p.matrix for w, p in zip(weights, parts, strict=True)], axis=-1
    )
    return part_of(matrix, lse, np.concatenate(float64(*values), axis=1))


def kl(approximate, exact):
    """Sum of A log(A / D) of each row, by definition: matrices [z h q k] -> [z q h]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(approximate > 0, approximate * (np.log(approximate) - np.log(exact)), 0.0)
    return np.moveaxis(terms.sum(-1), 1, 2)


def gradients(function, arrays, cotangents, eps=1e-5):
    """d/d arrays of <out, cotangents[0]> + <lse, cotangents[1]>, by central differences.

    `function` maps `[1, seq, heads, dim]` arrays to a Part. All bumped copies run as one large
    batch, and heads do not see each other, so one coordinate is bumped in all of them at once.
    """
    arrays = float64(*arrays)
    assert all(a.shape[0] == 1 for a in arrays)
    out_bar, lse_bar = (c[0] for c in float64(*cotangents))

    def objective(inputs):
        part = function(*inputs)
        lse = np.where(np.isneginf(part.lse), 0.0, part.lse)
        return np.einsum("zqhd,qhd->zh", part.out, out_bar) + np.einsum("zqh,qh->zh", lse, lse_bar)

    result = []
    for which, array in enumerate(arrays):
        _, n, _, d = array.shape
        bumps = eps * np.eye(n * d).reshape(n * d, n, 1, d)
        sides = []
        for sign in (1.0, -1.0):
            moved = [np.broadcast_to(a, (n * d, *a.shape[1:])) for a in arrays]
            moved[which] = array + sign * bumps
            sides.append(objective(moved))
        slope = (sides[0] - sides[1]) / (2 * eps)  # [n*d, heads]
        result.append(np.moveaxis(slope.reshape(n, d, -1), 2, 1)[None])
    return tuple(result)


def monarch_gradients(function, arrays, cotangents, *, entropy_gradient):
    """Gradients of a Monarch `function(q, k, v, entropies=...)`.

    Without the entropy's gradient every cL is a constant, frozen at its value at these arrays.
    """
    entropies = None if entropy_gradient else function(*arrays).entropies
    return gradients(lambda q, k, v: function(q, k, v, entropies=entropies), arrays, cotangents)
