"""The umT5 encoder: tokens of a prompt in, text states out."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from .config import TextConfig


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "seq seq"]:
    """The bucket of the distance from each token to each other token.

    Half of the buckets are for keys before the query, half for keys behind it. Of each half, the
    first half holds one distance each; the others grow geometrically up to `max_distance`, and
    the last holds all that is farther.

    Args:
      length: tokens.
      buckets: of both directions together.
      max_distance: tokens from which on all distances are the same.

    Returns:
      Buckets `[query, key]`, computed on the host: the logarithms of accelerators are not exact
      enough to tell on which side of an edge a distance lies.
    """
    side = buckets // 2
    exact = side // 2
    steps = side - exact  # geometric buckets
    edges = exact * (max_distance / exact) ** (np.arange(1, steps) / steps)
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    far = exact + np.searchsorted(edges, distance, side="right")
    return np.where(distance < exact, distance, far) + side * (offset > 0)


def _linear(config, inputs, outputs, std, param_dtype, rngs) -> nnx.LinearGeneral:
    """A projection without bias from axes of sizes `inputs` to axes of sizes `outputs`."""
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=tuple(range(-len(inputs), 0)),
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        dtype=config.compute_dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _norm(config: TextConfig, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.dim, epsilon=config.eps, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
    )


class Attention(nnx.Module):
    """Self-attention with a learnt bias for each distance.

    Formula: `softmax(q k^T + bias[bucket]) v`; the logits are not scaled, the initial weights are.
    """

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype) -> None:
        dim, heads = config.dim, (config.heads, config.head_dim)
        query_std = (dim * config.head_dim) ** -0.5
        self.q = _linear(config, (dim,), heads, query_std, param_dtype, rngs)
        self.k = _linear(config, (dim,), heads, dim**-0.5, param_dtype, rngs)
        self.v = _linear(config, (dim,), heads, dim**-0.5, param_dtype, rngs)
        self.out = _linear(config, heads, (dim,), math.prod(heads) ** -0.5, param_dtype, rngs)
        bias_init = nnx.initializers.normal(dim**-0.5)
        bias_shape = (config.buckets, config.heads)
        self.bias = nnx.Param(bias_init(rngs.params(), bias_shape, param_dtype))

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        buckets: Int[Array, "seq seq"],
        mask: Float[Array, "batch seq"],
    ) -> Float[Array, "batch seq dim"]:
        bias = self.bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
        out = jax.nn.dot_product_attention(
            self.q(x), self.k(x), self.v(x), bias=bias, mask=mask[:, None, None] > 0, scale=1.0
        )
        return self.out(out)


class FeedForward(nnx.Module):
    """Formula: `(gelu(x gate) * x up) down`, with the tanh form of gelu."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype) -> None:
        dim, hidden = (config.dim,), (config.ffn_dim,)
        std = config.dim**-0.5
        self.gate = _linear(config, dim, hidden, std, param_dtype, rngs)
        self.up = _linear(config, dim, hidden, std, param_dtype, rngs)
        self.down = _linear(config, hidden, dim, config.ffn_dim**-0.5, param_dtype, rngs)

    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
    """Formula: `x += attn(norm1(x))`, then `x += ffn(norm2(x))`."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype) -> None:
        self.norm1 = _norm(config, param_dtype, rngs)
        self.attn = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.norm2 = _norm(config, param_dtype, rngs)
        self.ffn = FeedForward(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        buckets: Int[Array, "seq seq"],
        mask: Float[Array, "batch seq"],
    ) -> Float[Array, "batch seq dim"]:
        # umT5's residual stream grows to thousands: in bfloat16 it would swallow small updates
        x = x + self.attn(self.norm1(x), buckets, mask).astype(jnp.float32)
        return x + self.ffn(self.norm2(x)).astype(jnp.float32)


class UMT5Encoder(nnx.Module):
    """Encodes tokens as umT5 does: a T5 encoder with position biases of its own in every layer.

    Matmuls are in the configuration's dtype; norms, softmax and the residual stream in float32.
    Equal to Transformers' `UMT5EncoderModel`. The layers' parameters are stacked and scanned.

    Args:
      config: the sizes.
      rngs: keys of the initial weights.
      param_dtype: of the weights.

    Example:
      encoder = UMT5Encoder(TextConfig(), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
      tokens, mask = WanTokenizer.load("umt5-xxl/").encode(["a red fox in the snow"])
      states = embed_text(encoder, tokens, mask)

    Source: Chung et al., UniMax (arXiv 2304.09151); Raffel et al., T5 (arXiv 1910.10683).
    """

    def __init__(
        self, config: TextConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32
    ) -> None:
        self.config = config
        embed_init = nnx.initializers.normal(1.0)
        embed_shape = (config.vocabulary, config.dim)
        self.embed = nnx.Param(embed_init(rngs.params(), embed_shape, param_dtype))

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, param_dtype=param_dtype)

        self.blocks = stack(rngs)
        self.norm = _norm(config, param_dtype, rngs)

    def __call__(
        self, tokens: Int[Array, "batch seq"], mask: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq dim"]:
        """Returns the states of all tokens, in float32.

        Args:
          tokens: ids, padded to one length.
          mask: 1 where there is a token, 0 where there is padding; nobody attends to padding.
            States of padding are returned, and mean nothing.

        Raises:
          ValueError: the shapes are not `[batch, seq]`, or not the same.
        """
        if tokens.ndim != 2 or tokens.shape != mask.shape:
            raise ValueError(
                "expected tokens and mask of one shape [batch, seq], "
                f"got {tokens.shape} and {mask.shape}"
            )
        config = self.config
        buckets = relative_buckets(tokens.shape[1], config.buckets, config.max_distance)
        graph, layers = nnx.split(self.blocks)

        def block(x, layer):
            return nnx.merge(graph, layer)(x, jnp.asarray(buckets), mask), None

        x = self.embed[...][tokens].astype(jnp.float32)
        return self.norm(jax.lax.scan(block, x, layers)[0])


def embed_text(
    encoder: UMT5Encoder, tokens: Int[Array, "batch seq"], mask: Int[Array, "batch seq"]
) -> Float[Array, "batch seq dim"]:
    """The text states as the Wan transformer takes them: zero beyond each text's end.

    Args:
      encoder: the text encoder.
      tokens: ids of `WanTokenizer.encode`.
      mask: 1 for tokens, 0 for padding.

    Raises:
      ValueError: the shapes are not `[batch, seq]`, or not the same.

    Source: Diffusers' `WanPipeline`.
    """
    return jnp.where(mask[..., None] > 0, encoder(tokens, mask), 0.0)
