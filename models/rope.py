"""Rotary position embedding over time, height and width."""

from __future__ import annotations

import einops
import jax.numpy as jnp
from jaxtyping import Array, Float

import vmonarch_jax as vm


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Splits a head over time, height and width: even parts, what is left over goes to time.

    A head of 128 gives 44 + 42 + 42, as in Wan.
    """
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def rope_angles(
    grid: vm.VideoGrid, head_dim: int, theta: float = 10_000.0
) -> Float[Array, "seq half_dim"]:
    """Returns the angle by which each token turns each pair of channels.

    Formula: for an axis with `n` channels, pair `p` of a token at position `x` turns by
    `x * theta ** (-2 p / n)` radians; the pairs of the three axes stand one after the other.
    """
    angles = []
    positions = jnp.meshgrid(
        *(jnp.arange(n, dtype=jnp.float32) for n in (grid.frames, grid.height, grid.width)),
        indexing="ij",
    )
    for position, dims in zip(positions, axis_dims(head_dim), strict=True):
        rates = theta ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
        angles.append(position.reshape(-1, 1) * rates)
    return jnp.concatenate(angles, axis=-1)


def apply_rope(
    x: Float[Array, "batch seq heads head_dim"], angles: Float[Array, "seq half_dim"]
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns each interleaved pair `(x[2p], x[2p+1])` by its angle, in float32."""
    even, odd = einops.rearrange(x.astype(jnp.float32), "z n h (p two) -> two z n h p", two=2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return einops.rearrange(turned, "z n h p two -> z n h (p two)").astype(x.dtype)
