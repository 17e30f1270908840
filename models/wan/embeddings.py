"""What enters the Wan transformer: patches, time, text, image and the angles of RoPE."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import vmonarch_jax as vm

from ..dit import patchify
from ..rope import axis_dims
from .config import TransformerConfig
from .transformer_layers import LayerNorm, Linear, as_dtype, exact, kernel

_MAX_PERIOD = 10_000
# Of the two norms around the image states; torch's default, and not `config.eps`.
_IMAGE_EPS = 1e-5


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel: one matmul of each patch."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any) -> None:
        shape = (*config.patch, config.in_channels, config.dim)
        self.kernel = kernel(rngs, shape, math.prod(shape[:-1]), param_dtype)
        self.bias = nnx.Param(jnp.zeros(config.dim, param_dtype))
        self.patch = config.patch

    def __call__(
        self, latents: Float[Array, "batch frames height width channels"]
    ) -> Float[Array, "batch seq dim"]:
        """The tokens, frame slowest and width fastest, in the dtype of `latents`."""
        flat = as_dtype(latents, self.kernel).reshape(-1, self.kernel.shape[-1])
        tokens = jnp.matmul(patchify(latents, self.patch), flat, precision=exact(latents))
        return tokens + as_dtype(latents, self.bias)


class TimeEmbedding(nnx.Module):
    """The state of a time, and the modulation that all blocks share; all in float32.

    Formula, with `w[i] = 10000 ** (-i / half)`: `state = out(silu(in([cos(t w), sin(t w)])))`,
    `modulation = project(silu(state))`: shift, scale and gate of attention, then those of the MLP.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any) -> None:
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.inner = Linear(config.freq_dim, config.dim, **options)
        self.outer = Linear(config.dim, config.dim, **options)
        self.modulation = Linear(config.dim, 6, config.dim, **options)
        self.freq_dim = config.freq_dim

    def __call__(
        self, time: Float[Array, "batch times"]
    ) -> tuple[Float[Array, "batch times dim"], Float[Array, "batch times 6 dim"]]:
        """`(state, modulation)` of times in [0, 1000]."""
        state = self.outer(jax.nn.silu(self.inner(time_features(time, self.freq_dim))))
        return state, self.modulation(jax.nn.silu(state))


def time_features(time: Float[Array, "*times"], channels: int) -> Float[Array, "*times channels"]:
    """Cosines, then sines, of `time` at frequencies from 1 down to almost 1/10000, in float32."""
    half = channels // 2
    # Float32 step by step, as Diffusers: the last bit of a frequency is 6e-5 radians at time 1000.
    powers = np.float32(-math.log(_MAX_PERIOD)) * np.arange(half, dtype=np.float32)
    phase = time.astype(jnp.float32)[..., None] * np.exp(powers / np.float32(half))
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class TextEmbedding(nnx.Module):
    """An MLP from text states to the width of the transformer."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any) -> None:
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.inner = Linear(config.text_dim, config.dim, **options)
        self.outer = Linear(config.dim, config.dim, **options)

    def __call__(
        self, text: Float[Array, "batch length text_dim"]
    ) -> Float[Array, "batch length dim"]:
        """The states that all blocks attend to, in the dtype of `text`."""
        return self.outer(jax.nn.gelu(self.inner(text), approximate=True))


class ImageEmbedding(nnx.Module):
    """An MLP between two norms from image states to the width of the transformer.

    With learnt positions (`config.image_positions`) the states of a first and a last image stand
    one after the other, and their position tells them apart.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any) -> None:
        options = {"rngs": rngs, "param_dtype": param_dtype}
        width = config.image_dim or 0
        if config.image_positions:
            self.positions = nnx.Param(jnp.zeros((config.image_positions, width), param_dtype))
        self.norm_in = LayerNorm(width, _IMAGE_EPS, param_dtype=param_dtype)
        self.inner = Linear(width, width, **options)
        self.outer = Linear(width, config.dim, **options)
        self.norm_out = LayerNorm(config.dim, _IMAGE_EPS, param_dtype=param_dtype)
        self.has_positions = bool(config.image_positions)

    def __call__(self, image: Float[Array, "batch n image_dim"]) -> Float[Array, "batch n dim"]:
        """The states that all blocks attend to, in the dtype of `image`."""
        dtype = image.dtype
        if self.has_positions:
            image = image + self.positions[...].astype(dtype)
        hidden = self.inner(self.norm_in(image).astype(dtype))
        return self.norm_out(self.outer(jax.nn.gelu(hidden, approximate=False))).astype(dtype)


def rope_tables(
    grid: vm.VideoGrid, head_dim: int, theta: float
) -> tuple[Float[Array, "seq head_dim"], Float[Array, "seq head_dim"]]:
    """`(cos, sin)` of the angle by which each token turns each channel, in float32.

    Formula: on an axis with `n` channels, pair `p` of a token at position `x` turns by
    `x * theta ** (-2 p / n)` radians. Time, height and width stand one after the other (44, 42 and
    42 channels of 128) and both channels of a pair have its angle. The angles of an axis are
    float64, rounded after the cosine; what is spread over the grid are those three small tables.
    """
    tables = []
    for axis, (size, n) in enumerate(zip(grid.shape, axis_dims(head_dim), strict=True)):
        angles = np.arange(size)[:, None] * theta ** (-np.arange(0, n, 2, dtype=np.float64) / n)
        pair = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32).repeat(2, axis=-1)
        shape = [2, 1, 1, 1, n]
        shape[1 + axis] = size
        tables.append(jnp.broadcast_to(pair.reshape(shape), (2, *grid.shape, n)))
    cos, sin = jnp.concatenate(tables, axis=-1).reshape(2, grid.tokens, head_dim)
    return cos, sin


def rotate(
    x: Float[Array, "batch heads seq head_dim"],
    cos: Float[Array, "seq head_dim"],
    sin: Float[Array, "seq head_dim"],
) -> Float[Array, "batch heads seq head_dim"]:
    """Turns each interleaved pair `(x[2p], x[2p+1])` by its angle, in float32.

    Formula: `x * cos + partner * sin`, where the partner of `(a, b)` is `(-b, a)`.
    """
    # Either is exact; in one pass over x, with the norm before and the rounding after, go a product
    # on a TPU and shifted channels on a GPU. The other is first written out there, in float32.
    partner = jax.lax.platform_dependent(x, cuda=partner_by_shift, default=partner_by_product)
    return x * cos + partner * sin


def partner_by_product(x: Float[Array, "*rows head_dim"]) -> Float[Array, "*rows head_dim"]:
    """The partners in float32, by a matrix of one 1 or -1 a column."""
    dim = x.shape[-1]
    swap = np.zeros((dim, dim), np.float32)
    first = np.arange(0, dim, 2)
    swap[first + 1, first], swap[first, first + 1] = -1, 1
    return jnp.einsum(
        "...d,de->...e", x, jnp.asarray(swap, x.dtype), precision=exact(x),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def partner_by_shift(x: Float[Array, "*rows head_dim"]) -> Float[Array, "*rows head_dim"]:
    """The partners in float32, of channels shifted by one."""
    x, even = x.astype(jnp.float32), np.arange(x.shape[-1]) % 2 == 0
    return jnp.where(even, -jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
