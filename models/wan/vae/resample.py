"""Halving and doubling of frames, rows and columns, learnt and not learnt."""

from __future__ import annotations

from typing import Any

import einops
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .layers import FRAMES_BEFORE, Conv, Types, conv
from .stream import Cache, choose


class Halve(nnx.Module):
    """A convolution that halves rows and columns, then one that halves frames where `time`.

    The first frame of a video has no partner: it is not halved in time.
    """

    def __init__(self, dim: int, *, time: bool, types: Types, rngs: nnx.Rngs) -> None:
        kwargs: Any = {"types": types, "rngs": rngs}
        # padded below and to the right only, as the published weights were trained
        sides = ((0, 1), (0, 1))
        self.space = Conv(dim, dim, (3, 3), strides=(2, 2), padding=sides, **kwargs)
        none = {"strides": (2, 1, 1), "padding": ((0, 0),) * 3}
        self.time = Conv(dim, dim, (3, 1, 1), **none, **kwargs) if time else None

    def __call__(
        self, x: Float[Array, "batch frames height width dim"], cache: Cache
    ) -> Float[Array, "batch half_frames half_height half_width dim"]:
        """Returns half of the frames, if frames are halved."""
        x = self.space(x, cache.picture)
        if self.time is None:
            return x
        halves = self.time(cache.extend(x, 1))
        return choose(cache.numbers(halves.shape[1]) == 0, x[:, 1::2], halves)


class Double(nnx.Module):
    """A convolution that doubles frames where `time`, then one after repeating rows and columns.

    The first frame of a video stays one frame, and the doubling does not see it afterwards: to it
    the video starts at the second latent frame.
    """

    def __init__(
        self, inputs: int, outputs: int, *, time: bool, types: Types, rngs: nnx.Rngs
    ) -> None:
        sides = ((1, 1), (1, 1))
        self.space = Conv(inputs, outputs, (3, 3), padding=sides, types=types, rngs=rngs)
        self.time = conv(inputs, 2 * inputs, (3, 1, 1), types, rngs) if time else None

    def __call__(
        self, x: Float[Array, "batch frames height width inputs"], cache: Cache
    ) -> Float[Array, "batch more_frames twice_height twice_width outputs"]:
        """Returns two frames of each, if frames are doubled."""
        if self.time is not None:
            pairs = self.time(cache.extend(x, FRAMES_BEFORE, below=1))
            pairs = einops.rearrange(pairs, "z t h w (two c) -> z (t two) h w c", two=2)
            x = choose(cache.numbers(pairs.shape[1]) == 0, jnp.repeat(x, 2, axis=1), pairs)
        return self.space(einops.repeat(x, "z t h w c -> z t (h 2) (w 2) c"), cache.picture)


def mean_down(
    x: Float[Array, "batch frames height width inputs"], outputs: int, time: int, space: int
) -> Float[Array, "batch less_frames less_height less_width outputs"]:
    """Folds `time` frames, `space` rows and columns into channels and averages these in groups."""
    x = einops.rearrange(x, "z (t a) (h b) (w c) d -> z t h w (d a b c)", a=time, b=space, c=space)
    return einops.reduce(x, "z t h w (d group) -> z t h w d", "mean", d=outputs)


def repeat_up(
    x: Float[Array, "batch frames height width inputs"], outputs: int, time: int, space: int
) -> Float[Array, "batch more_frames more_height more_width outputs"]:
    """Repeats channels and unfolds them into `time` frames, `space` rows and columns."""
    repeats = outputs * time * space**2 // x.shape[-1]
    return einops.rearrange(
        jnp.repeat(x, repeats, axis=-1),
        "z t h w (d a b c) -> z (t a) (h b) (w c) d",
        d=outputs, a=time, b=space, c=space,
    )  # fmt: skip


def fold_pixels(
    x: Float[Array, "batch frames height width channels"], patch: int
) -> Float[Array, "batch frames rows columns folded"]:
    """Squares of `patch * patch` pixels as channels, in the order of Wan2.2's weights."""
    return einops.rearrange(x, "z t (h b) (w c) d -> z t h w (d c b)", b=patch, c=patch)


def unfold_pixels(
    x: Float[Array, "batch frames rows columns folded"], patch: int
) -> Float[Array, "batch frames height width channels"]:
    """The inverse of `fold_pixels`."""
    return einops.rearrange(x, "z t h w (d c b) -> z t (h b) (w c) d", b=patch, c=patch)
