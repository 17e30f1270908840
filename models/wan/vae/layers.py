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

from .picture import WHOLE, Padding, Picture
from .stream import Cache

# A causal kernel of 3 frames sees this many before the present one.
FRAMES_BEFORE = 2
# Of the finest levels: fewer take less memory, but each time those before are read again.
FRAMES_AT_A_TIME = 2
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


class Conv(nnx.Module):
    """A convolution over frames, rows and columns, or over the last two alone.

    Args:
      inputs: channels in.
      outputs: channels out.
      kernel: frames, rows and columns, or rows and columns.
      padding: zeros before and after each of these. On a mesh the neighbours' rows and columns
        come in their place.
      strides: of each; `None`: 1.
      types: dtypes.
      rngs: keys of the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, ...],
        *,
        padding: Padding,
        strides: tuple[int, ...] | None = None,
        types: Types,
        rngs: nnx.Rngs,
    ) -> None:
        self.padding, self.strides = padding, strides or (1,) * len(kernel)
        self.dtype = types.dtype
        draw = nnx.initializers.lecun_normal()
        shape = (*kernel, inputs, outputs)
        self.kernel = nnx.Param(draw(rngs.params(), shape, types.param_dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, types.param_dtype))

    def __call__(
        self, x: Float[Array, "batch frames height width inputs"], picture: Picture = WHOLE
    ) -> Float[Array, "batch less_frames less_height less_width outputs"]:
        """Returns this device's part of the output, given its part of the input."""
        x, padding = picture.extended(x, self.padding)
        lead = x.shape[: 4 - len(padding)]  # frames are videos to a convolution of pictures
        letters = "DHW"[-len(padding) :]
        x = jax.lax.conv_general_dilated(
            x.reshape(-1, *x.shape[len(lead) :]).astype(self.dtype),
            self.kernel[...].astype(self.dtype), self.strides, padding,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )  # fmt: skip
        x = x + self.bias[...].astype(self.dtype)
        return x.reshape(*lead, *x.shape[1:])


def conv(
    inputs: int, outputs: int, kernel: tuple[int, int, int], types: Types, rngs: nnx.Rngs
) -> Conv:
    """A 3-D convolution that pads rows and columns and not frames: those the cache puts before."""
    padding = [(0, 0)] + [(n // 2, n // 2) for n in kernel[1:]]
    return Conv(inputs, outputs, kernel, padding=tuple(padding), types=types, rngs=rngs)


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
        h = self.conv1(cache.extend(jax.nn.silu(self.norm1(x)), FRAMES_BEFORE), cache.picture)
        h = self.conv2(cache.extend(jax.nn.silu(self.norm2(h)), FRAMES_BEFORE), cache.picture)
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Attention of one head between the pixels of each frame, added to its input."""

    def __init__(self, dim: int, *, types: Types, rngs: nnx.Rngs) -> None:
        self.norm = ChannelNorm(dim, types=types)
        self.qkv = nnx.Linear(dim, 3 * dim, **types.kwargs(), rngs=rngs)
        self.out = nnx.Linear(dim, dim, **types.kwargs(), rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch frames height width dim"], picture: Picture = WHOLE
    ) -> Float[Array, "batch frames height width dim"]:
        """Returns the shape that it is given: its pixels see those of all devices."""
        dim = x.shape[-1]
        q, kv = jnp.split(self.qkv(self.norm(x)), [dim], axis=-1)
        kv = picture.gathered(kv)

        def tokens(y: Array) -> Array:
            return y.reshape(y.shape[0] * y.shape[1], -1, 1, dim)

        k, v = jnp.split(kv, 2, axis=-1)
        # the head is as wide as the network (384 to 1024), which no kernel is written for
        out = vm.Dense()(tokens(q), tokens(k), tokens(v), implementation="xla")
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
        x = self.attention(self.block1(x, cache), cache.picture)
        return self.block2(x, cache)
