"""The layers of both autoencoders: norm, residual block, attention within a frame."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import vmonarch_jax as vm

from .stream import Cache

# A causal kernel of 3 frames sees this many before the present one.
FRAMES_BEFORE = 2
# Keeps a pixel whose channels are all zero from dividing by zero.
_NORM_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class Types:
    """Dtypes of a module: of its arithmetic and of its parameters."""

    dtype: Any
    param_dtype: Any

    def kwargs(self) -> dict[str, Any]:
        """As Flax's layers take them."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


def conv(
    inputs: int, outputs: int, kernel: tuple[int, int, int], types: Types, rngs: nnx.Rngs
) -> nnx.Conv:
    """A 3-D convolution that pads rows and columns and not frames: those the cache puts before."""
    padding = [(0, 0)] + [(n // 2, n // 2) for n in kernel[1:]]
    return nnx.Conv(inputs, outputs, kernel, padding=padding, **types.kwargs(), rngs=rngs)


class ChannelNorm(nnx.Module):
    """Each pixel's channels to length `sqrt(dim)`, in float32: `x / |x| * sqrt(dim) * scale`."""

    def __init__(self, dim: int, *, types: Types) -> None:
        self.scale = nnx.Param(jnp.ones(dim, types.param_dtype))

    def __call__(self, x: Float[Array, "*pixels dim"]) -> Float[Array, "*pixels dim"]:
        """Returns the dtype that it is given."""
        wide = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.square(wide).sum(-1, keepdims=True))
        unit = wide / jnp.maximum(length, _NORM_FLOOR)
        return (unit * math.sqrt(x.shape[-1]) * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """`shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`; the shortcut is linear, or `x`."""

    def __init__(self, inputs: int, outputs: int, *, types: Types, rngs: nnx.Rngs) -> None:
        self.norm1 = ChannelNorm(inputs, types=types)
        self.conv1 = conv(inputs, outputs, (3, 3, 3), types, rngs)
        self.norm2 = ChannelNorm(outputs, types=types)
        self.conv2 = conv(outputs, outputs, (3, 3, 3), types, rngs)
        same = inputs == outputs
        self.shortcut = None if same else nnx.Linear(inputs, outputs, **types.kwargs(), rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch frames height width inputs"], cache: Cache
    ) -> Float[Array, "batch frames height width outputs"]:
        """Returns as many frames as it is given."""
        h = self.conv1(cache.extend(jax.nn.silu(self.norm1(x)), FRAMES_BEFORE))
        h = self.conv2(cache.extend(jax.nn.silu(self.norm2(h)), FRAMES_BEFORE))
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Attention of one head between the pixels of each frame, added to its input."""

    def __init__(self, dim: int, *, types: Types, rngs: nnx.Rngs) -> None:
        self.norm = ChannelNorm(dim, types=types)
        self.qkv = nnx.Linear(dim, 3 * dim, **types.kwargs(), rngs=rngs)
        self.out = nnx.Linear(dim, dim, **types.kwargs(), rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch frames height width dim"]
    ) -> Float[Array, "batch frames height width dim"]:
        """Returns the shape that it is given."""
        batch, frames, height, width, dim = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch * frames, height * width, 1, 3 * dim)
        # the head is as wide as the network (384 to 1024), which no kernel is written for
        q, k, v = jnp.split(qkv, 3, axis=-1)
        out = vm.Dense()(q, k, v, implementation="xla")
        return x + self.out(out.reshape(x.shape))


class Middle(nnx.Module):
    """Residual block, attention, residual block: at the lowest resolution."""

    def __init__(self, dim: int, *, types: Types, rngs: nnx.Rngs) -> None:
        self.block1 = ResidualBlock(dim, dim, types=types, rngs=rngs)
        self.attention = FrameAttention(dim, types=types, rngs=rngs)
        self.block2 = ResidualBlock(dim, dim, types=types, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch frames height width dim"], cache: Cache
    ) -> Float[Array, "batch frames height width dim"]:
        """Returns the shape that it is given."""
        return self.block2(self.attention(self.block1(x, cache)), cache)
