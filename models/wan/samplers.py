"""Samplers for flow matching, as values: Euler here, the multistep ones beside, all by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .unipc import SPACINGS, TIMES, DPMSolver, UniPC, check_steps, shifted


class EulerState(NamedTuple):
    """What Euler carries from step to step: the sample that the model sees next."""

    x: Float[Array, "batch *shape"]


@dataclasses.dataclass(frozen=True)
class Euler:
    """Euler's method along the flow: `x <- x + (t - s) v` from noise level s to t.

    Attributes:
      steps: denoising steps.
      shift: of the noise levels, `shift s / (1 + (shift - 1) s)`, evenly spaced between the
        shifted ends 1 and 1/1000 and then shifted.

    Raises:
      ValueError: a field is out of range.

    Example:
      sampler = Euler(steps=50, shift=5.0)
      latents = follow(sampler, noise, lambda x, time: model(x, time))

    Reference: equal to `FlowMatchEulerDiscreteScheduler` of Diffusers with a `shift`.
    """

    steps: int = 50
    shift: float = 5.0

    def __post_init__(self) -> None:
        check_steps(self.steps, self.shift)

    @property
    def sigmas(self) -> Float[np.ndarray, " steps_1"]:
        """Noise level before each step and after the last one, which is 0."""
        least = shifted(np.array([1 / TIMES], np.float32), self.shift)[0]
        levels = shifted(np.linspace(1.0, least, self.steps), self.shift)
        return np.append(levels, 0.0).astype(np.float32)

    @property
    def times(self) -> Float[np.ndarray, " steps"]:
        """The time that the model is told at each step, in 0..1000."""
        return self.sigmas[:-1] * np.float32(TIMES)

    def init(self, x: Float[Array, "batch *shape"]) -> EulerState:
        """The state before the first step, from noise `x`; float32."""
        return EulerState(jnp.asarray(x, jnp.float32))

    def step(
        self,
        state: EulerState,
        velocity: Float[Array, "batch *shape"],
        index: int | Int[Array, ""],
    ) -> EulerState:
        """The state after step `index`, given the model's velocity at `state.x`."""
        sigmas = jnp.asarray(self.sigmas)
        dt = sigmas[index + 1] - sigmas[index]
        return EulerState(state.x + dt * velocity.astype(jnp.float32))


#: By name; each is made of `steps` and `shift`.
SAMPLERS = {"unipc": UniPC, "dpm++": DPMSolver, "euler": Euler}

Sampler = UniPC | Euler


def sampler_of(name: str, steps: int, shift: float, spacing: str = SPACINGS[0]) -> Sampler:
    """Returns the sampler of that name.

    Args:
      name: of `SAMPLERS`.
      steps: denoising steps.
      shift: of the noise levels.
      spacing: of the noise levels, as in Diffusers or as in the "original" repository, which has
        no "euler".

    Raises:
      ValueError: no sampler has that name, it has no such spacing, or a number is out of range.
    """
    if name not in SAMPLERS:
        raise ValueError(f"expected a sampler of {sorted(SAMPLERS)}, got {name!r}")
    if name != "euler":
        return SAMPLERS[name](steps=steps, shift=shift, spacing=spacing)
    if spacing != SPACINGS[0]:
        raise ValueError(f"expected spacing {SPACINGS[0]!r} of sampler 'euler', got {spacing!r}")
    return Euler(steps=steps, shift=shift)


def follow(
    sampler: Sampler,
    x: Float[Array, "batch *shape"],
    velocity: Callable[[Array, Array], Array],
) -> Float[Array, "batch *shape"]:
    """Samples from noise `x` in one `lax.scan`; `velocity(x, time)` with the time in 0..1000."""

    def body(state: Any, step: tuple[Array, Array]) -> tuple[Any, None]:
        index, time = step
        return sampler.step(state, velocity(state.x, time), index), None

    steps = jnp.arange(sampler.steps), jnp.asarray(sampler.times)
    return jax.lax.scan(body, sampler.init(x), steps)[0].x
