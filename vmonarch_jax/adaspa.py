"""AdaSpa: block-sparse attention whose blocks are searched for on a few denoising steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vmonarch_jax.pallas_kernels.numerics import accumulator

from . import checks
from .adaspa_call import AdaSpaState, Call
from .adaspa_search import Budget, Cut
from .dispatch import Implementation
from .grid import Shape3, VideoGrid, positive_int
from .memory import Step, by_phase, check_state
from .parts import Part

# What a denoising step does.
WARM_UP, FIRST_SEARCH, REUSE, SEARCH = range(4)


@dataclasses.dataclass(frozen=True)
class AdaSpa:
    """AdaSpa as a method value: training-free block-sparse attention with searched blocks.

        W[p,c] = sum over rows n of block p, keys s of block c of exp(scale q[n] . k[s] - lse[n])
        out    = attention of each row block p on its key blocks of the largest W[p]

    It remembers its choice between denoising steps. The first `warmup_steps` are dense. The step
    after them is dense too and searches: it keeps `lse` and chooses blocks by their mass W. The
    later ones of `search_steps` find W again from the new q and k and the *kept* lse, one pass over
    the keys without values, and attend with the new choice. All other steps reuse the last choice.
    A step whose state holds no choice yet, because sampling began behind the warm-up, searches as
    the first one does. Without a state each call searches on its own q and k and attends sparsely.

    Every row of blocks of a head keeps the same number of blocks. With n the number of heads whose
    kept mass exceeds `recall`, at most half of the heads, the n best have the sparsity
    `(1 + s) / 2`, the n worst `(3 s - 1) / 2` and the rest `s`: the mean stays s. Budgets are whole
    blocks, spread evenly to both sides; below s = 1/3 the spread shrinks so that the worst heads
    just keep all. Each entry of a batch has its own tiers, and under `shard_map` each shard of the
    heads. No gradient flows through the choice.

    Where the sequence holds text too, the blocks with text are kept in every row on top of the
    budget, and their own rows are dense. A block that straddles video and text counts as text.

    Args:
        sparsity: s, the mean share of video key blocks that a row leaves out, in [0, 1). With 0,
            or where rounding keeps all blocks, it is dense attention.
        block_size: tokens of a block. The sequence need not be a multiple of it.
        search_steps: denoising steps, from 0, that search; those in the warm-up are left out, and
            the first step after the warm-up searches in any case.
        warmup_steps: first denoising steps, all dense.
        text_tokens: tokens of text beside the grid's; `seq` is their sum.
        head_adaptive: whether heads differ in their budget.
        lse_cache: `False`: each search is like the first, with its own dense pass.
        recall: the share of mass from which on a head gives blocks away, in [0, 1].
        text: "after" or "before": where the text stands.
        scale: of the logits; `None`: `head_dim**-0.5`.

    Raises:
        ValueError: if a field is wrong; a call also if arrays or state do not fit.

    Example:
        >>> method, grid = vm.AdaSpa(), vm.VideoGrid(21, 30, 52)
        >>> state = vm.init_state(method, grid, batch=1, heads=12, head_dim=128)
        >>> out, state = method(query, key, value, grid=grid, state=state, step=0)

    Reference: AdaSpa (arXiv 2502.21079), its fused LSE-cached search and head-adaptive hierarchical
    block-sparse attention. Its pseudo-code takes a logarithm where the exponential is meant. Recall
    is the kept share of the mass, which is the paper's mass per row while the log-sum-exp is fresh,
    and stays below 1 when it is not.
    """

    sparsity: float = 0.8
    block_size: int = 64
    search_steps: tuple[int, ...] = (10, 30)
    warmup_steps: int = 10
    text_tokens: int = 0
    head_adaptive: bool = True
    lse_cache: bool = True
    recall: float = 0.8
    text: str = "after"
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= checks.finite("sparsity", self.sparsity) < 1:
            raise ValueError(f"`sparsity` must lie in [0, 1), got {self.sparsity}")
        if not 0 <= checks.finite("recall", self.recall) <= 1:
            raise ValueError(f"`recall` must lie in [0, 1], got {self.recall}")
        positive_int("block_size", self.block_size)
        for name in ("warmup_steps", "text_tokens"):
            checks.whole(name, getattr(self, name))
        if not isinstance(self.search_steps, (tuple, list)):
            raise ValueError(f"`search_steps` must be a tuple of steps, got {self.search_steps!r}")
        # A tuple, since `jit` needs the value's hash.
        searches = tuple(checks.whole("search_steps", step) for step in self.search_steps)
        object.__setattr__(self, "search_steps", searches)
        for name in ("head_adaptive", "lse_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}")
        if self.text not in ("after", "before"):
            raise ValueError(f'`text` must be "after" or "before", got {self.text!r}')
        checks.scale_of(self.scale, 1)

    def __call__(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq heads head_dim"],
        value: Float[Array, "batch seq heads value_dim"],
        *,
        grid: VideoGrid | Shape3,
        state: AdaSpaState | None = None,
        step: Step | None = None,
        implementation: Implementation = None,
        return_lse: bool = False,
        block_sizes: Any = None,
    ) -> Any:
        """Attention of the sequence; with a state `(out, new state)`.

        Args:
            query: `[batch, seq, heads, head_dim]`; `seq` is the grid's tokens and the text's.
            key: as `query`.
            value: `[batch, seq, heads, value_dim]`.
            grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.
            state: of this layer, from the step before or from `init_state`.
            step: the denoising step from 0: a Python int, or traced inside a loop.
            implementation: as `vm.block_sparse_attention`.
            return_lse: also return the log-sum-exp, which certifies the error.
            block_sizes: a `vm.BlockSizes`; changes the speed only.

        Raises:
            ValueError: if arrays, grid, state or step do not fit each other.
        """
        query, key, value = checks.attention_inputs(query, key, value, same_length=True)
        cut, budget = self._plan(grid)
        if query.shape[1] != cut.seq:
            raise ValueError(
                f"`seq` must equal frames*height*width + text_tokens = {cut.video_tokens} + "
                f"{cut.text_tokens} = {cut.seq}, got {query.shape[1]}"
            )
        how = {"implementation": implementation, "block_sizes": block_sizes}
        call = Call(query, key, value, cut, budget, self.recall, {"scale": self.scale, **how})
        if state is None:
            part = call.search_and_attend()
            return part if return_lse else part.out
        batch, _, heads, dim = query.shape
        sizes = {"batch": batch, "heads": heads, "head_dim": dim, "dtype": query.dtype}
        check_state(state, jax.eval_shape(lambda: self.init_state(grid, **sizes)))
        part, state = self._run(call, state, self._phase(step))
        return (part if return_lse else part.out), state

    def init_state(
        self,
        grid: VideoGrid | Shape3,
        *,
        batch: int,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> AdaSpaState:
        """The state of one layer before the first step; what `vm.init_state` calls.

        4 bytes for each row and head, and for each key block of the densest tier in each row of
        blocks and head.
        """
        del head_dim, value_dim  # the state holds nothing of their size
        cut, budget = self._plan(grid)
        rows, width = len(cut.video), len(cut.text) + budget.most
        # Any distinct blocks will do: they are not attended to before a search.
        indices = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, heads, rows, width))
        kept = len(cut.text) + budget.keep
        tokens = cut.rows.stop - cut.rows.start
        return AdaSpaState(
            lse=jnp.zeros((batch, heads, tokens), accumulator(dtype)) if self.lse_cache else None,
            indices=indices,
            counts=jnp.full((batch, heads, rows), kept, jnp.int32),
            ready=jnp.zeros(batch, bool),
        )

    def matmul_flops(
        self, grid: Any, *, heads: int, head_dim: int, value_dim: int, step: int | None = None
    ) -> int:
        """Matmul FLOPs of a step, all heads; without a step, of one that reuses its blocks.

            dense       2 S^2 (d + e)                S tokens of video and text
            sparse      2 B^2 R K (d + e) + 2 t S (d + e)     R row blocks of B tokens that keep K
                                                     key blocks on average, t text rows
            search      2 S^2 d, or for the kept lse 2 r S d for the r video rows, on top

        Whole blocks count, also the last one where it is short: the work is done.
        """
        cut, budget = self._plan(grid)
        both, seq = head_dim + value_dim, cut.seq
        phase = REUSE if step is None else self._phase(step)
        if phase == WARM_UP or budget.keep == len(cut.video):
            return 2 * seq**2 * both * heads
        if phase == FIRST_SEARCH:
            return 2 * seq**2 * (both + head_dim) * heads
        rows = cut.rows.stop - cut.rows.start
        pairs = len(cut.video) * (len(cut.text) + budget.keep)
        count = 2 * cut.block**2 * pairs * both + 2 * (seq - rows) * seq * both
        if phase == SEARCH:
            count += 2 * rows * seq * head_dim
        return count * heads

    def notes(self, grid: Any, *, heads: int, **sizes: Any) -> list[str]:
        """What `vm.explain` says of it: budgets, tiers, text, and when it searches."""
        del sizes
        cut, budget = self._plan(grid)
        if budget.keep == len(cut.video):
            return [f"every block is kept ({cut.blocks} of {cut.block} tokens): dense attention"]
        count = len(cut.video)
        said = [f"rows of blocks of {cut.block} tokens keep {budget.keep} of {count} video blocks"]
        if budget.spread and heads > 1:
            said.append(
                f"up to {heads // 2} heads that hold over {self.recall:.0%} of their mass keep "
                f"{budget.keep - budget.spread}, as many others {budget.most}"
            )
        if cut.text:
            said.append(
                f"{len(cut.text)} blocks with text {self.text} the video: kept in every row, "
                "and dense as rows"
            )
        first, *later = self.searches
        line = f"steps before {first} are dense, step {first} is dense and searches"
        if later:
            how = "with the kept log-sum-exp" if self.lse_cache else "with a dense pass"
            line += f"; it searches again {how} at {', '.join(map(str, later))}"
        return [*said, line, "without a state every call searches, at the cost of a dense pass"]

    @property
    def searches(self) -> tuple[int, ...]:
        """The denoising steps that search, in order; the first one follows the warm-up."""
        later = {step for step in self.search_steps if step > self.warmup_steps}
        return (self.warmup_steps, *sorted(later))

    def _plan(self, grid: Any) -> tuple[Cut, Budget]:
        tokens, first = VideoGrid.of(grid).tokens, self.text == "before"
        cut = Cut(tokens, self.text_tokens, first, self.block_size)
        return cut, Budget.of(len(cut.video), self.sparsity, self.head_adaptive)

    def _phase(self, step: Any) -> Any:
        """What a step does: a Python int for one, traced for a traced one."""
        static = not isinstance(step, jax.Array)
        if static:
            step = checks.whole("step", step)
        elif step.ndim or not jnp.issubdtype(step.dtype, jnp.integer):
            raise ValueError(f"`step` must be an integer scalar, got {step.dtype} {step.shape}")
        xp = np if static else jnp
        first, *later = self.searches
        again = xp.isin(step, np.asarray(later, np.int32))
        phase = xp.where(again, SEARCH if self.lse_cache else FIRST_SEARCH, REUSE)
        phase = xp.where(step == first, FIRST_SEARCH, phase)
        phase = xp.where(step < first, WARM_UP, phase)
        return int(phase) if static else phase

    def _run(self, call: Call, state: AdaSpaState, phase: Any) -> tuple[Part, AdaSpaState]:
        if call.keeps_all:
            return call.dense(), state
        first = call.first_search
        kinds = [lambda state: (call.dense(), state), first, call.reuse]
        if self.lse_cache:
            kinds.append(call.search)
        if isinstance(phase, int) and phase <= FIRST_SEARCH:
            return kinds[phase](state)
        # Entries of a batch have gone the same way, so one without blocks means that none has any.
        ready = state.ready.all()
        if isinstance(phase, int):
            return by_phase(ready.astype(jnp.int32), (first, kinds[phase]), state)
        phase = jnp.where(ready | (phase == WARM_UP), phase, FIRST_SEARCH)
        return by_phase(phase, kinds, state)
