"""The video diffusion transformer: video, time, label and caption in, velocity out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import vmonarch_jax as vm
from vmonarch_jax.memory import Step

from .config import VideoDiTConfig
from .layers import AttentionMethod, Block, layer_norm
from .rope import rope_angles
from .spectrum import from_modes, to_modes, wiener

_TIME_FREQUENCIES = 64
_PLACE_OCTAVES = 4
_VIDEO_STD = 0.5  # of pixels in [-1, 1]


def time_features(t: Float[Array, " batch"]) -> Float[Array, "batch features"]:
    """Cosines and sines of `1000 t` at 64 frequencies from 1 down to 1e-4 radians."""
    rates = jnp.exp(-math.log(10_000.0) * jnp.arange(_TIME_FREQUENCIES) / _TIME_FREQUENCIES)
    phase = 1000.0 * t.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def place_features(grid: vm.VideoGrid) -> Float[Array, "seq features"]:
    """Sines and cosines of each token's relative place in the video, four octaves an axis.

    RoPE tells tokens how far apart they are and not where they are; a camera move has a first
    and a last frame. Places are fractions of the grid, so any resolution is in range.
    """
    axes = ((jnp.arange(n) + 0.5) / n for n in (grid.frames, grid.height, grid.width))
    places = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3, 1)
    phase = (places * math.pi * 2.0 ** jnp.arange(_PLACE_OCTAVES)).reshape(grid.tokens, -1)
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class VideoDiT(nnx.Module):
    """A transformer that predicts the flow-matching velocity of a noised video.

    The prediction is `wiener(x)`'s velocity, the best linear guess, plus what the network adds in
    the modes where something is left to say. So an untrained model already is the best linear
    denoiser, and training starts where pixels stop being predictable from their spectrum.

    Args:
      config: the sizes.
      attention: the method of every layer, or one method per layer. It is a plain value: it holds
        no parameters, so weights trained under one method load under any other.
      rngs: keys of the initial weights.
    """

    def __init__(
        self,
        config: VideoDiTConfig,
        *,
        attention: AttentionMethod | Sequence[AttentionMethod] = vm.Dense(),  # noqa: B008 (frozen)
        rngs: nnx.Rngs,
    ) -> None:
        dim = config.dim
        self.config = config
        self.attention = tuple(attention) if isinstance(attention, Sequence) else attention
        patch_dim = 3 * math.prod(config.patch)
        zeros = nnx.initializers.zeros
        self.embed = nnx.Linear(2 * patch_dim, dim, rngs=rngs)
        self.place = nnx.Linear(6 * _PLACE_OCTAVES, dim, use_bias=False, rngs=rngs)
        self.time_in = nnx.Linear(2 * _TIME_FREQUENCIES, dim, rngs=rngs)
        self.time_out = nnx.Linear(dim, dim, rngs=rngs)
        self.label = nnx.Embed(config.classes + 1, dim, rngs=rngs)
        if config.caption_dim:
            self.caption = nnx.Linear(config.caption_dim, dim, use_bias=False, rngs=rngs)
        # zero: at the start each block is the identity, which is where deep stacks train from
        self.modulation = nnx.Linear(dim, 6 * dim, kernel_init=zeros, rngs=rngs)
        linear = config.linear_layers
        self.blocks = nnx.List(
            [Block(config, linear=n in linear, rngs=rngs) for n in range(config.depth)]
        )
        self.final_modulation = nnx.Linear(dim, 2 * dim, kernel_init=zeros, rngs=rngs)
        self.unembed = nnx.Linear(dim, patch_dim, kernel_init=zeros, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch frames height width channels"],
        t: Float[Array, " batch"],
        label: Int[Array, " batch"],
        caption: Float[Array, "batch caption_dim"] | None = None,
        attention: AttentionMethod | Sequence[AttentionMethod] | None = None,
        attention_state: tuple[Any, ...] | None = None,
        step: Step | None = None,
    ) -> Any:
        """Returns the velocity `d x / d t`, in float32; with a state, also the next state.

        Args:
          x: noised videos, `(1 - t) video + t noise`, at any size that the patch divides.
          t: time in [0, 1]; 0 is the video, 1 the noise.
          label: class in `[0, classes]`; `classes` itself is the null class.
          caption: the caption vector; `None` and zeros both mean "no caption".
          attention: overrides the constructor's method, or methods, for this call.
          attention_state: what each layer's method remembers of the steps before
            (`init_attention_state`); `None`: every method acts as if nothing had gone before.
          step: the denoising step, from 0, a Python int or traced; needed with a state.

        Raises:
          ValueError: a shape does not fit the configuration or the other arguments.
        """
        config = self.config
        methods = self.methods(attention)
        states = self._states(attention_state, step)
        velocity, states = self._run(
            x, t, label, caption, methods, config.scan_layers, config.remat, states, step
        )
        return velocity if attention_state is None else (velocity, states)

    def init_attention_state(
        self,
        batch: int,
        size: tuple[int, int, int] | None = None,
        attention: AttentionMethod | Sequence[AttentionMethod] | None = None,
    ) -> tuple[Any, ...]:
        """Returns what each layer's attention remembers before the first denoising step.

        Args:
          batch: videos in a call; guidance doubles it.
          size: frames, height and width in pixels; the configuration's if not given.
          attention: overrides the constructor's method, or methods.

        Returns:
          One state a layer; `None` for a layer whose method remembers nothing.

        Raises:
          ValueError: a method does not fit the grid, or a number is wrong.

        Example:
          state = model.init_attention_state(len(x))
          for step, t in enumerate(times):
            velocity, state = model(x, t, label, attention_state=state, step=step)
        """
        config = self.config
        sizes = {"batch": batch, "heads": config.heads, "head_dim": config.head_dim}
        grid = config.grid_of(size or config.video_shape[:3])
        return tuple(
            vm.init_state(method, grid, **sizes, dtype=config.compute_dtype)
            for method in self.methods(attention)
        )

    def _states(self, states: tuple[Any, ...] | None, step: Step | None) -> tuple[Any, ...]:
        depth = self.config.depth
        if states is None:
            return (None,) * depth
        if len(states) != depth:
            raise ValueError(f"expected attention_state of {depth} layers, got {len(states)}")
        if step is None:
            raise ValueError("expected the number of the step with attention_state, got none")
        return tuple(states)

    def _run(self, x, t, label, caption, methods, scan: bool, remat: bool, states, step):
        config = self.config
        self._check(x, t, label, caption)
        grid = config.grid_of(x.shape[1:4])
        condition = self._condition(t, label, caption)
        angles = rope_angles(grid, config.head_dim, config.rope_theta)
        shared = einops.rearrange(self.modulation(condition), "z (six d) -> z six d", six=6)
        x, t = x.astype(jnp.float32), t.astype(jnp.float32)
        video, velocity, gain = wiener(x, t, config.spectrum)
        # the network sees what is there and what linear statistics make of it, both near unit scale
        scale = jax.lax.rsqrt(t**2 + ((1 - t) * _VIDEO_STD) ** 2)[:, None, None, None, None]
        both = jnp.concatenate([scale * x, video / _VIDEO_STD], axis=-1)
        h = self.embed(patchify(both, config.patch)) + self.place(place_features(grid))
        of_all = shared, angles, grid, step
        h, states = _layers(self.blocks, methods, states, h, of_all, scan, remat)
        shift, scale = jnp.split(self.final_modulation(condition)[:, None], 2, axis=-1)
        out = unpatchify(self.unembed(layer_norm(h) * (1 + scale) + shift), config.patch, grid)
        return velocity + from_modes(gain * to_modes(out)), states

    def _condition(self, t, label, caption) -> Float[Array, "batch dim"]:
        condition = self.time_out(jax.nn.silu(self.time_in(time_features(t)))) + self.label(label)
        if caption is not None:
            condition = condition + self.caption(caption)
        return jax.nn.silu(condition)

    def methods(
        self, attention: AttentionMethod | Sequence[AttentionMethod] | None = None
    ) -> tuple[AttentionMethod, ...]:
        """Returns the attention method of each layer, given what a call overrides."""
        depth = self.config.depth
        attention = self.attention if attention is None else attention
        if not isinstance(attention, Sequence):
            return (attention,) * depth
        if len(attention) != depth:
            raise ValueError(
                f"expected one attention method for each of {depth} layers, got {len(attention)}"
            )
        return tuple(attention)

    def _check(self, x, t, label, caption) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[-1] != 3:
            raise ValueError(f"expected x [batch, frames, height, width, 3], got {x.shape}")
        if t.shape != x.shape[:1] or label.shape != x.shape[:1]:
            raise ValueError(
                f"expected t and label of shape {x.shape[:1]}, got {t.shape} and {label.shape}"
            )
        if caption is not None and caption.shape != (x.shape[0], config.caption_dim):
            raise ValueError(
                f"expected caption of shape {(x.shape[0], config.caption_dim)}, got {caption.shape}"
            )
        if caption is not None and not config.caption_dim:
            raise ValueError("expected no caption (caption_dim is 0), got one")


def _layers(blocks, methods, states, h, of_all, scan: bool, remat: bool):
    """Runs the blocks one after the other, unrolled or as one scan; the same result either way.

    Returns the residual stream and the attention's states.
    """
    shared, angles, grid, step = of_all

    def run(graph, method, params, h, state):
        def block(params, h, state):
            return nnx.merge(graph, params)(h, shared, angles, method, grid, state, step)

        return (jax.checkpoint(block) if remat else block)(params, h, state)

    graphs, params = zip(*(nnx.split(block) for block in blocks), strict=True)
    if not scan:
        after = []
        for graph, method, own, state in zip(graphs, methods, params, states, strict=True):
            h, state = run(graph, method, own, h, state)
            after.append(state)
        return h, tuple(after)
    if len(set(methods)) > 1:
        raise ValueError(f"expected the same attention in all scanned layers, got {set(methods)}")
    # parameters are stored layer by layer and stacked here, so that one checkpoint serves both
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(params, states, strict=True))
    h, after = jax.lax.scan(lambda h, of: run(graphs[0], methods[0], of[0], h, of[1]), h, stacked)
    return h, tuple(jax.tree.map(lambda leaf, n=n: leaf[n], after) for n in range(len(blocks)))


def patchify(
    x: Float[Array, "batch frames height width channels"], patch: tuple[int, int, int]
) -> Float[Array, "batch seq patch_dim"]:
    """Cuts videos into tokens, frame slowest and width fastest."""
    pt, ph, pw = patch
    return einops.rearrange(
        x, "z (t pt) (h ph) (w pw) c -> z (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw
    )


def unpatchify(
    tokens: Float[Array, "batch seq patch_dim"], patch: tuple[int, int, int], grid: vm.VideoGrid
) -> Float[Array, "batch frames height width channels"]:
    """Puts tokens back into videos: the inverse of `patchify`."""
    pt, ph, pw = patch
    return einops.rearrange(
        tokens,
        "z (t h w) (pt ph pw c) -> z (t pt) (h ph) (w pw) c",
        t=grid.frames,
        h=grid.height,
        w=grid.width,
        pt=pt,
        ph=ph,
        pw=pw,
    )


def capture_qkv(
    model: VideoDiT,
    x: Float[Array, "batch frames height width channels"],
    t: Float[Array, " batch"],
    label: Int[Array, " batch"],
    caption: Float[Array, "batch caption_dim"] | None = None,
) -> list[tuple[Array, Array, Array]]:
    """Returns each layer's `(q, k, v)`, after QK-norm and RoPE, `[batch, seq, heads, head_dim]`.

    The forward pass itself runs under the model's own attention, unrolled and without remat, so
    this works under `jit` whatever the configuration says.
    """
    seen = []

    def recorder(method):
        def call(q, k, v, *, grid):
            seen.append((q, k, v))
            return method(q, k, v, grid=grid)

        return call

    methods = [recorder(method) for method in model.methods()]
    states = (None,) * len(methods)
    model._run(x, t, label, caption, methods, scan=False, remat=False, states=states, step=None)
    return seen
