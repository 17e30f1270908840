"""SALAD in float64 NumPy, by loops over tokens; it shares no code with what it checks."""

import itertools
import math

import numpy as np


def walk(shape, tile):
    """Tokens strip by strip, there and back, and column by column in a strip; as grid indices."""
    frames, height, width = shape
    found, forward, down = [], True, True
    for t in range(0, frames, tile[0]):
        rows = list(range(0, height, tile[1]))
        for h in rows if down else rows[::-1]:
            for w in range(width) if forward else range(width - 1, -1, -1):
                for a in range(t, min(t + tile[0], frames)):
                    for b in range(h, min(h + tile[1], height)):
                        found.append((a * height + b) * width + w)
            forward = not forward
        down = not down
    return found


def blocks_of(shape, tile):
    """The tokens of each block."""
    order, size = walk(shape, tile), math.prod(tile)
    return [order[i : i + size] for i in range(0, len(order), size)]


def centres(shape, tile):
    _, height, width = shape
    return [
        [
            sum(place) / len(block)
            for place in zip(
                *((n // (height * width) + 0.5, n // width % height + 0.5, n % width + 0.5)
                  for n in block),
                strict=True,
            )
        ]
        for block in blocks_of(shape, tile)
    ]  # fmt: skip


def window_map(shape, tile, window):
    found = []
    for mine in centres(shape, tile):
        row = []
        for other in centres(shape, tile):
            inside = True
            for axis in range(3):
                size = min(window[axis], shape[axis])
                low = mine[axis] - size / 2
                low = min(max(low, 0), shape[axis] - size)
                inside = inside and low <= other[axis] < low + size
            row.append(inside)
        found.append(row)
    return np.array(found)


def nearest_map(shape, tile, keep):
    places = centres(shape, tile)
    found = np.zeros((len(places), len(places)), bool)
    for row, mine in enumerate(places):
        ranked = []
        for column, other in enumerate(places):
            apart = [abs(mine[a] - other[a]) / shape[a] for a in range(3)]
            ranked.append((round(max(apart), 8), round(sum(apart), 8), column))
        for _, _, column in sorted(ranked)[:keep]:
            found[row, column] = True
    return found


def top_map(q, k, shape, tile, keep):
    """`[batch, heads, blocks, blocks]` from `[batch, seq, heads, d]`."""
    blocks = blocks_of(shape, tile)
    found = np.zeros((q.shape[0], q.shape[2], len(blocks), len(blocks)), bool)
    for z, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        for p, mine in enumerate(blocks):
            mean = q[z, mine, h].mean(0)
            scores = [mean @ k[z, other, h].mean(0) for other in blocks]
            for c in sorted(range(len(blocks)), key=lambda c: (-scores[c], c))[:keep]:
                found[z, h, p, c] = True
    return found


def sparse(q, k, v, keep, shape, tile, scale):
    """`(out, lse, weights)` of attention on kept pairs of blocks; `keep` as the maps above."""
    blocks = blocks_of(shape, tile)
    batch, seq, heads, _ = q.shape
    keep = np.broadcast_to(keep, (batch, heads, len(blocks), len(blocks)))
    block = np.empty(seq, int)
    for number, tokens in enumerate(blocks):
        block[tokens] = number
    x = np.einsum("znhd,zshd->zhns", q, k) * scale
    x = np.where(keep[:, :, block][:, :, :, block], x, -np.inf)
    top = x.max(-1, keepdims=True)
    total = np.exp(x - top).sum(-1, keepdims=True)
    weights = np.exp(x - top) / total
    lse = (top + np.log(total))[..., 0]
    return np.einsum("zhns,zshe->znhe", weights, v), lse.transpose(0, 2, 1), weights


def turn(x, angles):
    """Rotates interleaved pairs of channels, `angles [seq, d / 2]`, as complex numbers."""
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def linear(q, k, v, angles=None, phi=lambda x: np.maximum(x, 0), eps=1e-6):
    q, k = phi(q), phi(k)
    q_turned, k_turned = (q, k) if angles is None else (turn(q, angles), turn(k, angles))
    scores = np.einsum("znhd,zshd->zhns", q_turned, k_turned) / k.shape[1]
    sums = np.einsum("znhd,zshd->znh", q, k) / k.shape[1]
    return np.einsum("zhns,zshe->znhe", scores, v) / (sums + eps)[..., None]


def layer(params, x, keep, shape, tile, angles, heads, gate_tokens=False):
    """`SaladAttention` with QK norm; `params` by name in float64."""
    dim = x.shape[-1]
    qkv = x @ params["qkv.kernel"] + params["qkv.bias"]
    q, k, v = (y.reshape(*x.shape[:2], heads, dim // heads) for y in np.split(qkv, 3, axis=-1))
    q, k = (
        y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * params[f"{name}_norm.scale"]
        for name, y in (("q", q), ("k", k))
    )
    near = sparse(turn(q, angles), turn(k, angles), v, keep, shape, tile, (dim // heads) ** -0.5)
    far = linear(q, k, v, angles).reshape(x.shape) @ params["linear_out.kernel"]
    seen = x if gate_tokens else x.mean(1, keepdims=True)
    gate = 1 / (1 + np.exp(-(seen @ params["gate.kernel"] + params["gate.bias"])))
    return (near[0].reshape(x.shape) + gate * far) @ params["out.kernel"] + params["out.bias"]
