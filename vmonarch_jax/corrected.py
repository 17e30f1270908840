"""Corrected attention: a cheap method plus what it was last found to be off by."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import checks, flops, memory, refresh
from .dense import dense_attention
from .dispatch import Implementation
from .grid import Shape3, VideoGrid
from .memory import Step
from .methods import Dense, VMonarch
from .units import bytes_text

DTYPES = {"bfloat16": jnp.bfloat16, "float8": jnp.float8_e4m3fn}

# Largest finite float8_e4m3fn: a row is scaled so that its largest entry is this.
FLOAT8_MOST = 448.0


class CorrectedState(NamedTuple):
    """What `vm.Corrected` remembers of one layer.

    Args:
        residual: `dense - method` of the last refresh, `[batch, heads, seq, value_dim]`, in
            bfloat16 or float8_e4m3fn.
        scale: by which a float8 residual is multiplied, `[batch, heads, seq]`, float32; `None`
            with bfloat16.
        filled: `[batch]`, whether there has been a refresh.
        inner: the state of the method itself; `None` where it remembers nothing.
    """

    residual: Float[Array, "batch heads seq value_dim"]
    scale: Float[Array, "batch heads seq"] | None
    filled: Bool[Array, " batch"]
    inner: Any


@dataclasses.dataclass(frozen=True)
class Corrected:
    """Any method, corrected by its error at the last refresh; training-free.

        refresh step     out = dense(q, k, v) ;  residual = dense(q, k, v) - method(q, k, v)
        other steps      out = method(q, k, v) + residual

    From one denoising step to the next the error of a cheap attention changes more slowly than
    attention itself, so a residual serves for many steps. On refresh steps the output is exact. The
    state is the residual, one array of the size of the output in each layer.

    Without a state a call is the method itself. There is no certificate: `method + residual` is
    not attention by any row-stochastic matrix, so it has no log-sum-exp.

    The first call with a fresh state is a refresh whatever the schedule says, and so is step 0.
    With a Python int as step, a step of the schedule compiles the refresh alone; any other step
    compiles both under `jit`, because only the state tells whether it is fresh.

    A method that is dense itself on some steps (a search of `vm.AdaSpa`, a refresh of `vm.Guided`)
    leaves a residual of zero there: let the two refresh on different steps.

    Args:
        method: the method value to correct, one that remembers something included.
        refresh_steps: denoising steps, counted from 0, that refresh.
        every: refresh on each step that is a multiple of it. `None` and no `refresh_steps`: 10.
        dtype: of the residual: "bfloat16", or "float8" (float8_e4m3fn with a float32 scale for
            each row and head), half the memory.

    Raises:
        ValueError: if a field is wrong.

    Example:
        >>> method = vm.Corrected(vm.VMonarch(), every=10)
        >>> state = vm.init_state(method, grid, batch=1, heads=12, head_dim=128)
        >>> for step in range(50):
        ...     out, state = vm.attend(method, q, k, v, grid=grid, state=state, step=step)

    Reference: this library; figures in `benchmarks/results/past_papers.md`.
    """

    method: Any = VMonarch()  # noqa: RUF009 (frozen)
    refresh_steps: tuple[int, ...] | None = None
    every: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        checks.method_value(self.method)
        every = 10 if self.refresh_steps is None and self.every is None else self.every
        steps, every = refresh.check(self.refresh_steps, every)
        object.__setattr__(self, "refresh_steps", steps)
        object.__setattr__(self, "every", every)
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {tuple(DTYPES)}, got {self.dtype!r}")

    @property
    def scale(self) -> float | None:
        """Of the logits: the method's."""
        return getattr(self.method, "scale", None)

    def __call__(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq heads head_dim"],
        value: Float[Array, "batch seq heads value_dim"],
        *,
        grid: VideoGrid | Shape3,
        state: CorrectedState | None = None,
        step: Step | None = None,
        implementation: Implementation = None,
        return_lse: bool = False,
        block_sizes: Any = None,
    ) -> Any:
        """The corrected output, and the new state where one is given.

        Raises:
            ValueError: with `return_lse=True`; for a state that does not fit, or without a step;
                as the method itself.
        """
        if return_lse:
            raise ValueError(
                "expected return_lse=False, got True: the sum of an attention and a residual is "
                "no attention, and has no log-sum-exp and no certificate"
            )
        how = {"implementation": implementation, "block_sizes": block_sizes}
        if state is None:
            return self.method(query, key, value, grid=grid, **how)
        query, key, value = checks.attention_inputs(query, key, value, same_length=True)
        self._check_state(state, query, value, grid)

        def cheap(state: CorrectedState) -> Any:
            return memory.attend(
                self.method, query, key, value, grid=grid, state=state.inner, step=step, **how
            )

        def refreshed(state: CorrectedState) -> Any:
            exact: Any = dense_attention(query, key, value, scale=self.scale, **how)
            out, inner = cheap(state)
            off = exact.astype(jnp.float32) - out.astype(jnp.float32)
            return exact, self._state(off.swapaxes(1, 2), inner)

        def ordinary(state: CorrectedState) -> Any:
            out, inner = cheap(state)
            known = self._residual(state).swapaxes(1, 2)
            out = (out.astype(jnp.float32) + known).astype(out.dtype)
            return out, state._replace(inner=inner)

        if step is None:
            raise ValueError("expected `step`, the number of the denoising step, beside `state`")
        phase = refresh.phase_of(step, state.filled, self.refresh_steps, self.every)
        return memory.by_phase(phase, (refreshed, ordinary), state)

    def init_state(
        self,
        grid: VideoGrid | Shape3,
        *,
        batch: int,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> CorrectedState:
        """The state of one layer before the first step; what `vm.init_state` calls."""
        grid = VideoGrid.of(grid)
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "value_dim": value_dim}
        rows, narrow = (batch, heads, grid.tokens), self.dtype == "float8"
        return CorrectedState(
            residual=jnp.zeros((*rows, value_dim), DTYPES[self.dtype]),
            scale=jnp.zeros(rows, jnp.float32) if narrow else None,
            filled=jnp.zeros(batch, bool),
            inner=memory.init_state(self.method, grid, **sizes, dtype=dtype),
        )

    def matmul_flops(
        self, grid: Any, *, heads: int, head_dim: int, value_dim: int, step: int | None = None
    ) -> int:
        """The method's matmul FLOPs; on a refresh step those of dense attention as well."""
        sizes = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim}
        count = flops.attention(self.method, grid, **sizes, step=step)
        if step is not None and refresh.is_refresh(step, self.refresh_steps, self.every):
            count += flops.attention(Dense(), grid, **sizes)
        return count

    def notes(self, grid: Any, *, heads: int, head_dim: int, batch: int, dtype: Any) -> list[str]:
        """What `vm.explain` says of it: when it refreshes, and the bytes of the residual."""
        if self.every is None:
            when = f"steps {', '.join(map(str, sorted({0, *(self.refresh_steps or ())})))}"
        else:
            when = f"every {self.every} steps"
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
        state = jax.eval_shape(lambda: self.init_state(grid, **sizes, dtype=dtype))
        own = jax.tree.leaves(state[:2])
        held = sum(x.size * x.dtype.itemsize for x in own)
        said = [
            f"dense attention on top at a refresh: {when}",
            f"residual in {own[0].dtype}: {bytes_text(held)} a layer",
            "no log-sum-exp, no certificate",
        ]
        if hasattr(self.method, "notes"):
            inner = self.method.notes(grid, **sizes, dtype=dtype)
            said += [f"corrected method: {line}" for line in inner]
        return said

    def _state(self, residual: Float[Array, "batch heads seq value_dim"], inner: Any) -> Any:
        """A filled state. The residual is a constant to every later step: no gradient."""
        residual = jax.lax.stop_gradient(residual)
        filled = jnp.ones(residual.shape[0], bool)
        if self.dtype == "bfloat16":
            return CorrectedState(residual.astype(DTYPES[self.dtype]), None, filled, inner)
        scale = jnp.abs(residual).max(-1) / FLOAT8_MOST
        scaled = residual / jnp.where(scale > 0, scale, 1)[..., None]
        return CorrectedState(scaled.astype(DTYPES[self.dtype]), scale, filled, inner)

    @staticmethod
    def _residual(state: CorrectedState) -> Float[Array, "batch heads seq value_dim"]:
        residual = state.residual.astype(jnp.float32)
        return residual if state.scale is None else residual * state.scale[..., None]

    def _check_state(self, state: Any, query: Any, value: Any, grid: Any) -> None:
        checks.grid_of(grid, query.shape[1])
        batch, _, heads, head_dim = query.shape
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
        sizes |= {"value_dim": value.shape[3], "dtype": query.dtype}
        memory.check_state(state, jax.eval_shape(lambda: self.init_state(grid, **sizes)))
