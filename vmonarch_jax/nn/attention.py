"""The layer around an attention method: projections, norms, heads."""

from collections.abc import Callable
from typing import Any

import einops
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .. import checks
from ..grid import Shape3, VideoGrid, positive_int
from ..memory import Step, attend
from ..methods import Attention, VMonarch

# Keeps the RMS of an all-zero head away from zero.
NORM_EPSILON = 1e-6


class VideoSelfAttention(nnx.Module):
    """Multi-head self-attention of video tokens under any attention method.

        q, k, v = split(x W_qkv) ;  q, k = rotate(norm(q)), rotate(norm(k))
        out     = concat_heads(attention(q, k, v, grid=grid)) W_out

    The method holds no parameters: weights trained under one method load under any other.

    Args:
        dim: width of a token.
        heads: number of heads; the head dimension is `dim / heads`.
        attention: a method value, `vm.VMonarch()` unless given.
        qk_norm: RMS norm of each head's query and key, with weights, in float32.
        dtype: of the matrix products; `None`: that of the input and weights.
        rngs: keys of the initial weights.

    Raises:
        ValueError: if a size is no positive integer or `heads` does not divide `dim`.

    Example:
        >>> layer = vm.nn.VideoSelfAttention(dim=192, heads=3, rngs=nnx.Rngs(0))
        >>> y = layer(x, grid=vm.VideoGrid(16, 8, 8))                  # [batch, seq, dim]
        >>> linen = nnx.bridge.to_linen(vm.nn.VideoSelfAttention, dim=192, heads=3)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        attention: Attention | None = None,
        qk_norm: bool = True,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        dim, heads = positive_int("dim", dim), positive_int("heads", heads)
        if dim % heads:
            raise ValueError(f"`dim` must be a multiple of `heads` = {heads}, got {dim}")
        self.heads = heads
        self.attention = VMonarch() if attention is None else attention
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        norm = {"epsilon": NORM_EPSILON, "dtype": jnp.float32, "rngs": rngs}
        self.q_norm = nnx.RMSNorm(dim // heads, **norm) if qk_norm else None
        self.k_norm = nnx.RMSNorm(dim // heads, **norm) if qk_norm else None
        self.out = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        *,
        grid: VideoGrid | Shape3,
        rotate: Callable[[Array], Array] | None = None,
        attention: Attention | None = None,
        state: Any = None,
        step: Step | None = None,
    ) -> Any:
        """The layer's output `[batch, seq, dim]`; with a state, the output and the state after it.

        Args:
            x: tokens in the order of `grid`.
            grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.
            rotate: applied to q and k, `[batch, seq, heads, head_dim]`, after the norm: RoPE.
            attention: overrides the constructor's method for this call.
            state: what the method remembers (`vm.init_state`); `None`: nothing.
            step: the denoising step, from 0; needed with a state.

        Raises:
            ValueError: if `x` does not fit the layer or the grid, or `rotate` changes a shape.
        """
        grid, dim = VideoGrid.of(grid), self.qkv.in_features
        if jnp.ndim(x) != 3 or x.shape[-1] != dim:
            raise ValueError(f"`x` must be [batch, seq, dim = {dim}], got shape {jnp.shape(x)}")
        q, k, v = einops.rearrange(
            self.qkv(x), "z n (three h d) -> three z n h d", three=3, h=self.heads
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = (q, k) if rotate is None else [checks.rotated(rotate, y) for y in (q, k)]
        method = self.attention if attention is None else attention
        at_q, at_k = (y.astype(v.dtype) for y in turned)
        out, after = attend(method, at_q, at_k, v, grid=grid, state=state, step=step)
        out = self.finish(einops.rearrange(out, "z n h d -> z n (h d)"), x, (q, k, v), rotate)
        return out if state is None else (out, after)

    def finish(
        self,
        out: Float[Array, "batch seq dim"],
        x: Float[Array, "batch seq dim"],
        qkv: tuple[Array, Array, Array],
        rotate: Callable[[Array], Array] | None,
    ) -> Float[Array, "batch seq dim"]:
        """The output projection of what attention gave; layers with a second branch add it here.

        Args:
            out: the attention's output, heads side by side.
            x: the layer's input.
            qkv: `[batch, seq, heads, head_dim]` each, after the norm and before `rotate`.
            rotate: as in the call.
        """
        return self.out(out)
