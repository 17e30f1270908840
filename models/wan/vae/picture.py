"""A picture cut into parts, one a device: what a device holds, and what its neighbours lend it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ..sharding import Sharding

#: Zeros before and after each axis of a convolution's kernel.
Padding = tuple[tuple[int, int], ...]

# Of `[batch, frames, rows, columns, channels]`, and their names in the table of rules.
_SIDES = {2: "rows", 3: "columns"}


@dataclasses.dataclass(frozen=True)
class Side:
    """The rows, or the columns, of all pictures of a video.

    Every device holds equally many, at any resolution as many times more as that is finer. Where
    the devices do not divide them, the last ones hold some behind the picture's edge, which
    nobody may see.

    Attributes:
      size: of the latents.
      axes: mesh axes that split it.
      ways: into how many parts.
    """

    size: int
    axes: tuple[str, ...] = ()
    ways: int = 1

    @property
    def share(self) -> int:
        """Of the latents, on one device."""
        return -(-self.size // self.ways)

    @property
    def behind(self) -> int:
        """Of the latents, behind the edge, on all devices."""
        return self.share * self.ways - self.size

    def extended(self, x: Array, axis: int, before: int, after: int) -> Array:
        """`x` between the last of the device before and the first of the device after.

        There are zeros where there is no picture: what a convolution pads with.
        """
        local = x.shape[axis]
        if self.behind:
            inside = local // self.share * self.size - jax.lax.axis_index(self.axes) * local
            seen = jax.lax.broadcasted_iota(jnp.int32, _ones(x.ndim, axis, local), axis) < inside
            x = jnp.where(seen, x, jnp.zeros((), x.dtype))
        parts = [x]
        # a device that nobody sends to receives zeros
        if before:
            last = jax.lax.slice_in_dim(x, local - before, local, axis=axis)
            to_next = [(n, n + 1) for n in range(self.ways - 1)]
            parts.insert(0, jax.lax.ppermute(last, self.axes, to_next))
        if after:
            first = jax.lax.slice_in_dim(x, 0, after, axis=axis)
            to_last = [(n + 1, n) for n in range(self.ways - 1)]
            parts.append(jax.lax.ppermute(first, self.axes, to_last))
        return jnp.concatenate(parts, axis=axis)

    def gathered(self, x: Array, axis: int) -> Array:
        """All of the latents' rows or columns, on every device."""
        x = jax.lax.all_gather(x, self.axes, axis=axis, tiled=True)
        return jax.lax.slice_in_dim(x, 0, self.size, axis=axis)


def _ones(rank: int, axis: int, size: int) -> tuple[int, ...]:
    return tuple(size if n == axis else 1 for n in range(rank))


@dataclasses.dataclass(frozen=True)
class Picture:
    """What one device holds of every picture; `WHOLE`: all of it.

    Attributes:
      sides: those that are split, by their axis in `[batch, frames, rows, columns, channels]`.
    """

    sides: tuple[tuple[int, Side], ...] = ()

    def extended(
        self, x: Float[Array, "batch frames height width channels"], padding: Padding
    ) -> tuple[Array, Padding]:
        """Returns `x` with what a convolution sees of the neighbours, and the padding that remains.

        Args:
          x: the device's part.
          padding: of a convolution, before and after each axis; the last two are rows and columns.
        """
        remains = list(padding)
        for axis, side in self.sides:
            at = axis - 4  # rows and columns are the last two
            if remains[at] != (0, 0):
                x = side.extended(x, axis, *remains[at])
                remains[at] = (0, 0)
        return x, tuple(remains)

    def gathered(
        self, x: Float[Array, "batch frames height width channels"]
    ) -> Float[Array, "batch frames all_height all_width channels"]:
        """All latent pixels of each frame."""
        for axis, side in self.sides:
            x = side.gathered(x, axis)
        return x


WHOLE = Picture()


def on_mesh(
    sharding: Sharding | None,
    module: nnx.Module,
    run: Callable[[Any, Array, Picture], Array],
    x: Float[Array, "batch frames height width channels"],
    latents: Sequence[int],
    scale: int,
    out_scale: int,
) -> Float[Array, "batch out_frames out_height out_width out_channels"]:
    """`run(module, x, picture)`, each device on its own part of the pictures.

    The rules "rows" and "columns" say what splits them. Each device holds the parameters whole,
    and its part of the input, of the output and of everything between. Sides that the devices do
    not divide are filled up with zeros behind the edge, and cut off at the end.

    Args:
      sharding: the mesh and its rules, or `None`: one device.
      module: whose parameters are used.
      run: what a device does, with neighbours to ask.
      x: the whole input.
      latents: rows and columns of the latents.
      scale: rows of `x` to a row of the latents.
      out_scale: likewise of the output.
    """
    if sharding is None or sharding.mesh.size == 1:
        return run(module, x, WHOLE)
    sides = {
        axis: Side(size, sharding.axes(name), sharding.ways(name))
        for (axis, name), size in zip(_SIDES.items(), latents, strict=True)
    }
    picture = Picture(tuple((axis, side) for axis, side in sides.items() if side.ways > 1))
    graph, params = nnx.split(module)
    fill = [(0, scale * sides[axis].behind if axis in sides else 0) for axis in range(x.ndim)]
    placed = sharding.spec((None, None, *_SIDES.values(), None))
    mapped = jax.shard_map(
        lambda params, x: run(nnx.merge(graph, params), x, picture),
        mesh=sharding.mesh, in_specs=(PartitionSpec(), placed), out_specs=placed, check_vma=False,
    )  # fmt: skip
    out = mapped(params, jnp.pad(x, fill))
    height, width = (out_scale * size for size in latents)
    return out[:, :, :height, :width]
