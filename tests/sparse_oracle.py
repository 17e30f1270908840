"""Block-sparse attention in float64 NumPy: one row at a time, from its list of keys."""

import numpy as np


def block_sparse(query, key, value, keep, block, scale=None):
    """`(out, lse)`; `keep [batch, heads, query_blocks, key_blocks]`, True where a pair is kept."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, seq, heads, _ = query.shape
    out = np.zeros((batch, seq, heads, value.shape[-1]))
    lse = np.full((batch, seq, heads), -np.inf)
    owner = np.arange(key.shape[1]) // block
    for z, n, h in np.ndindex(batch, seq, heads):
        mine = keep[z, h, n // block][owner]
        if not mine.any():
            continue
        x = scale * key[z, mine, h] @ query[z, n, h]
        top = x.max()
        weights = np.exp(x - top)
        lse[z, n, h] = top + np.log(weights.sum())
        out[z, n, h] = weights @ value[z, mine, h] / weights.sum()
    return out, lse


def block_mass(query, key, lse, block, scale=None):
    """`[batch, heads, query_blocks, key_blocks]`: sums of exp(x - lse), added pair by pair."""
    query, key, lse = (np.asarray(a, np.float64) for a in (query, key, lse))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, seq, heads, _ = query.shape
    keys = key.shape[1]
    mass = np.zeros((batch, heads, -(-seq // block), -(-keys // block)))
    for z, n, h in np.ndindex(batch, seq, heads):
        weights = np.exp(scale * key[z, :, h] @ query[z, n, h] - lse[z, n, h])
        np.add.at(mass[z, h, n // block], np.arange(keys) // block, weights)
    return mass


def gradients(query, key, value, keep, block, dout, dlse, scale=None):
    """Of `sum(out * dout) + sum(lse * dlse)` over rows that have keys, from the softmax's rule."""
    query, key, value, dout, dlse = (
        np.asarray(a, np.float64) for a in (query, key, value, dout, dlse)
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dq, dk, dv = (np.zeros_like(a) for a in (query, key, value))
    owner = np.arange(key.shape[1]) // block
    for z, n, h in np.ndindex(*query.shape[:3]):
        mine = np.flatnonzero(keep[z, h, n // block][owner])
        if not mine.size:
            continue
        x = scale * key[z, mine, h] @ query[z, n, h]
        p = np.exp(x - x.max())
        p /= p.sum()
        dp = value[z, mine, h] @ dout[z, n, h]
        dx = scale * p * (dp - p @ dp + dlse[z, n, h])
        dq[z, n, h] += dx @ key[z, mine, h]
        dk[z, mine, h] += dx[:, None] * query[z, n, h]
        dv[z, mine, h] += p[:, None] * dout[z, n, h]
    return dq, dk, dv
