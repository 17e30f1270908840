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

from ...attention_schedule import Attention, runs_of
from ..conditions import Conditions
from ..pipeline import WanPipeline
from ..request import Request

# Rows of each head that the certificate looks at: a dense pass over these alone.
_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Watched:
    """A method that also reports its certificate: mean and largest KL of evenly spaced rows.

    Attributes:
      method: what runs; it must take `return_lse=True`.
      record: called as `record(mean, largest)`, layer after layer.
    """

    method: Any
    record: Callable[[Any, Any], None]

    def __call__(self, query: Array, key: Array, value: Array, *, grid: vm.VideoGrid) -> Array:
        """The method's attention."""
        out, lse = self.method(query, key, value, grid=grid, return_lse=True)
        rows = np.unique(np.linspace(0, grid.tokens - 1, _ROWS).astype(np.int32))
        gap = vm.attention_gap(query, key, lse, grid=grid, rows=jnp.asarray(rows))
        # in order: the layers run one after the other, and say nothing else about which they are
        jax.debug.callback(self.record, gap.mean(), gap.max(), ordered=True)
        return out


def certify(
    pipeline: WanPipeline,
    request: Request,
    conditions: Conditions,
    index: int,
    state: Any,
    attention: Attention,
    batched: bool,
) -> list[dict[str, float]]:
    """Mean and largest KL to dense attention of each layer, in nats, on one denoising step.

    Args:
      pipeline: the model.
      request: what is made.
      conditions: as `WanPipeline.conditions`.
      index: of the step.
      state: the sampler's before it.
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
    watchers = {method: Watched(method, record) for method in methods}
    watched = tuple(watchers[method] for method in methods)
    after = pipeline.step(request, conditions, index, state, attention=watched, batched=batched)
    jax.block_until_ready(after)
    jax.effects_barrier()
    calls = np.array(seen).reshape(-1, layers, 2)
    return [
        {"mean_kl": float(mean), "max_kl": float(largest)}
        for mean, largest in zip(calls[..., 0].mean(0), calls[..., 1].max(0), strict=True)
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


def describe(certificate: list[dict[str, float]], psnr: float, ssim: float) -> str:
    """The report of a comparison, one line a layer."""
    lines = [f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"]
    if certificate:
        lines.append("layer  mean KL   max KL")
    for layer, row in enumerate(certificate):
        lines.append(f"{layer:>5}  {row['mean_kl']:.2e}  {row['max_kl']:.2e}")
    return "\n".join(lines)
