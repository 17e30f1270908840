"""The Wan transformer: noisy latents, time and text in, velocity out."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

import vmonarch_jax as vm
from vmonarch_jax.memory import Step

from ..dit import unpatchify
from .attention import Attend, CrossAttention, SelfAttention
from .config import TransformerConfig
from .embeddings import ImageEmbedding, PatchEmbedding, TextEmbedding, TimeEmbedding, rope_tables
from .keys_transformer import transformer_entries
from .memory import EMPTY, Memory
from .transformer_layers import LayerNorm, Linear, OneDevice, Placement, layer_norm

#: One method for all layers, or one for each.
Methods = vm.Attention | Sequence[vm.Attention]


class Block(nnx.Module):
    """One transformer block: self-attention, cross-attention, MLP.

    Formula, with `(s1, c1, g1, s2, c2, g2) = modulation of the time + this block's own`:
    `x += g1 * attn(norm(x) * (1 + c1) + s1)`, `x += cross(cross_norm(x))`,
    `x += g2 * mlp(norm(x) * (1 + c2) + s2)`. Sums are float32; between them x is rounded to the
    compute dtype, as in Diffusers.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any) -> None:
        dim, options = config.dim, {"rngs": rngs, "param_dtype": param_dtype}
        self.attn = SelfAttention(config, **options)
        self.cross = CrossAttention(config, **options)
        self.cross_norm = LayerNorm(dim, config.eps, param_dtype=param_dtype)
        self.mlp_in = Linear(dim, config.ffn_dim, **options)
        self.mlp_out = Linear(config.ffn_dim, dim, **options)
        self.modulation = _modulation(6, dim, rngs, param_dtype)
        self.eps = config.eps

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        shared: Float[Array, "batch times 6 dim"],
        text: Float[Array, "batch length dim"],
        image: Float[Array, "batch n dim"] | None,
        rope: tuple[Array, Array],
        attend: Attend,
        place: Placement,
        branch: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Any]:
        """The residual stream after the block, in the dtype of `x`, and what `attend` remembers.

        `branch` says whether this layer has the linear branch of the stack; `None`: it has.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = _parts(shared, self.modulation, x.shape[1])
        # Profiles name the three parts.
        with jax.named_scope("self_attention"):
            h = _modulated(x, shift1, scale1, self.eps)
            h, memory = self.attn(h, rope, attend, place, branch)
            x = (x.astype(jnp.float32) + h.astype(jnp.float32) * gate1).astype(x.dtype)
        x = place.constrain(x, "batch", "seq", None)
        with jax.named_scope("cross_attention"):
            x = x + self.cross(self.cross_norm(x).astype(x.dtype), text, image, place)
        x = place.constrain(x, "batch", "seq", None)
        with jax.named_scope("feed_forward"):
            h = _modulated(x, shift2, scale2, self.eps)
            h = jax.nn.gelu(self.mlp_in(h), approximate=True)
            h = self.mlp_out(place.constrain(h, "batch", "seq", "mlp"))
            x = (x.astype(jnp.float32) + h.astype(jnp.float32) * gate2).astype(x.dtype)
        return place.constrain(x, "batch", "seq", None), memory

    def branch_gate(
        self, x: Float[Array, "batch seq dim"], shared: Float[Array, "batch times 6 dim"]
    ) -> Float[Array, " batch"]:
        """The gate of the linear branch for this input of the block."""
        shift, scale, *_ = _parts(shared, self.modulation, x.shape[1])
        return self.attn.linear.gate(_modulated(x, shift, scale, self.eps))[:, 0]


class WanTransformer(nnx.Module):
    """A transformer that predicts the flow-matching velocity of a noisy latent video.

    One class for Wan2.1 and Wan2.2, with and without an image; two experts are two of it. The
    blocks' parameters are stacked, layers in front, and run by one `jax.lax.scan`. Where layers
    have different methods, each step chooses its own by `jax.lax.switch`, so that neither the
    program grows with the layers nor a weight is copied.

    Args:
      config: the sizes.
      attention: the method of every layer, or one method per layer; a value without parameters.
      rngs: keys of the initial weights.
      param_dtype: of the weights; the products are in `config.dtype`.

    Raises:
      ValueError: not as many methods as layers.

    Example:
      model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
      model = split_params(model)[0](weights)
      velocity = model(latents, time, text, attention=vm.VMonarch())

    Source: `WanTransformer3DModel` of Diffusers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Methods = vm.Dense(),  # noqa: B008 (frozen)
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ) -> None:
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.config = config
        self.attention = tuple(attention) if isinstance(attention, Sequence) else attention
        self.methods()
        self.patch = PatchEmbedding(config, **options)
        self.time = TimeEmbedding(config, **options)
        self.text = TextEmbedding(config, **options)
        if config.image_dim:
            self.image = ImageEmbedding(config, **options)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, param_dtype=param_dtype)

        self.blocks = blocks(rngs)
        self.modulation = _modulation(2, config.dim, rngs, param_dtype)
        self.out = Linear(config.dim, math.prod(config.patch) * config.out_channels, **options)

    def __call__(
        self,
        latents: Float[Array, "batch frames height width channels"],
        time: Float[Array, " batch"] | Float[Array, "batch times"],
        text: Float[Array, "batch length text_dim"],
        image: Float[Array, "batch n image_dim"] | None = None,
        *,
        attention: Methods | None = None,
        memory: Memory | None = None,
        step: Step | None = None,
        sharding: Placement | None = None,
    ) -> Any:
        """Returns the velocity, in float32; with a memory, also that after this step.

        Args:
          latents: noisy latents, with mask and image behind their channels where the model has
            them; any size that the patch divides.
          time: 0 (the video) to 1000 (noise), as the published models take it. Where the
            configuration has `per_token_time` also `[batch, grid.frames]` or `[batch, tokens]`: a
            time for each frame or token of the grid. That of tokens costs
            `24 * batch * tokens * dim` bytes, once for all layers; that of frames next to nothing.
          text: text states; fewer than `text_length` are followed by zeros.
          image: states of the image encoder, exactly where the configuration has `image_dim`; of
            two images one after the other where it has `image_positions`.
          attention: overrides the constructor's method, or methods, for this call.
          memory: what attention remembers of the steps before (`memory.begin`); `None`: every
            method acts as if nothing had gone before.
          step: the denoising step, from 0; needed with a memory.
          sharding: places activations and attention on a mesh; `None`: no mesh.

        Raises:
          ValueError: a shape does not fit the configuration or the other arguments.
        """
        if memory is not None and step is None:
            raise ValueError("expected the number of the step with a memory, got none")
        velocity, after, _ = self._run(
            latents, time, text, image, attention, memory or EMPTY, step, sharding
        )
        return velocity if memory is None else (velocity, after)

    def gates(
        self,
        latents: Float[Array, "batch frames height width channels"],
        time: Float[Array, " batch"] | Float[Array, "batch times"],
        text: Float[Array, "batch length text_dim"],
        image: Float[Array, "batch n image_dim"] | None = None,
        *,
        attention: Methods | None = None,
        sharding: Placement | None = None,
    ) -> Float[Array, "batch branches"]:
        """The gate of each linear branch, in the order of `config.linear_layers`, in float32.

        Args:
          latents, time, text, image, attention, sharding: as `__call__` takes them.

        Raises:
          ValueError: no layer has a branch, or what `__call__` raises.
        """
        if not self.config.linear_layers:
            raise ValueError("expected a model with linear branches, got linear_layers ()")
        found: Any = self._run(
            latents, time, text, image, attention, EMPTY, None, sharding, measured=True
        )
        return found[2][np.array(self.config.linear_layers)].T

    def _run(
        self, latents, time, text, image, attention, memory, step, sharding, measured=False
    ):  # fmt: skip
        """The velocity, the memory, and where it is `measured` the gate of each layer's branch."""
        methods = self.methods(attention)
        place = OneDevice() if sharding is None else sharding
        grid = self._check(latents, time, text, image)
        config, dtype = self.config, self.config.compute_dtype
        whole = place.gather(self, transformer_entries(config))
        state, shared = whole.time(time.reshape(len(time), -1))
        times = "seq" if state.shape[1] == grid.tokens else None
        state = place.constrain(state, "batch", times, None)
        shared = place.constrain(shared, "batch", times, None, None)
        text = jnp.pad(text, ((0, 0), (0, config.text_length - text.shape[1]), (0, 0)))
        text = place.constrain(whole.text(text.astype(dtype)), "batch", "text", None)
        if image is not None:
            image = place.constrain(whole.image(image.astype(dtype)), "batch", "text", None)
        rope = rope_tables(grid, config.head_dim, config.rope_theta)
        rope = tuple(place.constrain(table, "seq", None) for table in rope)
        x = place.constrain(whole.patch(latents.astype(dtype)), "batch", "seq", None)
        attending = methods, memory, step, grid
        x, memory, gates = whole._scan(x, shared, text, image, rope, attending, place, measured)
        shift, scale = _parts(state[:, :, None], whole.modulation, grid.tokens)
        x = _modulated(x, shift, scale, config.eps)
        # A video's tokens come together before they are put back into frames.
        x = place.constrain(whole.out(x).astype(jnp.float32), "batch", None, None)
        return unpatchify(x, config.patch, grid), place.constrain_states(memory), gates

    def methods(self, attention: Methods | None = None) -> tuple[vm.Attention, ...]:
        """The attention method of each layer, given what a call overrides.

        Raises:
          ValueError: not as many methods as layers.
        """
        layers = self.config.layers
        attention = self.attention if attention is None else attention
        if not isinstance(attention, Sequence):
            return (attention,) * layers
        if len(attention) != layers:
            raise ValueError(
                f"expected one attention method for each of {layers} layers, got {len(attention)}"
            )
        return tuple(attention)

    def _scan(self, x, shared, text, image, rope, attending, place: Placement, measured):
        methods, memory, step, grid = attending
        graph, stacked = nnx.split(self.blocks)
        entries = transformer_entries(self.config)
        kinds = list(dict.fromkeys(methods))
        kind_of_layer = np.array([kinds.index(method) for method in methods], np.int32)
        calls = [functools.partial(_call, place, grid, step, method) for method in kinds]

        def layer(x, own, params, kind, branch):
            def attend(q, k, v):
                if len(calls) == 1:
                    return calls[0](own, q, k, v)
                return jax.lax.switch(kind, calls, own, q, k, v)

            block = place.gather(nnx.merge(graph, params), entries, "blocks.")
            gate = block.branch_gate(x, shared) if measured else None
            return *block(x, shared, text, image, rope, attend, place, branch), gate

        layer = _remat(layer, self.config.remat)

        def body(carry, of):
            # states are carried and written where they lie: as outputs of the scan they would be
            # there twice
            x, memory = carry
            params, kind, index, branch = of
            x, own, gate = layer(x, memory.layer(index), params, kind, branch)
            return (x, memory.with_layer(index, own)), gate

        numbers = np.arange(len(methods), dtype=np.int32)
        linear = self.config.linear_layers
        # Only where layers differ is there anything to choose as the program runs.
        branches = np.isin(numbers, linear) if 0 < len(linear) < len(numbers) else None
        layers = stacked, kind_of_layer, numbers, branches
        (x, memory), gates = jax.lax.scan(body, (x, memory), layers)
        return x, memory, gates

    def _check(self, latents, time, text, image) -> vm.VideoGrid:
        config = self.config
        if latents.ndim != 5 or latents.shape[-1] != config.in_channels:
            raise ValueError(
                f"expected latents [batch, frames, height, width, {config.in_channels}], "
                f"got {latents.shape}"
            )
        batch, grid = latents.shape[0], config.grid_of(*latents.shape[1:4])
        times = [(batch,)]
        if config.per_token_time:
            times += [(batch, grid.frames), (batch, grid.tokens)]
        if time.shape not in times:
            raise ValueError(f"expected time of shape {_either(times)}, got {time.shape}")
        if (
            text.ndim != 3
            or (text.shape[0], text.shape[2]) != (batch, config.text_dim)
            or not 1 <= text.shape[1] <= config.text_length
        ):
            raise ValueError(
                f"expected text [{batch}, 1 to {config.text_length}, {config.text_dim}], "
                f"got {text.shape}"
            )
        if (image is None) != (config.image_dim is None):
            expected = "none (image_dim is None)" if config.image_dim is None else "image states"
            raise ValueError(f"expected {expected} as image, got {getattr(image, 'shape', None)}")
        if image is not None:
            n = config.image_positions or image.shape[1]
            if image.shape != (batch, n, config.image_dim):
                raise ValueError(
                    f"expected image of shape {(batch, n, config.image_dim)}, got {image.shape}"
                )
        return grid


def _call(place: Placement, grid, step, method: vm.Attention, own: Memory, q, k, v):
    """Attention of one layer, and what the layer remembers then."""
    state = own.of(method)
    if state is None:
        return place.attend(method, q, k, v, grid), own
    out, state = place.attend(method, q, k, v, grid, state, step)
    return out, own.replaced(method, state)


def _modulation(parts: int, dim: int, rngs: nnx.Rngs, param_dtype: Any) -> nnx.Param:
    draw = jax.random.normal(rngs.params(), (parts, dim)) * dim**-0.5
    return nnx.Param(draw.astype(param_dtype))


def _parts(
    shared: Float[Array, "batch times #parts dim"], own: nnx.Param, seq: int
) -> list[Float[Array, "batch #seq dim"]]:
    """Each part of `shared + own` in float32, by token where times differ."""
    both = shared + own[...].astype(jnp.float32)
    return [_by_token(part, seq) for part in jnp.moveaxis(both, 2, 0)]


def _modulated(
    x: Float[Array, "batch seq dim"],
    shift: Float[Array, "batch #seq dim"],
    scale: Float[Array, "batch #seq dim"],
    eps: float,
) -> Float[Array, "batch seq dim"]:
    """What an attention or an MLP reads, in the dtype of `x`."""
    return (layer_norm(x, eps) * (1 + scale) + shift).astype(x.dtype)


def _by_token(x: Float[Array, "batch times dim"], seq: int) -> Float[Array, "batch #seq dim"]:
    """Gives each token what its frame has; one for all and one for each stay as they are."""
    batch, times, dim = x.shape
    if times in (1, seq):
        return x
    spread = jnp.broadcast_to(x[:, :, None], (batch, times, seq // times, dim))
    return spread.reshape(batch, seq, dim)


def _remat(layer: Any, policy: str) -> Any:
    policies = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    if policy not in policies:
        return layer
    # Inside a scan nothing can be shared with the forward pass anyway.
    return jax.checkpoint(layer, policy=policies[policy], prevent_cse=False)


def _either(shapes: list[tuple[int, ...]]) -> str:
    return " or ".join(map(str, shapes))
