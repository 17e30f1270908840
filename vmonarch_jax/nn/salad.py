"""SALAD's layer: sparse attention, and beside it a gated linear branch that sees every token."""

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .. import checks
from ..linear import FEATURE_MAPS, linear_attention
from ..methods import Attention
from ..salad import Salad
from .attention import VideoSelfAttention


class SaladAttention(VideoSelfAttention):
    """Self-attention of video tokens with a sparse and a linear branch (SALAD).

        q, k, v = split(x W_qkv), q and k normed
        sparse  = attention(rotate(q), rotate(k), v, grid=grid)
        linear  = linear_attention(q, k, v, rotate=rotate)
        out     = (concat_heads(sparse) + gate(x) * concat_heads(linear) W_linear) W_out
        gate(x) = sigmoid(mean_n x[n] . w + b)                        one scalar a sample

    The branches share q, k and v. `W_linear` starts at zero, so a new layer equals its sparse
    branch, and weights of `vm.nn.VideoSelfAttention` serve for all other parameters. The branch
    adds `dim^2 + dim + 1` parameters and `vm.flops.linear_branch` matmul FLOPs.

    Args:
        dim: width of a token.
        heads: number of heads; the head dimension is `dim / heads`.
        attention: the sparse branch, `vm.Salad()` unless given; any method value serves.
        qk_norm: RMS norm of each head's query and key, with weights, in float32.
        feature_map: phi of the linear branch, "relu" or "elu".
        rotate_linear: whether the linear branch's numerator turns its features by `rotate`.
        gate_tokens: a gate for every token, `sigmoid(x[n] . w + b)`, instead of one a sample.
        gate_bias: what b starts at; w starts at zero, so 0 starts with a gate of 1/2.
        dtype: of the matrix products; `None`: that of the input and weights.
        rngs: keys of the initial weights.

    Raises:
        ValueError: if an option is wrong.

    Example:
        >>> layer = vm.nn.SaladAttention(dim=192, heads=3, rngs=nnx.Rngs(0))
        >>> y = layer(x, grid=vm.VideoGrid(16, 8, 8), rotate=rotate)   # [batch, seq, dim]

    Reference: SALAD (arXiv 2601.16515), section 3. The paper says that the gate is a scalar that
    depends on the input, and that the projection starts at zero; the mean over tokens, the gate of
    a half at the start and the projection without a bias are choices made here.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        attention: Attention | None = None,
        qk_norm: bool = True,
        feature_map: str = "relu",
        rotate_linear: bool = True,
        gate_tokens: bool = False,
        gate_bias: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        attention = Salad() if attention is None else attention
        super().__init__(dim, heads, attention=attention, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"`feature_map` must be one of {sorted(FEATURE_MAPS)}, got {feature_map!r}"
            )
        self.feature_map, self.rotate_linear = feature_map, rotate_linear
        self.gate_tokens = gate_tokens
        #: Called with every gate, `[batch, 1 or seq, 1]`, as it is computed; `None`: nobody looks.
        self.on_gate: Callable[[Array], None] | None = None
        zeros = nnx.initializers.zeros
        self.linear_out = nnx.Linear(
            dim, dim, use_bias=False, kernel_init=zeros, dtype=dtype, rngs=rngs
        )
        bias = nnx.initializers.constant(checks.finite("gate_bias", gate_bias))
        self.gate = nnx.Linear(
            dim, 1, kernel_init=zeros, bias_init=bias, dtype=jnp.float32, rngs=rngs
        )

    def gate_of(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch _ 1"]:
        """The share of the linear branch that is let through, in float32: `[batch, 1, 1]`.

        With `gate_tokens` it is `[batch, seq, 1]`.
        """
        x = x.astype(jnp.float32)
        gate = jax.nn.sigmoid(self.gate(x if self.gate_tokens else x.mean(1, keepdims=True)))
        if self.on_gate is not None:
            self.on_gate(gate)
        return gate

    def finish(
        self,
        out: Float[Array, "batch seq dim"],
        x: Float[Array, "batch seq dim"],
        qkv: tuple[Array, Array, Array],
        rotate: Callable[[Array], Array] | None,
    ) -> Float[Array, "batch seq dim"]:
        """The output projection of both branches, from the sparse one."""
        q, k, v = qkv
        linear = linear_attention(
            q.astype(v.dtype), k.astype(v.dtype), v,
            rotate=rotate if self.rotate_linear else None, feature_map=self.feature_map,
        )  # fmt: skip
        linear = self.linear_out(einops.rearrange(linear, "z n h d -> z n (h d)"))
        return self.out(out + (self.gate_of(x) * linear).astype(out.dtype))
