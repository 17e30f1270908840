"""Which key blocks AdaSpa keeps: the cut of the sequence, the budgets, and the choice itself."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .block_sparse import Blocks

# Half a block counts as a whole one, also where `1 - sparsity` falls a rounding error short of it.
ROUND_UP = 0.5 + 1e-9


@dataclasses.dataclass(frozen=True)
class Cut:
    """A sequence of video and text tokens, cut into blocks from its first token on.

    A block that holds any text counts as text: the one that straddles the border is kept whole,
    as keys and as queries. The last block may be short.

    Args:
        video_tokens: tokens of the grid.
        text_tokens: tokens of the text, none for video alone.
        text_first: whether the text stands before the video.
        block: tokens of a block.
    """

    video_tokens: int
    text_tokens: int
    text_first: bool
    block: int

    @property
    def seq(self) -> int:
        """Tokens of the sequence."""
        return self.video_tokens + self.text_tokens

    @property
    def blocks(self) -> int:
        """Blocks of the sequence."""
        return -(-self.seq // self.block)

    @property
    def video(self) -> range:
        """The blocks without any text: those that attend sparsely, and compete as keys."""
        if not self.text_tokens:
            return range(self.blocks)
        if self.text_first:
            return range(-(-self.text_tokens // self.block), self.blocks)
        return range(self.video_tokens // self.block)

    @property
    def text(self) -> tuple[int, ...]:
        """The blocks with text, which every row keeps."""
        return tuple(index for index in range(self.blocks) if index not in self.video)

    @property
    def rows(self) -> slice:
        """The tokens of the video blocks."""
        start = self.video.start * self.block
        return slice(start, max(start, min(self.video.stop * self.block, self.seq)))

    @property
    def text_rows(self) -> slice:
        """The tokens of the text blocks, which attend to everything."""
        return slice(0, self.rows.start) if self.text_first else slice(self.rows.stop, self.seq)

    def join(self, video: Any, text: Any) -> Any:
        """Rows of the video blocks and of the text blocks `[batch, rows, ...]`, put in order."""
        return jnp.concatenate([text, video] if self.text_first else [video, text], axis=1)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Video key blocks that each row of blocks keeps; text blocks come on top.

    Args:
        keep: of a head in the middle tier.
        spread: how many fewer the best heads keep, and how many more the worst. It is one number,
            and the outer tiers have equally many heads: the mean is `keep` for any tiers.
    """

    keep: int
    spread: int

    @classmethod
    def of(cls, blocks: int, sparsity: float, head_adaptive: bool) -> "Budget":
        """The budgets of `blocks` video blocks, rounded to whole blocks, at least one.

        With `a = 1 - sparsity` the tiers keep the shares `a / 2`, `a` and `3 a / 2`, which are
        the paper's sparsities `(1 + s) / 2`, `s` and `(3 s - 1) / 2`. Where `3 a / 2` exceeds
        everything (`s < 1/3`), both outer tiers move towards the middle, so that the mean stays.
        """
        keep = min(blocks, max(1, math.floor((1 - sparsity) * blocks + ROUND_UP)))
        return cls(keep, min(keep // 2, blocks - keep) if head_adaptive else 0)

    @property
    def most(self) -> int:
        """Video blocks that the densest tier keeps."""
        return self.keep + self.spread


def choose(
    mass: Float[Array, "batch heads rows blocks"], cut: Cut, budget: Budget, recall: float
) -> Blocks:
    """The key blocks of the video rows, from the mass of every pair of blocks.

    Each row keeps the text blocks and its heaviest video blocks, the lower index first among
    equals. How many is a matter of the head's tier.

    Args:
        mass: of the query blocks `cut.video` and of all key blocks.
        cut: of the sequence.
        budget: of video blocks in each tier.
        recall: the recall from which on a head may give blocks away.

    Returns:
        Indices `[batch, heads, rows, text + budget.most]` and counts; the first `counts` of a row
        are in the order of the keys, so that a kernel walks forward.
    """
    text = len(cut.text)
    # What overflowed is heavy, and still lighter than the text.
    scores = jnp.nan_to_num(mass)
    if text:
        scores = scores.at[..., jnp.array(cut.text)].set(jnp.inf)
    _, ranked = jax.lax.top_k(scores, text + budget.most)
    counts = text + budget.keep
    if budget.spread:
        kept = jnp.take_along_axis(mass, ranked[..., :counts], axis=-1)
        counts = counts + budget.spread * tiers(recall_of(kept, mass), recall)[..., None]
    counts = jnp.broadcast_to(counts, ranked.shape[:-1]).astype(jnp.int32)
    used = jnp.arange(ranked.shape[-1]) < counts[..., None]
    # The last block where nothing is used: an index that a kernel may touch.
    indices = jnp.sort(jnp.where(used, ranked, cut.blocks), axis=-1)
    return Blocks(jnp.minimum(indices, cut.blocks - 1).astype(jnp.int32), counts)


def recall_of(
    kept: Float[Array, "batch heads rows kept"], mass: Float[Array, "batch heads rows blocks"]
) -> Float[Array, "batch heads"]:
    """The share of a head's mass that its kept blocks hold.

    All of the mass is the number of rows where the log-sum-exp is that of these q and k. With one
    from an earlier step it is not, and only the share of it is still between 0 and 1. A mass that
    overflowed says nothing: such a head counts as the worst.
    """
    share = kept.sum((2, 3)) / mass.sum((2, 3))
    return jnp.where(jnp.isfinite(share), share, 0)


def tiers(share: Float[Array, "batch heads"], recall: float) -> Int[Array, "batch heads"]:
    """The tier of each head: -1 gives blocks away, 1 gets them, 0 keeps the middle budget.

    With n the number of heads whose share exceeds `recall`, at most half of them all: the n best
    give to the n worst. Among equals the lower index is the better one. Per entry of the batch.
    """
    heads = share.shape[-1]
    good: Bool[Array, "batch heads"] = share > recall
    n = jnp.minimum(good.sum(-1, keepdims=True), heads // 2)
    # The place of each head when the best comes first: the inverse of the sorting order.
    place = jnp.argsort(jnp.argsort(-share, axis=-1, stable=True), axis=-1)
    return (place >= heads - n).astype(jnp.int32) - (place < n).astype(jnp.int32)
