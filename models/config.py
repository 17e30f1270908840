"""Sizes of the video diffusion transformers, and the named ones."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

import vmonarch_jax as vm

from .labels import MOTIONS, PHOTOS
from .spectrum import Spectrum

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class VideoDiTConfig:
    """Everything that shapes a `VideoDiT`; a plain value that goes to JSON and back.

    Attributes:
      frames: frames of the videos it is trained on.
      height: their height in pixels.
      width: their width in pixels.
      patch: frames, rows and columns of pixels in one token.
      dim: width of the residual stream.
      depth: transformer blocks.
      heads: attention heads; `dim / heads` is the head dimension.
      mlp_ratio: hidden width of the MLP over `dim`.
      classes: labels; the model also has the null class, whose label is `classes`.
      caption_dim: length of the caption vector; 0 means no caption.
      rope_theta: base of the rotary frequencies. Small grids want a small one: with 10,000 most
        of a head would turn by less than a degree over eight tokens.
      linear_layers: layers, from 0, whose attention has SALAD's linear branch beside it
        (`vm.nn.SaladAttention`), under whatever method.
      spectrum: what is known of the videos before any training.
      dtype: "float32" or "bfloat16" of the matmuls; norms and modulation stay float32.
      scan_layers: run the blocks under `lax.scan` (compiles once for all of them).
      remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
      ValueError: a field is out of range, or two do not fit each other.
    """

    frames: int = 16
    height: int = 32
    width: int = 32
    patch: tuple[int, int, int] = (1, 4, 4)
    dim: int = 192
    depth: int = 6
    heads: int = 3
    mlp_ratio: int = 4
    classes: int = len(MOTIONS)
    caption_dim: int = len(PHOTOS)
    rope_theta: float = 100.0
    linear_layers: tuple[int, ...] = ()
    spectrum: Spectrum = dataclasses.field(default_factory=Spectrum)
    dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(f"expected patch of 3 positive sizes, got {self.patch}")
        for name in ("frames", "height", "width", "dim", "depth", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.classes < 1 or self.caption_dim < 0:
            raise ValueError(
                "expected classes >= 1 and caption_dim >= 0, "
                f"got {self.classes} and {self.caption_dim}"
            )
        if self.dim % self.heads or self.dim // self.heads % 2 or self.head_dim < 6:
            raise ValueError(
                "expected dim = heads * head_dim with an even head_dim >= 6, "
                f"got dim {self.dim} and heads {self.heads}"
            )
        self._check_linear_layers()
        if isinstance(self.spectrum, dict):  # as it comes back from JSON
            object.__setattr__(self, "spectrum", Spectrum(**self.spectrum))
        if not self.rope_theta > 0:
            raise ValueError(f"expected rope_theta > 0, got {self.rope_theta}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"expected dtype of {sorted(_DTYPES)}, got {self.dtype!r}")
        self.grid_of((self.frames, self.height, self.width))

    def _check_linear_layers(self) -> None:
        layers = tuple(self.linear_layers)
        object.__setattr__(self, "linear_layers", layers)
        if list(layers) != sorted({layer for layer in layers if 0 <= layer < self.depth}):
            raise ValueError(
                f"expected linear_layers that rise within 0..{self.depth - 1}, got {layers}"
            )
        if self.scan_layers and 0 < len(layers) < self.depth:
            raise ValueError(
                "expected linear branches in all scanned layers or in none, "
                f"got linear_layers {layers} of {self.depth}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the matmuls."""
        return jnp.dtype(_DTYPES[self.dtype])

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        """Frames, height, width and colours of one training video."""
        return (self.frames, self.height, self.width, 3)

    @property
    def grid(self) -> vm.VideoGrid:
        """The token grid of the training videos."""
        return self.grid_of((self.frames, self.height, self.width))

    def grid_of(self, size: tuple[int, int, int]) -> vm.VideoGrid:
        """Returns the token grid of videos of `size` (frames, height, width) in pixels.

        Raises:
          ValueError: the patch does not divide the size.
        """
        if any(length % part for length, part in zip(size, self.patch, strict=True)):
            raise ValueError(f"expected sizes that patch {self.patch} divides, got {tuple(size)}")
        return vm.VideoGrid(*(n // part for n, part in zip(size, self.patch, strict=True)))


#: "micro" is for tests; "tiny" is the shipped model: 16 x 8 x 8 = 1,024 tokens.
CONFIGS = {
    "micro": VideoDiTConfig(
        frames=4, height=16, width=16, patch=(1, 2, 2), dim=32, depth=2, heads=2
    ),
    "tiny": VideoDiTConfig(),
}
