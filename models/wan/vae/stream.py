"""Running a causal network over a video piece by piece, with what it must remember in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .picture import WHOLE, Picture

#: What the causal layers remember of earlier frames, in the order in which they run.
Past = tuple[Array, ...]


class Cache:
    """Hands each causal layer its earlier frames, and collects those that the next piece needs.

    Made anew for each piece, inside the traced function: `kept` of one piece is `past` of the
    next. Layers must ask in the same order every time.

    All pieces have the same length, so the first holds frames that come before the video. They are
    blank: no layer sees them. A layer that has `stride` frames to a latent frame numbers them so
    that latent frame n becomes frames `stride * n - stride + 1` to `stride * n`; those below 0 are
    blank, and the first frame of the video is number 0 everywhere.

    Args:
      past: `kept` of the piece before, or `None` for zeros.
      start: number of the piece's first latent frame; traced.
      latents: latent frames of a piece.
      picture: what this device holds of every frame.
    """

    def __init__(
        self,
        past: Past | None,
        start: Int[Array, ""],
        latents: int,
        picture: Picture = WHOLE,
    ) -> None:
        self.kept: list[Array] = []
        self.picture = picture
        self._past = None if past is None else iter(past)
        self._start, self._latents = start, latents

    def numbers(self, frames: int) -> Int[Array, " frames"]:
        """The number of each of a layer's `frames` frames."""
        stride = frames // self._latents
        return stride * self._start - (stride - 1) + jnp.arange(frames)

    def blank(
        self, x: Float[Array, "batch frames height width channels"], below: int = 0
    ) -> Float[Array, "batch frames height width channels"]:
        """Returns `x` with zeros in frames that have a number under `below`."""
        return choose(self.numbers(x.shape[1]) >= below, x, jnp.zeros((), x.dtype))

    def extend(
        self,
        x: Float[Array, "batch frames height width channels"],
        frames: int,
        below: int = 0,
    ) -> Float[Array, "batch more_frames height width channels"]:
        """Returns `x` behind the `frames` frames before it: zeros at the start of the video.

        Args:
          x: the piece.
          frames: how many to put before it.
          below: as in `blank`.
        """
        x = self.blank(x, below)
        shape = (x.shape[0], frames, *x.shape[2:])
        before = jnp.zeros(shape, x.dtype) if self._past is None else next(self._past)
        x = jnp.concatenate([before, x], axis=1)
        self.kept.append(x[:, -frames:])
        return x

    def each(
        self,
        part: Callable[[Array, Cache], Array],
        x: Float[Array, "batch frames height width channels"],
        few: int,
    ) -> Float[Array, "batch frames out_height out_width out_channels"]:
        """`part(x, cache)`, `few` frames at a time, so that no more of them are in memory between.

        Args:
          part: layers that neither halve nor double frames.
          x: the piece; whole, if `few` does not divide its frames.
          few: frames at a time.
        """
        batch, frames = x.shape[:2]
        if frames <= few or frames % few:
            return part(x, self)

        def run(past: Past | None, x: Array, number: Array) -> tuple[Past, Array]:
            # numbered as latent frames: layers here have as many frames as they are given
            cache = Cache(past, number, few, self.picture)
            made = part(x, cache)
            return tuple(cache.kept), made

        pieces = x.reshape(batch, frames // few, few, *x.shape[2:]).swapaxes(0, 1)
        numbers = self.numbers(frames)[::few]
        shapes, _ = jax.eval_shape(run, None, pieces[0], numbers[0])
        if self._past is None:
            past = tuple(jnp.zeros(y.shape, y.dtype) for y in shapes)
        else:
            past = tuple(itertools.islice(self._past, len(shapes)))
        past, made = jax.lax.scan(lambda past, piece: run(past, *piece), past, (pieces, numbers))
        self.kept.extend(past)
        made = made.swapaxes(0, 1)
        return made.reshape(batch, frames, *made.shape[3:])


def choose(frames: Bool[Array, " frames"], x: Array, y: Array) -> Array:
    """Returns `x` in the frames that are true, and `y` in the others."""
    return jnp.where(frames[:, None, None, None], x, y)


def stream(
    part: Callable[[Array, Cache], Array],
    x: Float[Array, "batch frames height width channels"],
    *,
    chunk: int,
    stride_in: int = 1,
    stride_out: int = 1,
    picture: Picture = WHOLE,
) -> Float[Array, "batch out_frames out_height out_width out_channels"]:
    """Runs a causal `part` over a video, `chunk` latent frames at a time.

    All pieces run in one `jax.lax.scan`, which writes into the output in place. So `part` is
    compiled once, and the memory that is needed beside the output does not depend on the number of
    frames. The first piece begins with the blank frames that make all of the same length.

    Args:
      part: called as `part(piece, cache)` with `chunk * stride_in` frames; returns
        `chunk * stride_out`.
      x: the whole input: `stride_in * (n - 1) + 1` frames for n latent frames.
      chunk: latent frames of a piece.
      stride_in: frames of the input to a latent frame.
      stride_out: frames of the output to a latent frame.
      picture: what this device holds of every frame.
    """
    latents = (x.shape[1] - 1) // stride_in + 1
    chunk = min(chunk, latents)
    pieces = -(-latents // chunk)
    before = pieces * chunk - latents  # latent frames before the video
    frames_in, frames_out = chunk * stride_in, chunk * stride_out
    frames = stride_out * (latents - 1) + 1
    x = jnp.pad(x, ((0, 0), (0, max(0, frames_in - x.shape[1])), (0, 0), (0, 0), (0, 0)))

    def run(past: Past | None, n: Array) -> tuple[Array, Past]:
        at = n * frames_in - (before + 1) * stride_in + 1
        piece = jax.lax.dynamic_slice_in_dim(x, jnp.maximum(at, 0), frames_in, axis=1)
        # The first slice begins with the video; rolled, it ends where the second begins.
        piece = jnp.where(n == 0, jnp.roll(piece, (before + 1) * stride_in - 1, axis=1), piece)
        cache = Cache(past, n * chunk - before, chunk, picture)
        return part(piece, cache), tuple(cache.kept)

    def step(carry: tuple[Past, Array], n: Array) -> tuple[tuple[Past, Array], None]:
        past, out = carry
        made, past = run(past, n)
        at = n * frames_out - (before + 1) * stride_out + 1
        # And back: what then follows the video's first frames is overwritten by the second piece.
        made = jnp.where(n == 0, jnp.roll(made, 1 - (before + 1) * stride_out, axis=1), made)
        out = jax.lax.dynamic_update_slice_in_dim(out, made, jnp.maximum(at, 0), axis=1)
        return (past, out), None

    made, past = jax.eval_shape(run, None, jnp.int32(0))
    shape = (made.shape[0], max(frames, frames_out), *made.shape[2:])
    start = (tuple(jnp.zeros(y.shape, y.dtype) for y in past), jnp.zeros(shape, made.dtype))
    (_, out), _ = jax.lax.scan(step, start, jnp.arange(pieces))
    return out[:, :frames]
