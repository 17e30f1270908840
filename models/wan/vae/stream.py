"""Running a causal network over a video piece by piece, with what it must remember in between."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

#: What the causal layers remember of earlier frames, in the order in which they run.
Past = tuple[Array, ...]


class Cache:
    """Hands each causal layer its earlier frames, and collects those that the next piece needs.

    Made anew for each piece, inside the traced function: `kept` of one piece is `past` of the
    next. Layers must ask in the same order every time.

    Args:
      past: `kept` of the piece before, or `None` for the first.
    """

    def __init__(self, past: Past | None) -> None:
        self.first = past is None
        self.kept: list[Array] = []
        self._past = iter(past or ())

    def extend(
        self, x: Float[Array, "batch frames height width channels"], frames: int
    ) -> Float[Array, "batch more_frames height width channels"]:
        """Returns `x` behind the `frames` frames before it: zeros at the start of the video."""
        shape = (x.shape[0], frames, *x.shape[2:])
        before = jnp.zeros(shape, x.dtype) if self.first else next(self._past)
        x = jnp.concatenate([before, x], axis=1)
        self.kept.append(x[:, -frames:])
        return x

    def keep(self, x: Float[Array, "batch frames height width channels"]) -> None:
        """Has the next piece find these frames, where this one does without any (the first)."""
        self.kept.append(x)


def stream(
    part: Callable[[Array, Cache], Array],
    x: Float[Array, "batch frames height width channels"],
    *,
    frames_in: int,
    frames_out: int,
) -> Float[Array, "batch out_frames out_height out_width out_channels"]:
    """Runs a causal `part` over the first frame, then over `frames_in` frames at a time.

    The pieces run in one `jax.lax.scan`, which writes into the output in place; so the memory
    that is needed beside the output does not depend on the number of frames.

    Args:
      part: called as `part(piece, cache)`; makes 1 frame of the first, and
        `len(piece) * frames_out / frames_in` of the others.
      x: the whole input.
      frames_in: of a piece.
      frames_out: that a piece of `frames_in` becomes.
    """
    cache = Cache(None)
    first = part(x[:, :1], cache)
    pieces, rest = divmod(x.shape[1] - 1, frames_in)
    frames = 1 + (x.shape[1] - 1) * frames_out // frames_in
    out = jnp.zeros((first.shape[0], frames, *first.shape[2:]), first.dtype)
    out = jax.lax.dynamic_update_slice_in_dim(out, first, 0, axis=1)

    def step(carry: tuple[Past, Array], n: Array) -> tuple[tuple[Past, Array], None]:
        past, out = carry
        cache = Cache(past)
        piece = jax.lax.dynamic_slice_in_dim(x, 1 + n * frames_in, frames_in, axis=1)
        made = part(piece, cache)
        out = jax.lax.dynamic_update_slice_in_dim(out, made, 1 + n * frames_out, axis=1)
        return (tuple(cache.kept), out), None

    past = tuple(cache.kept)
    if pieces:
        (past, out), _ = jax.lax.scan(step, (past, out), jnp.arange(pieces))
    if rest:
        made = part(x[:, -rest:], Cache(past))
        out = jax.lax.dynamic_update_slice_in_dim(out, made, frames - made.shape[1], axis=1)
    return out
