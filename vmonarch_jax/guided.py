"""Guided attention: exact where Monarch attention is most wrong, Monarch on the rest."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from . import checks, flops, refresh
from .block_sparse import top_blocks
from .dispatch import Implementation
from .grid import Shape3, Tiling, VideoGrid, positive_int
from .guided_attention import attend_chosen, dense_blocks
from .guided_gap import dense_gap, sampled_positions
from .memory import Step, by_phase, check_state
from .methods import Dense, VMonarch
from .parts import Part


class GuidedState(NamedTuple):
    """What `vm.Guided` remembers of one layer.

    Args:
        indices: the exact key blocks of every query block, ascending,
            `[batch, heads, query_blocks, exact_blocks]`, int32.
        filled: `[batch]`, whether there has been a refresh.
    """

    indices: Int[Array, "batch heads query_blocks exact_blocks"]
    filled: Bool[Array, " batch"]


@dataclasses.dataclass(frozen=True)
class Guided:
    """Exact attention on the key blocks where Monarch is most wrong, Monarch on all others.

        out, lse = merge(exact on r key blocks of each query block, Monarch on the rest)

    Query block l takes the r key blocks k of the largest gap, the weight that Monarch misses there:

        gap[l,k] = sum_j exp(lse_true[l,j,k] - lse_dense[l,j]) - exp(F[l,j,k] - lse_dense[l,j]) >= 0

    where `lse_true` is the log-sum-exp of row `(l, j)` over block k and F is Monarch's. With a
    schedule (`refresh_steps` or `every`), a refresh step is dense, finds every gap, and remembers
    the choice for the steps up to the next refresh. Without a schedule or without a state, each
    call guesses the gap by mass times curvature (`vmonarch_jax/guided_gap.py`), and no dense pass
    is ever run.

    The certificate holds: `KL(row || dense row) = lse_dense - lse`. Proof: on an exact key
    `log p - log p_dense = lse_dense - lse`; over a Monarch block of weight `exp(F - lse)` its mean
    under R is `F - lse + sum_i R log R - q . aL + lse_dense`, the same, as `F = q . aL - cL`.

    The method's iterations are as ever; the chosen pairs are left out of the last L step alone.
    Gradients flow through both parts, and not through the choice.

    The first call with a fresh state is a refresh whatever the schedule says, and so is step 0.
    With a Python int as step, a step of the schedule compiles the refresh alone; any other step
    compiles both under `jit`, because only the state tells whether it is fresh.

    Args:
        method: a `vm.VMonarch` or `vm.TiledMonarch` value with one tile whose blocks divide the
            grid.
        exact_blocks: r, key blocks of each query block that get exact attention.
        refresh_steps: denoising steps, counted from 0, that refresh the choice.
        every: refresh on each step that is a multiple of it.

    Raises:
        ValueError: if a field is wrong; a call also if the method does not fit the grid.

    Example:
        >>> tubes = vm.VMonarch(block=(16, 1, 1), recompute_frames=0)
        >>> method = vm.Guided(tubes, exact_blocks=4, every=10)
        >>> state = vm.init_state(method, (16, 8, 8), batch=1, heads=3, head_dim=64)
        >>> out, state = method(q, k, v, grid=(16, 8, 8), state=state, step=0)

    Reference: this library; figures in `benchmarks/results/past_papers.md`.
    """

    method: VMonarch = VMonarch()  # noqa: RUF009 (frozen)
    exact_blocks: int = 1
    refresh_steps: tuple[int, ...] | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, VMonarch):
            raise ValueError(
                f"`method` must be a vm.VMonarch or vm.TiledMonarch value, got {self.method!r}"
            )
        positive_int("exact_blocks", self.exact_blocks)
        steps, every = refresh.check(self.refresh_steps, self.every)
        object.__setattr__(self, "refresh_steps", steps)
        object.__setattr__(self, "every", every)

    @property
    def scale(self) -> float | None:
        """Of the logits: the method's."""
        return self.method.scale

    @property
    def scheduled(self) -> bool:
        """Whether there are refresh steps, and hence something to remember."""
        return self.refresh_steps is not None or self.every is not None

    def __call__(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq heads head_dim"],
        value: Float[Array, "batch seq heads value_dim"],
        *,
        grid: VideoGrid | Shape3,
        state: GuidedState | None = None,
        step: Step | None = None,
        implementation: Implementation = None,
        return_lse: bool = False,
        block_sizes: Any = None,
    ) -> Any:
        """The guided output, or its part `(out, lse)`; with a state, also the new state.

        Raises:
            ValueError: for a state that does not fit, or without a step; for a grid that the
                method's blocks do not divide; as `vm.vmonarch_attention`.
            NotImplementedError: if no named implementation can do the call.
        """
        query, key, value = checks.attention_inputs(query, key, value, same_length=True)
        cut = self.tiling(checks.grid_of(grid, query.shape[1]))
        how = {"implementation": implementation, "block_sizes": block_sizes}
        if state is None:
            part = attend_chosen(
                self.method, self.exact_blocks, query, key, value, cut, None, **how
            )
            return part if return_lse else part.out
        if step is None:
            raise ValueError("expected `step`, the number of the denoising step, beside `state`")
        batch, _, heads, head_dim = query.shape
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
        check_state(state, jax.eval_shape(lambda: self._state(cut, **sizes)))

        def refreshed(state: GuidedState) -> tuple[Part, GuidedState]:
            part, gap = dense_gap(self.method, query, key, value, cut, **how)
            indices, _ = top_blocks(gap, self.exact_blocks)
            return part, GuidedState(indices, jnp.ones_like(state.filled))

        def ordinary(state: GuidedState) -> tuple[Part, GuidedState]:
            return attend_chosen(
                self.method, self.exact_blocks, query, key, value, cut, state.indices, **how
            ), state

        phase = refresh.phase_of(step, state.filled, self.refresh_steps, self.every)
        part, state = by_phase(phase, (refreshed, ordinary), state)
        return (part if return_lse else part.out), state

    def tiling(self, grid: VideoGrid) -> Tiling:
        """The method's blocks on a grid.

        Raises:
            ValueError: if there is more than one tile, if the blocks do not divide the grid, or if
                there are fewer blocks than `exact_blocks`.
        """
        cut = flops.tiling_of(self.method, grid)
        tiles, blocks, _ = cut.sizes
        if tiles > 1:
            raise ValueError(f"`method` must have one tile, the grid, got {tiles} on {grid.shape}")
        if cut.padded != grid.shape:
            raise ValueError(
                f"the blocks of `method` must divide the grid {grid.shape}, got {cut.block}"
            )
        if self.exact_blocks > blocks:
            raise ValueError(
                f"`exact_blocks` must be at most the {blocks} blocks of the grid, "
                f"got {self.exact_blocks}"
            )
        return cut

    def init_state(
        self,
        grid: VideoGrid | Shape3,
        *,
        batch: int,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> GuidedState | None:
        """The state of one layer before the first step, `None` without a schedule."""
        del value_dim, dtype  # nothing in the state depends on them
        cut = self.tiling(VideoGrid.of(grid))
        if not self.scheduled:
            return None
        return self._state(cut, batch=batch, heads=heads, head_dim=head_dim)

    def _state(self, cut: Tiling, *, batch: int, heads: int, head_dim: int) -> GuidedState:
        del head_dim
        # Never used before they are found, but distinct as a list of blocks must be.
        any_blocks = jnp.arange(self.exact_blocks, dtype=jnp.int32)
        indices = jnp.broadcast_to(any_blocks, (batch, heads, cut.sizes[1], self.exact_blocks))
        return GuidedState(indices, jnp.zeros(batch, bool))

    def matmul_flops(
        self, grid: Any, *, heads: int, head_dim: int, value_dim: int, step: int | None = None
    ) -> int:
        """Matmul FLOPs of a step, all heads; without a step, of an ordinary one.

            ordinary    the method's + 2 r b^2 (d + e) for each query block that is not dense anyway
            guess       4 p m^2 d more without a schedule, for the logits and the distances at p of
                        the b positions (`guided_gap.sampled_positions`)
            refresh     dense 2 N^2 (d + e), its masses 2 N^2 d, and the gap: the method without
                        values, 4 d P and 4 d S an iteration but 2 d S in the last one

        for m blocks of b tokens, P = m b^2 and S = b m^2. The pairs that the last L step leaves out
        count: the work is done.
        """
        grid = VideoGrid.of(grid)
        cut = self.tiling(grid)
        _, m, b = cut.sizes
        d, e = head_dim, value_dim
        sizes = {"heads": heads, "head_dim": d, "value_dim": e}
        at = (self.refresh_steps, self.every)
        if self.scheduled and step is not None and refresh.is_refresh(step, *at):
            dense = flops.attention(Dense(), grid, **sizes)
            factors = self.method.steps * 4 * d * (m * b**2 + b * m**2) - 2 * d * b * m**2
            return dense + (2 * grid.tokens**2 * d + factors) * heads
        count = flops.attention(self.method, grid, **sizes)
        dense_frames = checks.frames_of(self.method.recompute_frames, grid)
        if len(dense_frames) == grid.frames:
            return count
        rows = m - int(dense_blocks(cut, dense_frames).sum())
        count += 2 * rows * self.exact_blocks * b**2 * (d + e) * heads
        guess = 4 * len(range(b)[sampled_positions(b)]) * m**2 * d * heads
        return count if self.scheduled else count + guess

    def notes(self, grid: Any, *, heads: int, head_dim: int, **sizes: Any) -> list[str]:
        """What `vm.explain` says of it: the exact share, and where the choice comes from."""
        del heads, head_dim, sizes
        _, m, b = self.tiling(VideoGrid.of(grid)).sizes
        said = [f"exact on {self.exact_blocks} of {m} key blocks of {b} tokens, Monarch elsewhere"]
        if not self.scheduled:
            return [*said, "blocks chosen by mass times curvature on every call"]
        steps = f"steps {', '.join(map(str, sorted({0, *(self.refresh_steps or ())})))}"
        steps = steps if self.every is None else f"every {self.every} steps"
        return [*said, f"dense and a new choice of blocks: {steps}"]
