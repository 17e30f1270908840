"""The decoder: latent frames in, frames of pixels out."""

from __future__ import annotations

import itertools

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..config import VAEConfig
from .layers import FRAMES_AT_A_TIME, FRAMES_BEFORE, ChannelNorm, Middle, ResidualBlock, Types, conv
from .resample import Double, repeat_up, unfold_pixels
from .stream import Cache


class UpLevel(nnx.Module):
    """Residual blocks, then a doubling; in Wan2.2 a repetition around them.

    Args:
      inputs: channels in.
      width: channels of the blocks.
      outputs: channels out, after the doubling.
      blocks: residual blocks.
      double: whether rows and columns are doubled at the end.
      double_time: whether frames are, too.
      shortcut: whether the repeated input is added to the output.

    Raises:
      ValueError: the input can't be repeated to `outputs` channels.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        blocks: int,
        *,
        double: bool,
        double_time: bool,
        shortcut: bool,
        types: Types,
        rngs: nnx.Rngs,
    ) -> None:
        self.outputs, self.shortcut = outputs, shortcut
        self.factors = (2 if double_time else 1, 2 if double else 1)
        folded = outputs * self.factors[0] * self.factors[1] ** 2
        if shortcut and folded % inputs:
            raise ValueError(
                f"expected a width that divides the {folded} folded channels of a level's "
                f"shortcut, got {inputs}"
            )
        widths = [inputs] + [width] * blocks
        self.blocks = nnx.List(
            [ResidualBlock(a, b, types=types, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        kwargs = {"time": double_time, "types": types, "rngs": rngs}
        self.double = Double(width, outputs, **kwargs) if double else None

    def __call__(
        self, x: Float[Array, "batch frames height width inputs"], cache: Cache
    ) -> Float[Array, "batch more_frames more_height more_width outputs"]:
        """Returns the next level's input."""
        h = x
        for block in self.blocks:
            h = block(h, cache)
        if self.double is not None:
            h = self.double(h, cache)
        return h + repeat_up(x, self.outputs, *self.factors) if self.shortcut else h


def up_widths(config: VAEConfig) -> list[tuple[int, int, int]]:
    """Channels in, of the blocks, and out of each level of the decoder.

    Without shortcuts, the doubling convolution halves the channels.
    """
    widths = [config.decoder_dim * m for m in config.multipliers[::-1]]
    outs = [width if config.residual else width // 2 for width in widths[:-1]] + widths[-1:]
    return list(zip([widths[0], *outs[:-1]], widths, outs, strict=True))


class Decoder(nnx.Module):
    """Convolution, the middle, levels that double the picture, and a convolution to pixels."""

    def __init__(self, config: VAEConfig, *, types: Types, rngs: nnx.Rngs) -> None:
        widths = up_widths(config)
        times = config.halve_time[::-1]
        self.patch, self.dtype = config.patch, types.dtype
        # levels up to the last that doubles frames
        self.doublings = max((n + 1 for n, time in enumerate(times) if time), default=0)
        self.conv_in = conv(config.latent_channels, widths[0][0], (3, 3, 3), types, rngs)
        self.middle = Middle(widths[0][0], types=types, rngs=rngs)
        self.levels = nnx.List(
            [
                UpLevel(
                    *level,
                    config.blocks + 1,
                    double=n < len(times),
                    double_time=n < len(times) and times[n],
                    shortcut=config.residual and n < len(times),
                    types=types,
                    rngs=rngs,
                )
                for n, level in enumerate(widths)
            ]
        )
        self.norm_out = ChannelNorm(widths[-1][-1], types=types)
        self.conv_out = conv(widths[-1][-1], 3 * config.patch**2, (3, 3, 3), types, rngs)

    def __call__(
        self, latents: Float[Array, "batch t h w channels"], cache: Cache
    ) -> Float[Array, "batch frames height width 3"]:
        """Returns the pixels of some latent frames, given what is kept of those before."""
        x = self.conv_in(cache.extend(latents.astype(self.dtype), FRAMES_BEFORE), cache.picture)
        x = self.middle(x, cache)
        for level in self.levels[: self.doublings]:
            x = level(x, cache)
        return cache.each(self._finest, x, FRAMES_AT_A_TIME)

    def _finest(self, x: Array, cache: Cache) -> Array:
        """The levels that double no frames: most of the memory, so not for all frames at once."""
        for level in self.levels[self.doublings :]:
            x = level(x, cache)
        x = cache.extend(jax.nn.silu(self.norm_out(x)), FRAMES_BEFORE)
        x = self.conv_out(x, cache.picture)
        return unfold_pixels(x, self.patch)
