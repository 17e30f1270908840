"""How far denoising is, and how long it still takes."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ...attention_schedule import Attention, runs_of
from ...demo.progress import Phase, phase
from ..config import WanConfig
from ..request import Request
from .plan import flops_of_each_step

# The time left is reckoned from so many of the last steps: methods differ in FLOPs a second.
_LAST = 5


class Denoising:
    """A bar over denoising steps, by their matmul FLOPs, whose time left is that of steps alone.

    The first step of each program also compiles it, and that of each expert reads the weights, so
    these are not reckoned with; the bar says `?` until a step is. Nor is what happens between
    `update` and `start`.

    Args:
      title: of the bar.
      config: the model.
      request: what is made.
      attention: of the steps.
      done: steps that are done already.

    Example:
      with Denoising("denoising", config, request, vm.VMonarch()) as steps:
          for n in range(request.steps):
              steps.start()
              ...
              steps.update()
    """

    def __init__(
        self, title: str, config: WanConfig, request: Request, attention: Attention, done: int = 0
    ) -> None:
        self._flops = flops_of_each_step(config, request, attention)
        self._programs = _programs(config, request, attention)
        self._done, self._began = done, time.monotonic()
        self._known: set[Any] = set()
        self._rates: list[float] = []
        self._bar: Phase = phase(title, sum(self._flops), sum(self._flops[:done]))
        self._bar.rate = 0.0 if done < request.steps else 1.0

    def __enter__(self) -> Denoising:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @property
    def seconds_left(self) -> float | None:
        """Of the steps to come; `None` while it is not known."""
        rate = self._bar.rate
        return sum(self._flops[self._done :]) / rate if rate else None

    def start(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def update(self) -> None:
        """The step that began last is done."""
        flops, program = self._flops[self._done], self._programs[self._done]
        if program in self._known:
            self._rates.append(flops / max(time.monotonic() - self._began, 1e-9))
            self._bar.rate = statistics.median(self._rates[-_LAST:])
        self._known.add(program)
        self._done += 1
        if self._done == len(self._flops):
            self._bar.rate = 1.0  # whatever it is, nothing is left
        self._bar.update(flops)


def _programs(config: WanConfig, request: Request, attention: Attention) -> list[Any]:
    """Of each step, a value that steps of the same compiled program share."""
    experts = [(part, guidance > 1) for part, guidance in request.experts(config)]
    runs = runs_of(attention, request.steps, config.transformer.layers)
    methods = [methods for first, end, methods in runs for _ in range(first, end)]
    return list(zip(experts, methods, strict=True))
