"""What AdaSpa must compute, in float64 NumPy: whole score matrices, one entry and head at a time.

Nothing is shared with the library. Blocks are found by dividing token numbers, text blocks by
looking for text tokens in them, budgets by exact fractions, choices and tiers by sorting pairs.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Choice(NamedTuple):
    """The kept key blocks of each video row block, and what they followed from."""

    kept: list  # of each video row block, a set of key blocks
    recall: float
    tier: int


class Memory(NamedTuple):
    lse: np.ndarray  # [batch, heads, seq], of the first search
    choices: list  # [batch][heads] of Choice


def text_tokens(method, tokens):
    """Which tokens of the sequence are text, boolean."""
    extra, video = np.ones(method.text_tokens, bool), np.zeros(tokens, bool)
    return np.concatenate([extra, video] if method.text == "before" else [video, extra])


def blocks_of(method, tokens):
    """Block number of each token, blocks that hold text, and blocks that do not."""
    is_text = text_tokens(method, tokens)
    number = np.arange(is_text.size) // method.block_size
    text = sorted(set(number[is_text].tolist()))
    return number, text, [c for c in range(number.max() + 1) if c not in text]


def budgets(method, video_blocks):
    """`{tier: kept video blocks}` from exact fractions of the decimal sparsity."""
    share = (1 - Fraction(str(method.sparsity))) * video_blocks
    keep = min(max(1, math.floor(share + Fraction(1, 2))), video_blocks)
    spread = min(keep // 2, video_blocks - keep) if method.head_adaptive else 0
    return {tier: keep + tier * spread for tier in (-1, 0, 1)}


def logits(method, q, k):
    scale = q.shape[-1] ** -0.5 if method.scale is None else method.scale
    return scale * np.einsum("znhd,zshd->zhns", q, k)


def log_sum_exp(x, where=None):
    x = x if where is None else np.where(where, x, -np.inf)
    top = x.max(-1, keepdims=True)
    return (np.log(np.exp(x - top).sum(-1, keepdims=True)) + top)[..., 0]


def mass_of(number, x, lse):
    """`[blocks, blocks]` of one head, a sum over tokens."""
    weights, blocks = np.exp(x - lse[:, None]), number.max() + 1
    mass = np.zeros((blocks, blocks))
    np.add.at(mass, (number[:, None], number[None, :]), weights)
    return mass


def best_blocks(row, video, keep):
    """The `keep` heaviest video blocks of one row, the lower index first among equals."""
    return sorted(video, key=lambda c: (-row[c], c))[:keep]


def tiers_of(recalls, threshold):
    """Of the heads of one entry."""
    heads = len(recalls)
    n = min(sum(r > threshold for r in recalls), heads // 2)
    order = sorted(range(heads), key=lambda h: (-recalls[h], h))
    return [-1 if h in order[:n] else 1 if h in order[heads - n :] else 0 for h in range(heads)]


def choose(method, tokens, x, lse):
    """The choices of one batch entry's heads, from its logits and some log-sum-exp."""
    number, text, video = blocks_of(method, tokens)
    keep = budgets(method, len(video))
    masses = [mass_of(number, head, line) for head, line in zip(x, lse, strict=True)]
    recalls = []
    for mass in masses:
        kept = sum(mass[p, text + best_blocks(mass[p], video, keep[0])].sum() for p in video)
        recalls.append(kept / mass[video].sum())
    return [
        Choice(
            [set(text) | set(best_blocks(mass[p], video, keep[tier])) for p in video], recall, tier
        )
        for mass, recall, tier in zip(
            masses, recalls, tiers_of(recalls, method.recall), strict=True
        )
    ]


def where(method, tokens, choices):
    """Which pairs of tokens are attended, `[batch, heads, seq, seq]`."""
    number, _, video = blocks_of(method, tokens)
    seq = number.size
    keep = np.ones((len(choices), len(choices[0]), seq, seq), bool)
    for z, heads in enumerate(choices):
        for h, choice in enumerate(heads):
            for p, kept in zip(video, choice.kept, strict=True):
                keep[z, h, number == p] = np.isin(number, sorted(kept))
    return keep


def attend(x, v, keep):
    """`(out [z, n, h, e], lse [z, n, h])` over the kept pairs."""
    lse = log_sum_exp(x, keep)
    p = np.where(keep, np.exp(x - lse[..., None]), 0)
    return np.einsum("zhns,zshe->znhe", p, v), lse.swapaxes(1, 2)


def step(method, tokens, q, k, v, number, memory):
    """`(out, lse, memory)` of one denoising step."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    x = logits(method, q, k)
    everything, lse = np.ones(x.shape, bool), log_sum_exp(x)
    if number < method.warmup_steps:
        return *attend(x, v, everything), memory
    searches = number in method.search_steps
    if memory is None or (searches and not method.lse_cache) or number == method.warmup_steps:
        found = [choose(method, tokens, *pair) for pair in zip(x, lse, strict=True)]
        return *attend(x, v, everything), Memory(lse, found)
    if searches:
        found = [choose(method, tokens, *pair) for pair in zip(x, memory.lse, strict=True)]
        memory = Memory(memory.lse, found)
    return *attend(x, v, where(method, tokens, memory.choices)), memory


def gradients(method, q, k, v, keep, out_bar):
    """Those of `sum(out * out_bar)` in q, k and v for a fixed choice."""
    q, k, v, out_bar = (np.asarray(x, np.float64) for x in (q, k, v, out_bar))
    scale = q.shape[-1] ** -0.5 if method.scale is None else method.scale
    x = logits(method, q, k)
    p = np.where(keep, np.exp(x - log_sum_exp(x, keep)[..., None]), 0)
    p_bar = np.einsum("znhe,zshe->zhns", out_bar, v)
    x_bar = scale * p * (p_bar - (p * p_bar).sum(-1, keepdims=True))
    return (
        np.einsum("zhns,zshd->znhd", x_bar, k),
        np.einsum("zhns,znhd->zshd", x_bar, q),
        np.einsum("zhns,znhe->zshe", p, out_bar),
    )
