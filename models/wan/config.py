"""Sizes of the Wan models, and the published ones by name."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

import vmonarch_jax as vm

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"expected {name} >= 1, got {getattr(config, name)}")


def _dtype_of(name: str) -> jnp.dtype:
    if name not in _DTYPES:
        raise ValueError(f"expected dtype of {sorted(_DTYPES)}, got {name!r}")
    return jnp.dtype(_DTYPES[name])


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What shapes a Wan transformer; plain values that go to JSON and back.

    Attributes:
      dim: width of the residual stream, `heads * head_dim`.
      heads: attention heads.
      layers: transformer blocks.
      ffn_dim: hidden width of the feed-forward part.
      in_channels: latent channels in; for image to video 36: noise, mask and image.
      out_channels: latent channels out.
      patch: latent frames, rows and columns in one token.
      text_dim: width of the text states.
      text_length: text states; shorter texts are padded with zeros.
      freq_dim: channels of the sinusoidal embedding of time.
      eps: of all norms.
      image_dim: width of the image states; `None`: no image branch.
      image_positions: learnt positions of the image states (two images: 514), or `None`.
      per_token_time: whether every token may have a time of its own (Wan2.2 TI2V-5B).
      rope_theta: base of the rotary frequencies.
      linear_layers: layers, from 0, whose self-attention has SALAD's linear branch beside it, under
        whatever method; published models have none.
      dtype: "float32" or "bfloat16" of the matmuls; norms, modulation and embeddings of time are
        float32.
      remat: what the backward pass recomputes: "none", "dots" (all but matmuls) or "full".

    Raises:
      ValueError: a field is out of range.
    """

    dim: int = 1536
    heads: int = 12
    layers: int = 30
    ffn_dim: int = 8960
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_length: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int | None = None
    image_positions: int | None = None
    per_token_time: bool = False
    rope_theta: float = 10_000.0
    linear_layers: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    remat: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        object.__setattr__(self, "linear_layers", tuple(self.linear_layers))
        _positive(self, "dim", "heads", "layers", "ffn_dim", "in_channels", "out_channels")
        _positive(self, "text_dim", "text_length", "freq_dim")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(f"expected patch of 3 positive sizes, got {self.patch}")
        if self.dim % self.heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                "expected dim = heads * head_dim with an even head_dim >= 6, "
                f"got dim {self.dim} and heads {self.heads}"
            )
        if self.freq_dim % 2:
            raise ValueError(f"expected an even freq_dim, got {self.freq_dim}")
        rising = sorted({layer for layer in self.linear_layers if 0 <= layer < self.layers})
        if list(self.linear_layers) != rising:
            raise ValueError(
                f"expected linear_layers that rise within 0..{self.layers - 1}, "
                f"got {self.linear_layers}"
            )
        if self.remat not in ("none", "dots", "full"):
            raise ValueError(f'expected remat of "none", "dots", "full", got {self.remat!r}')
        _dtype_of(self.dtype)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the matmuls."""
        return _dtype_of(self.dtype)

    def grid_of(self, frames: int, height: int, width: int) -> vm.VideoGrid:
        """The token grid of a latent video.

        Raises:
          ValueError: the patch does not divide its size.
        """
        size = (frames, height, width)
        if any(n % p for n, p in zip(size, self.patch, strict=True)):
            raise ValueError(f"expected latent sizes that patch {self.patch} divides, got {size}")
        return vm.VideoGrid(*(n // p for n, p in zip(size, self.patch, strict=True)))


# Mean and deviation of each latent channel of the two autoencoders, as published with them.
MEAN_2_1 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD_2_1 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """What shapes a causal 3-D autoencoder.

    Attributes:
      dim: channels of the encoder's first level.
      decoder_dim: of the decoder's last level.
      latent_channels: of a latent.
      multipliers: width of each level over `dim`; each level but the last halves the picture.
      blocks: residual blocks a level.
      halve_time: which of the halvings also halve the frames.
      patch: pixels that are folded into channels on each side of the picture (Wan2.2: 2).
      residual: whether levels have shortcuts around them (Wan2.2).
      mean: of each latent channel.
      std: of each latent channel.
      dtype: "float32" or "bfloat16" of the convolutions.

    Raises:
      ValueError: lengths do not fit each other.
    """

    dim: int = 96
    decoder_dim: int = 96
    latent_channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    halve_time: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    residual: bool = False
    mean: tuple[float, ...] = MEAN_2_1
    std: tuple[float, ...] = STD_2_1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("multipliers", "halve_time", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _positive(self, "dim", "decoder_dim", "latent_channels", "blocks", "patch")
        if len(self.halve_time) != len(self.multipliers) - 1:
            raise ValueError(
                f"expected halve_time of {len(self.multipliers) - 1} entries, one fewer than "
                f"multipliers, got {len(self.halve_time)}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"expected {name} of {self.latent_channels} entries, "
                    f"got {len(getattr(self, name))}"
                )
        _dtype_of(self.dtype)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the convolutions."""
        return _dtype_of(self.dtype)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to one of the latent; the first frame stands alone."""
        space = self.patch * 2 ** len(self.halve_time)
        return 2 ** sum(self.halve_time), space, space

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width of the latent of a video.

        Raises:
          ValueError: the video's size has none.
        """
        time, rows, columns = self.strides
        if frames < 1 or (frames - 1) % time or height % rows or width % columns:
            raise ValueError(
                f"expected frames of {time} n + 1, height of {rows} n and width of {columns} n, "
                f"got {frames}, {height} and {width}"
            )
        return (frames - 1) // time + 1, height // rows, width // columns


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What shapes a umT5 encoder; the defaults are umT5-xxl."""

    vocabulary: int = 256_384
    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10_240
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _positive(self, "vocabulary", "dim", "heads", "head_dim", "ffn_dim", "layers", "buckets")
        _dtype_of(self.dtype)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the matmuls."""
        return _dtype_of(self.dtype)


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """What shapes the CLIP vision encoder of image to video; the defaults are ViT-H/14."""

    dim: int = 1280
    heads: int = 16
    ffn_dim: int = 5120
    layers: int = 32
    patch: int = 14
    size: int = 224
    eps: float = 1e-5
    activation: str = "gelu"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _positive(self, "dim", "heads", "ffn_dim", "layers", "patch", "size")
        if self.dim % self.heads or self.size % self.patch:
            raise ValueError(
                "expected heads that divide dim and patch that divides size, got "
                f"{self.heads} and {self.dim}, {self.patch} and {self.size}"
            )
        _dtype_of(self.dtype)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the matmuls."""
        return _dtype_of(self.dtype)


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """A whole Wan model: its parts, and how it is sampled.

    Attributes:
      name: as it is published.
      transformer: the transformer; both experts where there are two.
      vae: the autoencoder.
      text: the text encoder.
      image: the image encoder of Wan2.1's image to video, or `None`.
      boundary: share of the noise at which the second expert takes over, or `None`: one expert.
      first_frame: whether an image is given as the first latent frame, at time 0 (TI2V-5B).
      guidance: weight of classifier-free guidance.
      guidance_low: of the second expert, or `None`: the same.
      shift: of the times.
      steps: of the sampler.
      fps: frames a second.
      frames: frames by default.
      size: width and height in pixels by default.
    """

    name: str
    transformer: TransformerConfig
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig | None = None
    boundary: float | None = None
    first_frame: bool = False
    guidance: float = 5.0
    guidance_low: float | None = None
    shift: float = 5.0
    steps: int = 50
    fps: int = 16
    frames: int = 81
    size: tuple[int, int] = (832, 480)

    @property
    def takes_image(self) -> bool:
        """Whether it can start from an image."""
        return self.first_frame or self.transformer.in_channels > self.transformer.out_channels

    @property
    def needs_image(self) -> bool:
        """Whether it can't do without one."""
        return self.takes_image and not self.first_frame

    @property
    def takes_last_image(self) -> bool:
        """Whether it can end on an image, too; those with one image's states can't."""
        return self.needs_last_image or (self.needs_image and self.image is None)

    @property
    def needs_last_image(self) -> bool:
        """Whether it can't do without a last image (FLF2V)."""
        return self.transformer.image_positions is not None

    def grid_of(self, frames: int, height: int, width: int) -> vm.VideoGrid:
        """The token grid of a video in pixels.

        Raises:
          ValueError: the model can't make that size; the message names the nearest that it can.
        """
        time, rows, columns = self.vae.strides
        sides = [n * p for n, p in zip((time, rows, columns), self.transformer.patch, strict=True)]
        if frames < 1 or (frames - 1) % sides[0] or height % sides[1] or width % sides[2]:
            near = (
                sides[0] * round((max(frames, 1) - 1) / sides[0]) + 1,
                sides[1] * max(1, round(height / sides[1])),
                sides[2] * max(1, round(width / sides[2])),
            )
            raise ValueError(
                f"{self.name} makes videos of {sides[0]} n + 1 frames, of a height that {sides[1]} "
                f"divides and a width that {sides[2]} divides: expected such as {near[0]} frames "
                f"of {near[2]}x{near[1]}, got {frames} frames of {width}x{height}"
            )
        return self.transformer.grid_of(*self.vae.latent_size(frames, height, width))


def with_dtype(config: WanConfig, dtype: str) -> WanConfig:
    """The model with the matmuls of transformers and encoders in a dtype."""
    parts = {
        name: dataclasses.replace(getattr(config, name), dtype=dtype)
        for name in ("transformer", "text", "image")
        if getattr(config, name) is not None
    }
    return dataclasses.replace(config, **parts)
