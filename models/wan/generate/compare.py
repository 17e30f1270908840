"""How far a method's video and attention are from those of another: PSNR, SSIM, certificate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import vmonarch_jax as vm
from vmonarch_jax.memory import Step

from ...attention_schedule import Attention, flops_of_steps, runs_of
from ..conditions import Conditions
from ..config import WanConfig
from ..memory import Memory
from ..pipeline import Progress, WanPipeline
from ..request import Request

# Rows of each head that the certificate looks at: a dense pass over these alone.
_ROWS = 256


class WatchedState(NamedTuple):
    """What `Watched` remembers of one layer: the certificate of its last call.

    It lies as every state does, so it comes out of loops over layers and of meshes as one.

    Attributes:
      mean: KL to dense attention in nats, mean over the rows looked at; NaN before a call, and of
        methods without certificate.
      largest: likewise, the largest.
      inner: the method's own state; `None` where it remembers nothing.
    """

    mean: Float[Array, "batch heads"]
    largest: Float[Array, "batch heads"]
    inner: Any


@dataclasses.dataclass(frozen=True)
class Watched:
    """A method that also remembers its certificate: mean and largest KL of evenly spaced rows.

    Attributes:
      method: what runs; `vm.Corrected` has no certificate.

    Example:
      state = vm.init_state(Watched(method), grid, batch=1, heads=12, head_dim=128)
      out, state = vm.attend(Watched(method), q, k, v, grid=grid, state=state, step=0)
      worst = state.largest.max()
    """

    method: Any

    def init_state(
        self, grid: Any, *, batch: int, heads: int, head_dim: int, value_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> WatchedState:  # fmt: skip
        """No certificate yet, and the method's own state."""
        nothing = jnp.full((batch, heads), jnp.nan, jnp.float32)
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "value_dim": value_dim}
        return WatchedState(
            nothing, nothing, vm.init_state(self.method, grid, **sizes, dtype=dtype)
        )

    def __call__(
        self, query: Array, key: Array, value: Array, *, grid: vm.VideoGrid,
        state: WatchedState | None = None, step: Step | None = None,
    ) -> Any:  # fmt: skip
        """The method's attention; with a state also the next, which has the certificate."""
        if state is None:
            return self.method(query, key, value, grid=grid)
        certified = not isinstance(self.method, vm.Corrected)
        found, inner = vm.attend(
            self.method, query, key, value, grid=grid, state=state.inner, step=step,
            **({"return_lse": True} if certified else {}),
        )  # fmt: skip
        if not certified:
            return found, state._replace(inner=inner)
        gap = self._gap(query, key, found.lse, grid)
        return found.out, WatchedState(gap.mean(1), gap.max(1), inner)

    @staticmethod
    def _gap(query: Array, key: Array, lse: Array, grid: vm.VideoGrid) -> Array:
        rows = np.unique(np.linspace(0, grid.tokens - 1, _ROWS).astype(np.int32))
        return vm.attention_gap(query, key, lse, grid=grid, rows=jnp.asarray(rows))


def certify(
    pipeline: WanPipeline,
    request: Request,
    conditions: Conditions,
    index: int,
    progress: Progress,
    attention: Attention,
    batched: bool,
) -> list[dict[str, float | None]]:
    """Mean and largest KL to dense attention of each layer, in nats, on one denoising step.

    Over all heads and the rows looked at, of all videos of the step. `None` where a layer's method
    has no certificate.

    Args:
      pipeline: the model, on one device or a mesh.
      request: what is made.
      conditions: as `WanPipeline.conditions`.
      index: of the step.
      progress: before it; left as it is.
      attention: the methods.
      batched: as `WanPipeline.denoise`; in two calls the second's numbers count too.
    """
    sizes = pipeline.config.transformer
    runs = runs_of(attention, request.steps, sizes.layers)
    methods = next(methods for first, end, methods in runs if first <= index < end)
    known = tuple(_watched(memory, methods, sizes.heads) for memory in progress.attention)
    after = pipeline.step(
        request, conditions, index, progress._replace(attention=known),
        attention=tuple(map(Watched, methods)), batched=batched, forget=False,
    )  # fmt: skip
    states = {
        method: [jax.device_get(memory.of(Watched(method))[:2]) for memory in after.attention]
        for method in set(methods)
    }
    rows = []
    for layer, method in enumerate(methods):
        mean, largest = zip(*((a[layer], b[layer]) for a, b in states[method]), strict=True)
        rows.append({"mean_kl": _number(np.mean(mean)), "max_kl": _number(np.max(largest))})
    return rows


def _watched(memory: Memory, methods: Sequence[Any], heads: int) -> Memory:
    """What the methods of a step remember, each watched."""
    kept = {m: s for m, s in zip(memory.methods, memory.states, strict=True) if m in methods}
    states = []
    for state in kept.values():
        layers, batch = jax.tree.leaves(state)[0].shape[:2]
        nothing: Any = np.full((layers, batch, heads), np.nan, np.float32)
        states.append(WatchedState(nothing, nothing, state))
    return Memory(tuple(map(Watched, kept)), tuple(states))


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def certified_step(attention: Attention, request: Request, config: WanConfig) -> int:
    """A step in the middle of those where attention costs least, dense steps aside.

    Searches and refreshes cost more: they are dense, or nearly, and say nothing of other steps.
    """
    sizes, steps = config.transformer, request.steps
    sparse = [
        n
        for first, end, methods in runs_of(attention, steps, sizes.layers)
        for n in range(first, end)
        if any(not isinstance(method, vm.Dense) for method in methods)
    ]
    costs = flops_of_steps(
        attention, steps, sizes.layers, request.grid(config), heads=sizes.heads,
        head_dim=sizes.head_dim,
    )  # fmt: skip
    least = min((costs[n] for n in sparse), default=0)
    usual = [n for n in sparse if costs[n] == least] or list(range(steps))
    return usual[len(usual) // 2]


def describe(certificate: list[dict[str, float | None]], psnr: float, ssim: float) -> str:
    """The report of a comparison, one line a layer."""
    lines = [f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"]
    if certificate:
        lines.append("layer  mean KL   max KL")
    for layer, row in enumerate(certificate):
        if row["mean_kl"] is None:
            lines.append(f"{layer:>5}  no certificate")
        else:
            lines.append(f"{layer:>5}  {row['mean_kl']:.2e}  {row['max_kl']:.2e}")
    return "\n".join(lines)
