"""How the Wan transformer's parameters are stored, in Diffusers and in the original repository."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .config import TransformerConfig
from .weights.entry import Entry

# Attribute here, in Diffusers and in the original repository.
_ATTENTIONS = (("attn", "attn1", "self_attn"), ("cross", "attn2", "cross_attn"))
_PROJECTIONS = (("q", "to_q", "q"), ("k", "to_k", "k"), ("v", "to_v", "v"))
_NORMS = (("q_norm", "norm_q", "norm_q"), ("k_norm", "norm_k", "norm_k"))
_IMAGE_PROJECTIONS = (("image_k", "add_k_proj", "k_img"), ("image_v", "add_v_proj", "v_img"))
_IMAGE_NORMS = (("image_k_norm", "norm_added_k", "norm_k_img"),)


def transformer_entries(config: TransformerConfig) -> tuple[Entry, ...]:
    """Every parameter of `WanTransformer(config)`, once.

    Example:
      {entry.name: entry.full_shape for entry in transformer_entries(config)}

    Source: the keys of `WanTransformer3DModel` in Diffusers and of `WanModel` in Wan2.1.
    """
    image = _image(config) if config.image_dim else ()
    linear = _linear_branches(config) if config.linear_layers else ()
    blocks = (*_attentions(config), *linear, *_block(config))
    return (*_embeddings(config), *image, *blocks, *_head(config))


def _embeddings(config: TransformerConfig) -> Iterator[Entry]:
    dim, channels = config.dim, config.in_channels
    yield Entry(
        "patch.kernel", "patch_embedding.weight", "patch_embedding.weight",
        shape=(*config.patch, channels, dim), stored=(dim, channels, *config.patch),
        axes=(2, 3, 4, 1, 0), logical=(None, None, None, None, "embed"),
    )  # fmt: skip
    yield _vector("patch.bias", "patch_embedding.bias", "patch_embedding.bias", (dim,), ("embed",))
    time, text = "condition_embedder.time_embedder", "condition_embedder.text_embedder"
    first, second = (None, "embed"), ("embed", None)
    inner = (config.freq_dim, dim)
    yield from _linear("time.inner", f"{time}.linear_1", "time_embedding.0", inner, first)
    yield from _linear("time.outer", f"{time}.linear_2", "time_embedding.2", (dim, dim), second)
    yield from _linear(
        "time.modulation", "condition_embedder.time_proj", "time_projection.1",
        (dim, 6, dim), ("embed", None, None),
    )  # fmt: skip
    inner = (config.text_dim, dim)
    yield from _linear("text.inner", f"{text}.linear_1", "text_embedding.0", inner, first)
    yield from _linear("text.outer", f"{text}.linear_2", "text_embedding.2", (dim, dim), second)


def _image(config: TransformerConfig) -> Iterator[Entry]:
    dim, width, theirs = config.dim, config.image_dim or 0, "condition_embedder.image_embedder"
    none, embed = (None,), ("embed",)
    yield from _norm("image.norm_in", f"{theirs}.norm1", "img_emb.proj.0", width, none)
    yield from _linear(
        "image.inner", f"{theirs}.ff.net.0.proj", "img_emb.proj.1", (width, width), (None, None)
    )
    yield from _linear(
        "image.outer", f"{theirs}.ff.net.2", "img_emb.proj.3", (width, dim), (None, "embed")
    )
    yield from _norm("image.norm_out", f"{theirs}.norm2", "img_emb.proj.4", dim, embed)
    if config.image_positions:
        shape = (config.image_positions, width)
        yield Entry(
            "image.positions", f"{theirs}.pos_embed", "img_emb.emb_pos",
            shape=shape, stored=(1, *shape), logical=(None, None),
        )  # fmt: skip


def _attentions(config: TransformerConfig) -> Iterator[Entry]:
    dim, split, n = config.dim, (config.heads, config.head_dim), config.layers
    for ours, diffusers, original in _ATTENTIONS:
        image = ours == "cross" and config.image_dim
        for name, key, old in (*_PROJECTIONS, *(_IMAGE_PROJECTIONS if image else ())):
            yield from _linear(
                f"blocks.{ours}.{name}", f"blocks.{{}}.{diffusers}.{key}",
                f"blocks.{{}}.{original}.{old}",
                (dim, *split), ("embed", "heads", "head_dim"), n,
            )  # fmt: skip
        for name, key, old in (*_NORMS, *(_IMAGE_NORMS if image else ())):
            yield _vector(
                f"blocks.{ours}.{name}.scale", f"blocks.{{}}.{diffusers}.{key}.weight",
                f"blocks.{{}}.{original}.{old}.weight", split, ("heads", "head_dim"), n,
            )  # fmt: skip
        yield from _linear(
            f"blocks.{ours}.out", f"blocks.{{}}.{diffusers}.to_out.0", f"blocks.{{}}.{original}.o",
            (*split, dim), ("heads", "head_dim", "embed"), n, inputs=2,
        )  # fmt: skip


def _linear_branches(config: TransformerConfig) -> Iterator[Entry]:
    """SALAD's branches, of all layers; published weights have none, so the keys are our own."""
    dim, split, n = config.dim, (config.heads, config.head_dim), config.layers
    diffusers, original = (f"blocks.{{}}.{own}.linear_branch" for own in ("attn1", "self_attn"))
    yield Entry(
        "blocks.attn.linear.kernel", f"{diffusers}.weight", f"{original}.weight",
        shape=(*split, dim), stored=(dim, dim), axes=(1, 0), layers=n,
        logical=("layers", "heads", "head_dim", "embed"),
    )  # fmt: skip
    yield from _linear(
        "blocks.attn.linear.gate", f"{diffusers}.gate", f"{original}.gate",
        (dim, 1), ("embed", None), n,
    )  # fmt: skip


def _block(config: TransformerConfig) -> Iterator[Entry]:
    dim, hidden, n = config.dim, config.ffn_dim, config.layers
    # Diffusers numbers a block's norms as they run; the original gives cross-attention's the 3.
    yield from _norm("blocks.cross_norm", "blocks.{}.norm2", "blocks.{}.norm3", dim, ("embed",), n)
    yield from _linear(
        "blocks.mlp_in", "blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0",
        (dim, hidden), ("embed", "mlp"), n,
    )  # fmt: skip
    yield from _linear(
        "blocks.mlp_out", "blocks.{}.ffn.net.2", "blocks.{}.ffn.2",
        (hidden, dim), ("mlp", "embed"), n,
    )  # fmt: skip
    yield Entry(
        "blocks.modulation", "blocks.{}.scale_shift_table", "blocks.{}.modulation",
        shape=(6, dim), stored=(1, 6, dim), layers=n, logical=("layers", None, "embed"),
    )  # fmt: skip


def _head(config: TransformerConfig) -> Iterator[Entry]:
    dim, channels = config.dim, math.prod(config.patch) * config.out_channels
    yield Entry(
        "modulation", "scale_shift_table", "head.modulation",
        shape=(2, dim), stored=(1, 2, dim), logical=(None, "embed"),
    )  # fmt: skip
    yield from _linear("out", "proj_out", "head.head", (dim, channels), ("embed", None))


def _linear(
    name: str,
    diffusers: str,
    original: str,
    shape: tuple[int, ...],
    logical: tuple[str | None, ...],
    layers: int = 0,
    inputs: int = 1,
) -> Iterator[Entry]:
    """Kernel and bias; the first `inputs` axes of ours are the stored kernel's second."""
    rows, columns = math.prod(shape[inputs:]), math.prod(shape[:inputs])
    yield Entry(
        f"{name}.kernel", f"{diffusers}.weight", f"{original}.weight",
        shape=shape, stored=(rows, columns), axes=(1, 0), layers=layers,
        logical=(*_stack(layers), *logical),
    )  # fmt: skip
    bias = f"{name}.bias", f"{diffusers}.bias", f"{original}.bias"
    yield _vector(*bias, shape[inputs:], logical[inputs:], layers)


def _norm(
    name: str,
    diffusers: str,
    original: str,
    width: int,
    logical: tuple[str | None, ...],
    layers: int = 0,
) -> Iterator[Entry]:
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        keys = f"{name}.{ours}", f"{diffusers}.{theirs}", f"{original}.{theirs}"
        yield _vector(*keys, (width,), logical, layers)


def _vector(
    name: str,
    diffusers: str,
    original: str,
    shape: tuple[int, ...],
    logical: tuple[str | None, ...],
    layers: int = 0,
) -> Entry:
    """What is stored as one axis."""
    return Entry(
        name, diffusers, original, shape=shape, stored=(math.prod(shape),), layers=layers,
        logical=(*_stack(layers), *logical),
    )  # fmt: skip


def _stack(layers: int) -> tuple[str, ...]:
    return ("layers",) if layers else ()
