"""How far a method's video and attention are from those of another: PSNR, SSIM, certificate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import vmonarch_jax as vm
from vmonarch_jax.memory import Step

from ...attention_schedule import Attention, runs_of
from ..conditions import Conditions
from ..memory import Memory
from ..pipeline import Progress, WanPipeline
from ..request import Request

# Rows of each head that the certificate looks at: a dense pass over these alone.
_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Watched:
    """A method that also reports its certificate: mean and largest KL of evenly spaced rows.

    Attributes:
      method: what runs.
      record: called as `record(mean, largest)`, layer after layer; with NaN of `vm.Corrected`,
        which has no certificate.
    """

    method: Any
    record: Callable[[Any, Any], None]

    @classmethod
    def of(cls, method: Any, record: Callable[[Any, Any], None]) -> Watched:
        """The method watched, which remembers what the method does."""
        return (_WatchedRemembering if vm.remembers(method) else cls)(method, record)

    def __call__(
        self, query: Array, key: Array, value: Array, *, grid: vm.VideoGrid, state: Any = None,
        step: Step | None = None,
    ) -> Any:  # fmt: skip
        """The method's attention."""
        certified = not isinstance(self.method, vm.Corrected)
        found, after = vm.attend(
            self.method, query, key, value, grid=grid, state=state, step=step,
            **({"return_lse": True} if certified else {}),
        )  # fmt: skip
        out = found.out if certified else found
        mean = largest = jnp.nan
        if certified:
            gap = self._gap(query, key, found.lse, grid)
            mean, largest = gap.mean(), gap.max()
        # in order: the layers run one after the other, and say nothing else about which they are
        jax.debug.callback(self.record, mean, largest, ordered=True)
        return out if state is None else (out, after)

    @staticmethod
    def _gap(query: Array, key: Array, lse: Array, grid: vm.VideoGrid) -> Array:
        rows = np.unique(np.linspace(0, grid.tokens - 1, _ROWS).astype(np.int32))
        return vm.attention_gap(query, key, lse, grid=grid, rows=jnp.asarray(rows))


class _WatchedRemembering(Watched):
    """Of a method that remembers."""

    def init_state(self, grid: Any, **sizes: Any) -> Any:
        """The method's."""
        return self.method.init_state(grid, **sizes)


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

    `None` where a layer's method has no certificate.

    Args:
      pipeline: the model.
      request: what is made.
      conditions: as `WanPipeline.conditions`.
      index: of the step.
      progress: before it.
      attention: the methods.
      batched: as `WanPipeline.denoise`; in two calls the second's numbers count too.
    """
    layers = pipeline.config.transformer.layers
    runs = runs_of(attention, request.steps, layers)
    methods = next(methods for first, end, methods in runs if first <= index < end)
    seen: list[tuple[float, float]] = []

    def record(mean: Any, largest: Any) -> None:
        seen.append((float(mean), float(largest)))

    # one watcher for all layers of a method, so that the program does not grow with the layers
    known = (method for memory in progress.attention for method in memory.methods)
    watchers = {method: Watched.of(method, record) for method in (*methods, *known)}
    watched = tuple(watchers[method] for method in methods)
    progress = progress._replace(
        attention=tuple(
            Memory(tuple(watchers[method] for method in memory.methods), memory.states)
            for memory in progress.attention
        )
    )
    after = pipeline.step(request, conditions, index, progress, attention=watched, batched=batched)
    jax.block_until_ready(after)
    jax.effects_barrier()
    calls = np.array(seen).reshape(-1, layers, 2)
    rows = zip(calls[..., 0].mean(0), calls[..., 1].max(0), strict=True)
    return [
        {"mean_kl": None, "max_kl": None}
        if np.isnan(mean)
        else {"mean_kl": float(mean), "max_kl": float(largest)}
        for mean, largest in rows
    ]


def certified_step(attention: Attention, steps: int, layers: int) -> int:
    """A step in the middle of those that do not run under dense attention alone."""
    sparse = [
        n
        for first, end, methods in runs_of(attention, steps, layers)
        for n in range(first, end)
        if any(not isinstance(method, vm.Dense) for method in methods)
    ]
    return sparse[len(sparse) // 2] if sparse else steps // 2


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
