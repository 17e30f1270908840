"""The parts of the transformer: layer norm and the adaLN block around attention and MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import vmonarch_jax as vm
from vmonarch_jax.memory import Step
from vmonarch_jax.nn import SaladAttention, VideoSelfAttention

from .config import VideoDiTConfig
from .rope import apply_rope

#: Called as `method(q, k, v, grid=grid)` with arrays `[batch, seq, heads, head_dim]`.
AttentionMethod = Callable[..., Array]

_NORM_EPS = 1e-6  # keeps the variance of a constant token away from zero


def layer_norm(x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
    """Layer norm without weights, in float32: the modulation that follows has them."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _NORM_EPS)


class Block(nnx.Module):
    """One transformer block under adaptive layer norm (adaLN).

    Formula, with `(s1, c1, g1, s2, c2, g2) = shared modulation + this block's own bias`:
    `x += g1 * attention(norm(x) * (1 + c1) + s1)`, then `x += g2 * mlp(norm(x) * (1 + c2) + s2)`.
    The modulation network is shared by all blocks, as in PixArt and Wan, so the parameters go
    into the blocks' matmuls.

    With `linear` the attention has SALAD's linear branch beside it.
    """

    def __init__(self, config: VideoDiTConfig, *, linear: bool = False, rngs: nnx.Rngs) -> None:
        dim, dtype = config.dim, config.compute_dtype
        self.modulation = nnx.Param(jnp.zeros((6, dim)))
        layer = SaladAttention if linear else VideoSelfAttention
        self.attention = layer(dim, config.heads, dtype=dtype, rngs=rngs)
        self.mlp_in = nnx.Linear(dim, config.mlp_ratio * dim, dtype=dtype, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp_ratio * dim, dim, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        shared: Float[Array, "batch 6 dim"],
        angles: Float[Array, "seq half_dim"],
        attention: AttentionMethod,
        grid: vm.VideoGrid,
        state: Any = None,
        step: Step | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Any]:
        """Returns the residual stream after the block, in float32, and the attention's state."""
        parts = jnp.split(shared + self.modulation[...], 6, axis=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = (layer_norm(x) * (1 + scale1) + shift1).astype(self.dtype)
        # the residual stream stays float32: small updates must not be lost in bfloat16
        rotate = functools.partial(apply_rope, angles=angles)
        h = self.attention(h, grid=grid, rotate=rotate, attention=attention, state=state, step=step)
        if state is not None:
            h, state = h
        x = x + gate1 * h.astype(jnp.float32)
        h = (layer_norm(x) * (1 + scale2) + shift2).astype(self.dtype)
        h = self.mlp_out(jax.nn.gelu(self.mlp_in(h)))
        return x + gate2 * h.astype(jnp.float32), state
