"""How one of our parameters is stored by others: one table says names, layout and placement."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter, here and in the two key conventions.

    A stored tensor becomes ours by `stored.transpose(axes).reshape(shape)`; that of layer `n` has
    `n` in place of `{}` in its key and is row `n` of our stacked parameter. Where the original
    convention differs in more than the key, `original_stored` and `piece` say so: its tensor is
    cut into pieces along the first axis, and ours is reshaped to `stored`.

    Attributes:
      name: ours, as `split_params` gives it: `blocks.attn.q.kernel`.
      diffusers: key of the Diffusers (or Transformers) convention; `{}` stands for the layer.
      original: key of the original repository's convention.
      shape: of our parameter, without the layers.
      stored: shape of a stored tensor.
      axes: order of the stored tensor's axes in ours; all of them in order if empty.
      layers: number of layers that our parameter stacks in front, or 0: none.
      logical: a name of each of our axes (the layers' included), by which it is placed on a mesh:
        "layers", "embed" (residual stream), "heads", "head_dim", "mlp", or `None`.
      original_stored: shape in the original convention where it is not `stored`; of one piece.
      piece: which of how many equal pieces of the original's tensor is ours: `(0, 3)` for the
        queries of a fused q, k, v.

    Raises:
      ValueError: the shapes do not hold equally many values, or `logical` has another rank.
    """

    name: str
    diffusers: str
    original: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    axes: tuple[int, ...] = ()
    layers: int = 0
    logical: tuple[str | None, ...] = ()
    original_stored: tuple[int, ...] = ()
    piece: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for stored in (self.stored, self.original_stored or self.stored):
            if math.prod(self.shape) != math.prod(stored):
                raise ValueError(f"{self.name}: expected {self.shape} to hold {stored}")
        rank = len(self.shape) + bool(self.layers)
        if self.logical and len(self.logical) != rank:
            raise ValueError(f"{self.name}: expected {rank} logical axes, got {self.logical}")

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of our parameter, with the layers."""
        return (self.layers, *self.shape) if self.layers else self.shape

    def keys(self, convention: str) -> tuple[str, ...]:
        """The stored keys, one a layer, in "diffusers" or "original" convention."""
        key = {"diffusers": self.diffusers, "original": self.original}[convention]
        return tuple(key.format(n) for n in range(self.layers)) if self.layers else (key,)

    def shape_in(self, convention: str) -> tuple[int, ...]:
        """Of one stored tensor in a convention, with all its pieces."""
        if convention == "diffusers":
            return self.stored
        shape = self.original_stored or self.stored
        return (shape[0] * self.piece[1], *shape[1:]) if shape else shape

    def ours(self, stored: np.ndarray, convention: str = "diffusers") -> np.ndarray:
        """One stored tensor in our layout."""
        if convention == "original" and self.piece[1] > 1:
            stored = np.split(stored, self.piece[1])[self.piece[0]]
        stored = stored.reshape(self.stored)
        return stored.transpose(self.axes or range(stored.ndim)).reshape(self.shape)

    def theirs(self, value: np.ndarray, convention: str = "diffusers") -> np.ndarray:
        """The inverse of `ours`, for one layer; in the original convention, of one piece."""
        axes = self.axes or tuple(range(len(self.stored)))
        turned = value.reshape([self.stored[axis] for axis in axes])
        stored = np.ascontiguousarray(turned.transpose(np.argsort(axes)))
        if convention == "original" and self.original_stored:
            return stored.reshape(self.original_stored)
        return stored.reshape(self.stored)
