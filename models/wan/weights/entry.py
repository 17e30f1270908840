"""How one of our parameters is stored by others: one table says names, layout and placement."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter, here and in the two key conventions.

    A stored tensor becomes ours by `stored.transpose(axes).reshape(shape)`; that of layer `n` has
    `n` in place of `{}` in its key and is row `n` of our stacked parameter.

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

    def __post_init__(self) -> None:
        if math.prod(self.shape) != math.prod(self.stored):
            raise ValueError(f"{self.name}: expected {self.shape} to hold {self.stored}")
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

    def ours(self, stored: np.ndarray) -> np.ndarray:
        """One stored tensor in our layout."""
        axes = self.axes or tuple(range(stored.ndim))
        return stored.transpose(axes).reshape(self.shape)

    def theirs(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `ours`, for one layer."""
        axes = self.axes or tuple(range(len(self.stored)))
        turned = value.reshape([self.stored[axis] for axis in axes])
        return np.ascontiguousarray(turned.transpose(np.argsort(axes)))
