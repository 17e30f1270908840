"""Guided attention in float64 NumPy, from the Monarch matrix and the dense logits.

The Monarch matrix of `oracle.monarch_placed` has everything: the weight of a block in a row is the
sum of the matrix over it, its log plus the row's lse is F, and the row's share within the block is
R. Guided attention puts the dense logits where a pair of blocks is exact.
"""

import numpy as np
import oracle


def blocks_of(grid, block):
    """Token numbers of each block, [m, b]; one tile, no padding."""
    place = oracle.place_grid(grid, block)[0]
    assert (place >= 0).all()
    return place


def logits(query, key, scale=None):
    query, key = oracle.float64(query, key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return scale * np.einsum("zqhd,zkhd->zhqk", query, key)


def gap(query, key, value, *, grid, block, **settings):
    """Mass that Monarch misses, [z, h, m, m], of the dense softmax, row block by key block."""
    place = blocks_of(grid, block)
    part = oracle.monarch_placed(query, key, value, place[None], **settings)
    exact = oracle.dense(query, key, value, scale=settings.get("scale"))
    shrunk = np.exp(np.moveaxis(part.lse - exact.lse, 2, 1))[..., None] * part.matrix
    missed = exact.matrix - shrunk  # [z, h, q, k], each in units of the dense denominator
    return missed[:, :, place][..., place].sum((3, 5))


def guided(query, key, value, chosen, *, grid, block, recompute_frames=0, **settings):
    """`chosen [z, h, m, m]`: True where a pair of blocks is exact."""
    place = blocks_of(grid, block)
    part = oracle.monarch_placed(query, key, value, place[None], **settings)
    block_of = np.empty(np.prod(grid), int)
    block_of[place] = np.arange(len(place))[:, None]
    exact = np.asarray(chosen)[:, :, block_of][..., block_of]  # [z, h, q, k]
    with np.errstate(divide="ignore"):
        of_monarch = np.log(part.matrix) + np.moveaxis(part.lse, 2, 1)[..., None]
    x = np.where(exact, logits(query, key, settings.get("scale")), of_monarch)
    matrix, lse = oracle.softmax_lse(x, -1)
    found = oracle.part_of(matrix, lse, oracle.float64(value)[0])
    rows = oracle.frame_rows(grid, recompute_frames)
    if rows.size:
        dense = oracle.dense(query, key, value, scale=settings.get("scale"))
        found = oracle.with_dense_rows(found, dense, rows)
    return found._replace(entropies=part.entropies)


def curvature(query, key, positions, *, grid, block):
    """Mass times curvature after one iteration, [z, h, m, m]; pair by pair, as its docstring says.

    With one iteration the mean query of block k at position j is the query there. The sum is over
    `positions` of a block.
    """
    place = blocks_of(grid, block)
    part = oracle.monarch_placed(query, key, key, place[None], steps=1, floor=0.0)
    query, key = oracle.float64(query, key)
    scale, found = query.shape[-1] ** -0.5, np.zeros((*part.lse.shape[::2], *[len(place)] * 2))
    for z, h, l, k in np.ndindex(found.shape):
        keys = key[z, place[k], h]
        for j in positions:
            row = place[l, j]
            weight = part.matrix[z, h, row, place[k]]
            share = weight / weight.sum()
            mean = share @ keys
            spread = (keys**2).sum(-1).mean() - mean @ mean
            far = query[z, row, h] - query[z, place[k, j], h]
            second = 0.5 * scale**2 * (far @ far) * max(spread, 0) / len(mean)
            found[z, h, l, k] += weight.sum() * second
    return found
