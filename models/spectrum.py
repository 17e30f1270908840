"""Preconditioning of the velocity by the power spectrum of natural videos."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

#: Orthonormal opponent colours (grey, red-blue, green-magenta), nearly uncorrelated in photographs.
_COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The power of each cosine mode of a video, as a formula that fits every resolution.

    Formula, for mode `(kt, ky, kx)` of colour c of a video of `n` pixels, in half waves across it,
    and `ks = hypot(ky, kx)`:

        power = n * colours[c] * (1 + ks^2)^-space * (1 + (kt / (rate (1 + drift ks)))^2)^-time

    Fine detail changes faster than coarse detail when a camera moves, which is what `drift` says.
    The numbers are a fit to the project's videos; they only set the starting point of training.

    Raises:
      ValueError: a number is not positive.
    """

    colours: tuple[float, float, float] = (0.2, 0.035, 0.005)
    space: float = 1.66
    time: float = 2.53
    rate: float = 0.64
    drift: float = 0.67

    def __post_init__(self) -> None:
        object.__setattr__(self, "colours", tuple(self.colours))
        if not min(*self.colours, self.space, self.time, self.rate, self.drift) > 0:
            raise ValueError(f"expected positive numbers, got {self}")

    def power(self, size: tuple[int, int, int]) -> Float[np.ndarray, "frames height width 3"]:
        """Returns the variance of each mode of videos of `size` (frames, height, width)."""
        kt, ky, kx = np.meshgrid(*(np.arange(n) for n in size), indexing="ij")
        ks = np.hypot(ky, kx)
        falls = (1 + ks**2) ** -self.space
        falls *= (1 + (kt / (self.rate * (1 + self.drift * ks))) ** 2) ** -self.time
        return (math.prod(size) * falls[..., None] * np.array(self.colours)).astype(np.float32)


@functools.cache
def _cosines(n: int) -> Float[np.ndarray, "n n"]:
    """The orthonormal DCT-II matrix: row k is the cosine with k half waves."""
    k, x = np.mgrid[:n, :n]
    rows = np.cos(np.pi * k * (x + 0.5) / n) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.astype(np.float32)


def _bases(size: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The matrices to modes of each axis of a video: time, height, width, colour."""
    return (*map(_cosines, size[:3]), _COLOURS.astype(np.float32))


def to_modes(
    x: Float[Array, "batch frames height width 3"],
) -> Float[Array, "batch frames height width 3"]:
    """Orthonormal transform to cosine modes and opponent colours, in float32."""
    bases = _bases(x.shape[1:])
    return jnp.einsum("ztyxc,Tt,Yy,Xx,Cc->zTYXC", x, *bases, optimize="optimal")


def from_modes(
    modes: Float[Array, "batch frames height width 3"],
) -> Float[Array, "batch frames height width 3"]:
    """The inverse of `to_modes`, which is its transpose."""
    bases = _bases(modes.shape[1:])
    return jnp.einsum("zTYXC,Tt,Yy,Xx,Cc->ztyxc", modes, *bases, optimize="optimal")


def wiener(
    x: Float[Array, "batch frames height width 3"],
    t: Float[Array, " batch"],
    spectrum: Spectrum,
) -> tuple[Array, Array, Array]:
    """Returns `(video, velocity, gain)`: what linear statistics alone say about a noised video.

    Formula, for each mode with power `p` and `var = t^2 + (1 - t)^2 p`, its variance in
    `x = (1 - t) video + t noise`: the best linear guess of the video is `(1 - t) p / var * x`, that
    of the velocity `noise - video` is `(t - (1 - t) p) / var * x`, and the velocity's remaining
    deviation is `sqrt(p / var)`. `gain = min(1, that)`, in modes, is how much of a network's output
    to let through: where next to nothing remains to be said, nothing but noise could be added.

    The guesses are videos; `gain` is `[batch, frames, height, width, 3]` in modes.
    """
    frames, height, width = x.shape[1:4]
    power = spectrum.power((frames, height, width))
    t = t[:, None, None, None, None]
    modes = to_modes(x)
    variance = t**2 + (1 - t) ** 2 * power
    video = from_modes((1 - t) * power / variance * modes)
    velocity = from_modes((t - (1 - t) * power) / variance * modes)
    return video, velocity, jnp.minimum(1.0, jnp.sqrt(power / variance))
