"""Bytes on one device of each part's weights and of what its work takes beside them."""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp

import vmonarch_jax as vm

from ..config import TransformerConfig, WanConfig
from ..keys_transformer import transformer_entries
from ..keys_vae import vae_entries
from ..request import Request
from ..sharding import Sharding
from ..vae.decoder import up_widths
from ..vae.layers import FRAMES_AT_A_TIME
from ..weights.configs import FIELDS
from ..weights.entry import Entry
from ..weights.parts import PARTS, matches, part_entries


def weight_bytes(config: WanConfig, part: str, placement: Sharding | None = None) -> int:
    """Bytes of a part's parameters as the pipeline loads them, on one device.

    Args:
      config: the model.
      part: of it.
      placement: where parameters lie on a mesh; `None`: all on one device.

    Raises:
      ValueError: an axis of a parameter does not divide.
    """
    dtype = jnp.float32 if part == "vae" else getattr(config, FIELDS[part]).compute_dtype
    entries = part_entries(config, part)
    where = {} if placement is None else placement.param_shardings(entries)

    def held(entry: Entry) -> int:
        shape = entry.full_shape
        shape = where[entry.name].shard_shape(shape) if where else shape
        float32 = matches(entry.diffusers, PARTS[part].float32)
        return math.prod(shape) * (4 if float32 else jnp.dtype(dtype).itemsize)

    return sum(map(held, entries))


def step_bytes(
    config: TransformerConfig,
    grid: vm.VideoGrid,
    batch: int,
    placement: Sharding | None = None,
    kind: str = "",
) -> int:
    """Bytes of what one call of the transformer holds at most, beside weights and memory.

    An estimate by the arrays that are alive where most are: in a layer's attention, in its MLP, or
    before the layers. Compilers reuse, fuse and copy, and may need more or less.

    Args:
      config: of the transformer.
      grid: of its tokens.
      batch: videos in the call.
      placement: on a mesh; `None`: on one device.
      kind: of the devices, as JAX names it, where it is known.
    """
    ways = functools.partial(_ways, placement)
    item = config.compute_dtype.itemsize
    videos = -(-batch // ways("batch"))
    tokens = -(-grid.tokens // ways("seq"))
    stream = videos * tokens * config.dim * item
    attention = stream + _attention_bytes(
        videos, grid.tokens, config.heads // (ways("heads") * ways("seq")), config.head_dim, item
    )
    # beside the residual stream: the hidden layer and what it is mapped to
    mlp = 2 * stream + videos * tokens * config.ffn_dim * item // ways("mlp")
    # kernels that lie split are put together where they are used, of attention one after another
    gathered = functools.partial(_gathered_bytes, config, item, placement)
    attention += gathered((".attn.out.kernel",))
    mlp += gathered((".mlp_in.kernel", ".mlp_out.kernel"))
    before = stream + gathered((".time.", ".text.", ".patch."))
    # cosine and sine of each token's angles, float32
    rope = 2 * tokens * config.head_dim * 4
    text = videos * config.text_length * (config.dim + config.text_dim) * item
    latents = 2 * videos * grid.tokens * math.prod(config.patch) * config.out_channels * 4
    relaid = _relaid_bytes(config, item, placement) if kind.lower().startswith("tpu7x") else 0
    return max(attention, mlp, before) + rope + text + latents + relaid


def _attention_bytes(videos: int, tokens: int, heads: int, head_dim: int, item: int) -> int:
    """Of what self-attention holds of its share of the heads, all tokens of them.

    Beside q, k, v it makes heads-major copies and linear blocks, five arrays of their size, of all
    heads at once or, where these are large, of a tenth of them at a time beside the output.
    """
    one = videos * tokens * heads * head_dim * item
    budget = vm.BlockSizes().bytes()
    if one <= budget:
        return 8 * one
    few = one // videos if one // videos <= budget else one // 10
    return 4 * one + 5 * few


def _gathered_bytes(
    config: TransformerConfig, item: int, placement: Sharding | None, names: tuple[str, ...]
) -> int:
    """Of kernels as they are used, of one layer, where they lie split; by parts of their names."""
    if placement is None or placement.ways("embed", "params") == 1:
        return 0
    total = 0
    for entry in transformer_entries(config):
        if len(entry.shape) > 1 and any(name in f".{entry.name}" for name in names):
            axes = entry.logical[1:] if entry.layers else entry.logical
            total += math.prod(entry.shape) // math.prod(map(placement.ways, axes)) * item
    return total


def _relaid_bytes(config: TransformerConfig, item: int, placement: Sharding | None) -> int:
    """Of the kernels, of all layers, that the compiler for 7x keeps in a second layout."""
    twice = ("mlp_in.kernel", "mlp_out.kernel", "attn.out.kernel", "cross.out.kernel")
    kernels = [e for e in transformer_entries(config) if e.name.endswith(twice)]
    where = {} if placement is None else placement.param_shardings(kernels)
    shapes = {e.name: e.full_shape for e in kernels}
    held = [where[n].shard_shape(shape) if where else shape for n, shape in shapes.items()]
    return sum(map(math.prod, held)) * item


def text_bytes(config: WanConfig) -> int:
    """Bytes of what encoding two texts takes beside the weights."""
    text, length = config.text, config.transformer.text_length
    # scores of all heads, and the two hidden arrays of the feed-forward part, in float32
    return 2 * 4 * length * (text.heads * length + 2 * text.ffn_dim + 4 * text.dim)


def vae_bytes(
    config: WanConfig, request: Request, decode: bool, placement: Sharding | None = None
) -> int:
    """Bytes of what the autoencoder takes for one video beside its weights, on one device.

    Args:
      config: the model.
      request: the video.
      decode: whether it is decoded; else encoded.
      placement: on a mesh, whose devices share in the pictures; `None`: on one device.
    """
    vae, (width, height) = config.vae, request.size
    time, *strides = vae.strides
    rows, columns = (
        -(-size // (stride * _ways(placement, name))) * stride
        for name, size, stride in zip(("rows", "columns"), (height, width), strides, strict=True)
    )
    # levels from the finest on: channels of its blocks, and those that come in
    if decode:
        levels = [(width, inputs) for inputs, width, _ in up_widths(vae)[::-1]]
    else:
        widths = [vae.dim * multiple for multiple in (1, *vae.multipliers)]
        levels = [(width, inputs) for inputs, width in itertools.pairwise(widths)]
    pixels, frames, largest, remembered = rows * columns // vae.patch**2, time, 0, 0
    for level, (width, inputs) in enumerate(levels):
        at_once = min(frames, FRAMES_AT_A_TIME) if frames == time else frames
        largest = max(largest, at_once * pixels * max(width, inputs))
        # two frames of the input of each convolution, of which a block has two
        convolutions = 2 * (vae.blocks + decode)
        remembered += 2 * pixels * (inputs + (convolutions - 1) * width)
        if level < len(vae.halve_time):
            pixels, frames = pixels // 4, frames // (2 if vae.halve_time[level] else 1)
    way = "decoder." if decode else "encoder."
    kernels = sum(
        math.prod(entry.full_shape) for entry in vae_entries(vae) if entry.name.startswith(way)
    )
    # as compiled: a convolution's input in two layouts, its output, what is added to it; the video;
    # all kernels once more, in bfloat16, as a TPU multiplies
    video = 3 * rows * columns * request.frames
    return 4 * (4 * largest + remembered + video) + 2 * kernels


def _ways(placement: Sharding | None, name: str, of: str = "activations") -> int:
    return 1 if placement is None else placement.ways(name, of)
