"""What AdaSpa does on a denoising step: dense attention, a search, or attention on known blocks."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .adaspa_search import Budget, Cut, choose
from .block_sparse import Blocks, block_mass, block_sparse_attention, dense_attention_mass
from .dense import dense_attention
from .parts import Part


class AdaSpaState(NamedTuple):
    """What `vm.AdaSpa` remembers of a layer between denoising steps.

    `lse` is that of the first search (`None` without the cache), `indices` and `counts` are the
    key blocks of the video rows as in `vm.Blocks`, `ready` says whether they have been searched.
    """

    lse: Any  # [batch, heads, rows], float32, or None
    indices: Int[Array, "batch heads row_blocks budget"]
    counts: Int[Array, "batch heads row_blocks"]
    ready: Bool[Array, " batch"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call's arrays and what the kinds of steps do with them."""

    query: Any
    key: Any
    value: Any
    cut: Cut
    budget: Budget
    recall: float
    on: Any  # scale, implementation and block sizes of every kernel

    @property
    def keeps_all(self) -> bool:
        """Whether no block is left out of any row."""
        return self.budget.keep == len(self.cut.video)

    def dense(self) -> Part:
        """Attention on everything."""
        part = dense_attention(self.query, self.key, self.value, return_lse=True, **self.on)
        return Part(*part)

    def first_search(self, state: AdaSpaState) -> tuple[Part, AdaSpaState]:
        """Dense attention, whose log-sum-exp and block masses are the search."""
        out, lse, mass = dense_attention_mass(
            self.query, self.key, self.value, self.cut.block, **self.on
        )
        kept = None
        if state.lse is not None:
            kept = jax.lax.stop_gradient(lse[:, self.cut.rows].swapaxes(1, 2))
        return Part(out, lse), self._remember(kept, self._choose(mass))

    def search(self, state: AdaSpaState) -> tuple[Part, AdaSpaState]:
        """A search with the kept log-sum-exp, and attention on what it finds."""
        rows, lse = self.query[:, self.cut.rows], jnp.swapaxes(state.lse, 1, 2)
        mass = block_mass(rows, self.key, lse, self.cut.block, **self.on)
        blocks = choose(mass, self.cut, self.budget, self.recall)
        return self._sparse(blocks), self._remember(state.lse, blocks)

    def reuse(self, state: AdaSpaState) -> tuple[Part, AdaSpaState]:
        """Attention on what an earlier step found."""
        return self._sparse(Blocks(state.indices, state.counts)), state

    def search_and_attend(self) -> Part:
        """A search on these very arrays, and attention on what it finds."""
        if self.keeps_all:
            return self.dense()
        query, key = jax.lax.stop_gradient((self.query, self.key))
        # One column of values, whose product is small: only the masses are wanted.
        _, _, mass = dense_attention_mass(query, key, key[..., :1], self.cut.block, **self.on)
        return self._sparse(self._choose(mass))

    def _choose(self, mass: Any) -> Blocks:
        """From the masses of all rows."""
        video = self.cut.video
        return choose(mass[:, :, video.start : video.stop], self.cut, self.budget, self.recall)

    def _sparse(self, blocks: Blocks) -> Part:
        """Video rows on their blocks, text rows on everything."""
        cut, key, value = self.cut, self.key, self.value
        on = self.on | {"return_lse": True}
        video, text = self.query[:, cut.rows], self.query[:, cut.text_rows]
        sparse = Part(*block_sparse_attention(video, key, value, blocks, cut.block, **on))
        if not cut.text:
            return sparse
        dense = Part(*dense_attention(text, key, value, **on))
        return Part(cut.join(sparse.out, dense.out), cut.join(sparse.lse, dense.lse))

    def _remember(self, lse: Any, blocks: Blocks) -> AdaSpaState:
        return AdaSpaState(lse, *blocks, ready=jnp.ones(self.query.shape[0], bool))
