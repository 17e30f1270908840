"""Which attention method runs on which denoising step and in which layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

import vmonarch_jax as vm

from .layers import AttentionMethod

_Overrides = tuple[tuple[int, AttentionMethod], ...]


@dataclasses.dataclass(frozen=True)
class AttentionSchedule:
    """A method for most of the sampling, and others for its beginning and for some layers.

    The first steps lay out the video and are the most sensitive to attention, and so are the
    outermost layers. What holds first decides: `steps`, `warmup`, `layers`, `method`.

    A frozen, hashable value: `at` is looked up while a step is traced, so there is one compiled
    program for each distinct tuple of methods, and no branch in it. Methods that remember something
    keep it for each layer while others run, and see the steps of the whole schedule: one that is
    called first behind its own first steps does then what it would have done on these.

    Attributes:
      method: where nothing else is said.
      warmup_steps: first steps, in all layers, that `warmup` runs.
      warmup: the method of the first steps.
      layers: methods of some layers, `{layer: method}`; negative layers count from the end.
      steps: methods of some steps, `{step: method}`; negative steps count from the end.

    Raises:
      ValueError: `warmup_steps` is negative, or an override names a layer or step twice.
      TypeError: a method is not hashable or not callable.

    Example:
      schedule = AttentionSchedule(vm.VMonarch(), warmup_steps=10, layers={0: vm.Dense()})
      methods = schedule.at(step=12, steps=50, layers=30)
    """

    method: AttentionMethod = vm.VMonarch()  # noqa: RUF009 (frozen)
    warmup_steps: int = 0
    warmup: AttentionMethod = vm.Dense()  # noqa: RUF009 (frozen)
    layers: Mapping[int, AttentionMethod] | _Overrides = ()
    steps: Mapping[int, AttentionMethod] | _Overrides = ()

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"expected warmup_steps >= 0, got {self.warmup_steps}")
        for name in ("layers", "steps"):
            given = getattr(self, name)
            pairs = tuple(sorted(dict(given).items(), key=lambda pair: pair[0]))
            if len(pairs) != len(given):
                raise ValueError(f"expected each of {name} once, got {given}")
            object.__setattr__(self, name, pairs)
        for method in (self.method, self.warmup, *dict(self.layers).values(),
                       *dict(self.steps).values()):  # fmt: skip
            if not callable(method):
                raise TypeError(f"expected a method value such as vm.VMonarch(), got {method!r}")
            hash(method)

    def at(self, step: int, steps: int, layers: int) -> tuple[AttentionMethod, ...]:
        """The method of each of `layers` layers on step `step` of `steps`, counted from 0.

        Raises:
          ValueError: `step` is not in `[0, steps)`, or an override names a layer or a step that
            there is none of.
        """
        if not 0 <= step < steps:
            raise ValueError(f"expected a step in [0, {steps}), got {step}")
        by_step = _count_from_start(self.steps, steps, "step")
        by_layer = _count_from_start(self.layers, layers, "layer")
        if step in by_step:
            return (by_step[step],) * layers
        if step < self.warmup_steps:
            return (self.warmup,) * layers
        return tuple(by_layer.get(layer, self.method) for layer in range(layers))

    def runs(self, steps: int, layers: int) -> list[tuple[int, int, tuple[AttentionMethod, ...]]]:
        """Neighbouring steps of the same methods together: `(first, end, methods)`, in order."""
        found: list[tuple[int, int, tuple[AttentionMethod, ...]]] = []
        for step in range(steps):
            methods = self.at(step, steps, layers)
            if found and found[-1][2] == methods:
                found[-1] = (found[-1][0], step + 1, methods)
            else:
                found.append((step, step + 1, methods))
        return found


#: What a sampler takes as `attention=`: one method, one a layer, or a schedule.
Attention = AttentionMethod | Sequence[AttentionMethod] | AttentionSchedule


def runs_of(
    attention: Attention, steps: int, layers: int
) -> list[tuple[int, int, tuple[AttentionMethod, ...]]]:
    """`AttentionSchedule.runs` of whatever a sampler takes as `attention=`.

    Raises:
      ValueError: not as many methods as layers, or as `AttentionSchedule.at`.
    """
    if isinstance(attention, AttentionSchedule):
        return attention.runs(steps, layers)
    methods = tuple(attention) if isinstance(attention, Sequence) else (attention,) * layers
    if len(methods) != layers:
        raise ValueError(f"expected {layers} attention methods, got {len(methods)}")
    return [(0, steps, methods)]


def flops_of_steps(
    attention: Attention,
    steps: int,
    layers: int,
    grid: vm.VideoGrid,
    *,
    heads: int,
    head_dim: int,
    anew: Collection[int] = (),
) -> list[int]:
    """Matmul FLOPs of all layers' attention on each step of a sampler, for one call of the model.

    A method that remembers is counted step by step. Where it is called for the first time behind
    its first steps, it makes up for what it missed (its dense pass, its search): the dearest of
    the steps up to then is counted.

    Args:
      attention: what the sampler takes.
      steps: of the sampler.
      layers: of the model.
      grid: of its tokens.
      heads: of a layer.
      head_dim: of query, key and value.
      anew: steps before which all that was remembered is let go.

    Raises:
      ValueError: as `runs_of`, or a method does not fit the grid.

    Example:
      sum(flops_of_steps(schedule, 50, 30, grid, heads=12, head_dim=128))
    """

    @functools.cache
    def of(method: AttentionMethod, step: int | None) -> int:
        return vm.flops.attention(method, grid, heads=heads, head_dim=head_dim, step=step)

    counts, called = [0] * steps, set()
    for first, end, methods in runs_of(attention, steps, layers):
        for step in range(first, end):
            if step in anew:
                called.clear()
            for place in enumerate(methods):
                if not vm.remembers(place[1]):
                    counts[step] += of(place[1], None)
                    continue
                missed = range(step) if place not in called else ()
                counts[step] += max(of(place[1], n) for n in (*missed, step))
                called.add(place)
    return counts


def _count_from_start(
    overrides: Mapping[int, AttentionMethod] | _Overrides, length: int, what: str
) -> dict[int, AttentionMethod]:
    found: dict[int, AttentionMethod] = {}
    for index, method in dict(overrides).items():
        if not -length <= index < length:
            raise ValueError(f"expected a {what} in [{-length}, {length}), got {index}")
        if index % length in found:
            raise ValueError(f"expected each {what} once, got {index} and {index % length}")
        found[index % length] = method
    return found
