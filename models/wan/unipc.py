"""UniPC and DPM-Solver++: multistep methods for flow matching, each as a table of weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

#: Times of the models: 0 is the video, 1000 the noise.
TIMES = 1000
# The first step starts this far from pure noise, whose log-SNR is minus infinity.
_FIRST = 1e-6

SPACINGS = ("diffusers", "original")
# The training levels of the original repository end here, and are kept in float32.
_MOST = float(np.float32(1 - 1 / TIMES))


class UniPCState(NamedTuple):
    """What UniPC carries from step to step.

    `x` is the sample that the model sees next. The others are zeros before the first step: the
    corrected sample of the last step, and the clean samples that the last two steps predicted.
    """

    x: Float[Array, "batch *shape"]
    last: Float[Array, "batch *shape"]
    clean: Float[Array, "batch *shape"]
    older: Float[Array, "batch *shape"]


def check_steps(steps: int, shift: float) -> None:
    """Raises `ValueError` unless a sampler can take so many steps with that shift."""
    if steps < 1 or not shift > 0:
        raise ValueError(f"expected steps >= 1 and shift > 0, got {steps} and {shift}")


def shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    """Noise levels moved towards the noise, as `flow.shift_time`, in the precision of `levels`."""
    return shift * levels / (1 + (shift - 1) * levels)


@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC with `B(h) = e^h - 1` on the predicted clean sample.

    With noise level s, `lambda = log((1 - s) / s)` and `m = x - s v` the clean sample that velocity
    v predicts, a step from s to t of `h = lambda_t - lambda_s` and `E = 1 - e^-h` is

        corrector  x <- t/s x_last + (1-t) E (m_1 + r_1 (m_2 - m_1) / k + r_2 (m - m_1))
        predictor  x <- t/s x      + (1-t) E (m + (m_1 - m) / (2 k))

    where `m_1`, `m_2` come from the last two steps, `k` is the ratio of the last `h` to this one
    (negative), and r solves the order conditions. The corrector works with the numbers of the step
    before; it costs no call of the model. Both are linear in what is carried, with weights that
    depend on the noise levels alone, so they are computed once, in float64, and a step is a
    weighted sum: the same under `lax.scan`, `jit` and on the host.

    Attributes:
      steps: denoising steps.
      shift: of the noise levels, `shift s / (1 + (shift - 1) s)`.
      order: 1 or 2; the first and the last step have order 1.
      spacing: of the noise levels before the shift. "diffusers": from 1 towards 1/1000, whole
        times; "original": from 0.999 towards 0, as in the repositories of Wan.

    Raises:
      ValueError: a field is out of range.

    Example:
      sampler = UniPC(steps=50, shift=5.0)
      state = sampler.init(noise)
      for n in range(sampler.steps):
          state = sampler.step(state, model(state.x, sampler.times[n]), n)
      latents = state.x

    Reference: UniPC (arXiv 2302.04867), algorithms 5 and 6; equal to `UniPCMultistepScheduler` of
    Diffusers with `use_flow_sigmas` and to `FlowUniPCMultistepScheduler` of Wan.
    """

    steps: int = 50
    shift: float = 5.0
    order: int = 2
    spacing: str = "diffusers"

    # Noise levels before the shift go from the first towards the second.
    ends: ClassVar[dict[str, tuple[float, float]]] = {
        "diffusers": (1.0, 1 / TIMES),
        "original": (_MOST, 0.0),
    }
    most: ClassVar[float] = 1 - _FIRST
    corrects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps(self.steps, self.shift)
        if self.order not in (1, 2):
            raise ValueError(f"expected order 1 or 2, got {self.order}")
        if self.spacing not in SPACINGS:
            raise ValueError(f"expected a spacing of {SPACINGS}, got {self.spacing!r}")

    @property
    def sigmas(self) -> Float[np.ndarray, " steps_1"]:
        """Noise level before each step and after the last one, which is 0."""
        return np.append(self._levels, 0.0).astype(np.float32)

    @property
    def times(self) -> Float[np.ndarray, " steps"]:
        """The time that the model is told at each step, in 0..1000, cut to whole numbers."""
        return np.floor(self._levels * TIMES).astype(np.float32)

    @property
    def _levels(self) -> Float[np.ndarray, " steps"]:
        levels = np.linspace(*self.ends[self.spacing], self.steps + 1)[:-1]
        return np.minimum(shifted(levels, self.shift), self.most)

    def init(self, x: Float[Array, "batch *shape"]) -> UniPCState:
        """The state before the first step, from noise `x`; float32."""
        x = jnp.asarray(x, jnp.float32)
        zeros = jnp.zeros_like(x)
        return UniPCState(x, zeros, zeros, zeros)

    def step(
        self,
        state: UniPCState,
        velocity: Float[Array, "batch *shape"],
        index: int | Int[Array, ""],
    ) -> UniPCState:
        """The state after step `index`, given the model's velocity at `state.x`."""
        correct, predict = (jnp.asarray(table)[index] for table in _weights(self))
        sigma = jnp.asarray(self.sigmas)[index]
        m = state.x - sigma * velocity.astype(jnp.float32)
        x = (
            correct[0] * state.x + correct[1] * state.last
            + correct[2] * m + correct[3] * state.clean + correct[4] * state.older
        )  # fmt: skip
        following = predict[0] * x + predict[1] * m + predict[2] * state.clean
        return UniPCState(following, x, m, state.clean)


@dataclasses.dataclass(frozen=True)
class DPMSolver(UniPC):
    """DPM-Solver++ of order 2, multistep: the predictor of `UniPC` alone.

    Formula: `x <- t/s x + (1-t) E (m + (m - m_1) / (2 r))` with r the ratio of the last `h` to this
    one, which is UniPC's predictor with `r = -k`.

    Attributes:
      steps: denoising steps.
      shift: of the noise levels, `shift s / (1 + (shift - 1) s)`.
      order: 1 or 2; the first and the last step have order 1.
      spacing: of the noise levels before the shift. "diffusers": from 0.999 towards 0; "original":
        from 1 towards 0, so that the second step has order 1, too.

    Raises:
      ValueError: a field is out of range.

    Reference: DPM-Solver++ (arXiv 2211.01095), algorithm 2; equal to `DPMSolverMultistepScheduler`
    of Diffusers with `use_flow_sigmas` and to `FlowDPMSolverMultistepScheduler` of Wan.
    """

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        "diffusers": (1 - 1 / TIMES, 0.0),
        "original": (1.0, 0.0),
    }
    most: ClassVar[float] = 1.0
    corrects: ClassVar[bool] = False


@functools.lru_cache(maxsize=32)
def _weights(sampler: UniPC) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the corrector on (x, last, m, m_1, m_2) and of the predictor on (x, m, m_1)."""
    sigma = sampler.sigmas.astype(np.float64)
    with np.errstate(divide="ignore"):
        snr = np.log1p(-sigma) - np.log(sigma)  # infinite where there is no noise, or nothing else
    correct, predict = np.zeros((sampler.steps, 5)), np.zeros((sampler.steps, 3))
    correct[0 if sampler.corrects else slice(None), 0] = 1  # nothing to correct with at first

    def order_of(n: int) -> int:
        return min(sampler.order, n + 1, sampler.steps - n)

    for n in range(sampler.steps):
        ratio, h = sigma[n + 1] / sigma[n], snr[n + 1] - snr[n]
        gain = (1 - sigma[n + 1]) * -np.expm1(-h)
        predict[n] = ratio, gain, 0
        if order_of(n) == 2:
            slope = 0.5 * h / (snr[n - 1] - snr[n])
            predict[n] += 0, -gain * slope, gain * slope
        if n + 1 == sampler.steps or not sampler.corrects:
            continue
        older, now = (0.0, 0.5)
        if order_of(n) == 2:
            k = (snr[n - 1] - snr[n]) / h
            # the integrals of e^x and x e^x over the step, over that of B(h)
            first = (np.expm1(-h) / -h - 1) / np.expm1(-h)
            second = 2 * ((np.expm1(-h) / -h - 1) / -h - 0.5) / np.expm1(-h)
            older, now = np.linalg.solve([[1, 1], [k, 1]], [first, second])
            older /= k
        correct[n + 1] = 0, ratio, gain * now, gain * (1 - older - now), gain * older
    return correct.astype(np.float32), predict.astype(np.float32)
