"""The encoder: frames of pixels in, mean and log variance of the latents out."""

from __future__ import annotations

import itertools

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..config import VAEConfig
from .layers import FRAMES_AT_A_TIME, FRAMES_BEFORE, ChannelNorm, Middle, ResidualBlock, Types, conv
from .resample import Halve, fold_pixels, mean_down
from .stream import Cache


class DownLevel(nnx.Module):
    """Residual blocks, then a halving; in Wan2.2 a mean around them.

    Args:
      inputs: channels in.
      outputs: channels out.
      blocks: residual blocks.
      halve: whether rows and columns are halved at the end.
      halve_time: whether frames are, too.
      shortcut: whether the averaged input is added to the output.

    Raises:
      ValueError: the folded input can't be averaged to `outputs` channels.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        halve: bool,
        halve_time: bool,
        shortcut: bool,
        types: Types,
        rngs: nnx.Rngs,
    ) -> None:
        self.outputs, self.shortcut = outputs, shortcut
        self.factors = (2 if halve_time else 1, 2 if halve else 1)
        folded = inputs * self.factors[0] * self.factors[1] ** 2
        if shortcut and folded % outputs:
            raise ValueError(
                f"expected a width that divides the {folded} folded channels of a level's "
                f"shortcut, got {outputs}"
            )
        widths = [inputs] + [outputs] * blocks
        self.blocks = nnx.List(
            [ResidualBlock(a, b, types=types, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.halve = Halve(outputs, time=halve_time, types=types, rngs=rngs) if halve else None

    def __call__(
        self, x: Float[Array, "batch frames height width inputs"], cache: Cache
    ) -> Float[Array, "batch less_frames less_height less_width outputs"]:
        """Returns the next level's input."""
        h = x
        for block in self.blocks:
            h = block(h, cache)
        if self.halve is not None:
            h = self.halve(h, cache)
        return h + mean_down(cache.blank(x), self.outputs, *self.factors) if self.shortcut else h


class Encoder(nnx.Module):
    """Convolution, levels that halve the picture, the middle, and a convolution to the moments."""

    def __init__(self, config: VAEConfig, *, types: Types, rngs: nnx.Rngs) -> None:
        widths = [config.dim * m for m in (1, *config.multipliers)]
        last = len(config.halve_time)
        self.patch, self.dtype = config.patch, types.dtype
        # levels before the first that halves frames
        self.whole = (*config.halve_time, True).index(True)
        self.conv_in = conv(3 * config.patch**2, widths[0], (3, 3, 3), types, rngs)
        self.levels = nnx.List(
            [
                DownLevel(
                    *pair,
                    config.blocks,
                    halve=n < last,
                    halve_time=n < last and config.halve_time[n],
                    shortcut=config.residual,
                    types=types,
                    rngs=rngs,
                )
                for n, pair in enumerate(itertools.pairwise(widths))
            ]
        )
        self.middle = Middle(widths[-1], types=types, rngs=rngs)
        self.norm_out = ChannelNorm(widths[-1], types=types)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, (3, 3, 3), types, rngs)

    def __call__(
        self, video: Float[Array, "batch frames height width 3"], cache: Cache
    ) -> Float[Array, "batch t h w moments"]:
        """Returns the moments of some frames, given what is kept of those before."""
        x = cache.each(self._finest, video, FRAMES_AT_A_TIME)
        for level in self.levels[self.whole :]:
            x = level(x, cache)
        x = jax.nn.silu(self.norm_out(self.middle(x, cache)))
        return self.conv_out(cache.extend(x, FRAMES_BEFORE), cache.picture)

    def _finest(self, video: Array, cache: Cache) -> Array:
        """The levels that halve no frames: most of the memory, so not for all frames at once."""
        x = fold_pixels(video, self.patch).astype(self.dtype)
        x = self.conv_in(cache.extend(x, FRAMES_BEFORE), cache.picture)
        for level in self.levels[: self.whole]:
            x = level(x, cache)
        return x
