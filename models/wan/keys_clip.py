"""How the CLIP encoder's parameters are stored: by Transformers and in the original repository."""

from __future__ import annotations

import itertools
import math

from .config import ImageConfig
from .weights.entry import Entry

_PREFIX = "vision_model."


def _layer(diffusers: str, original: str) -> tuple[str, str]:
    return f"{_PREFIX}encoder.layers.{{}}.{diffusers}", f"visual.transformer.{{}}.{original}"


def clip_entries(config: ImageConfig) -> tuple[Entry, ...]:
    """Every parameter of `CLIPVision`, once.

    The original's keys are those of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`,
    where queries, keys and values are one tensor.
    """
    dim, hidden, patch, layers = config.dim, config.ffn_dim, config.patch, config.layers - 1
    heads = (config.heads, dim // config.heads)
    positions = (config.size // patch) ** 2 + 1

    def norm(name: str, diffusers: str, original: str, layers: int = 0) -> tuple[Entry, ...]:
        logical = ("layers", None) if layers else (None,)
        return tuple(
            Entry(
                f"{name}.{ours}", f"{diffusers}.{theirs}", f"{original}.{theirs}",
                (dim,), (dim,), layers=layers, logical=logical,
            )
            for ours, theirs in (("scale", "weight"), ("bias", "bias"))
        )  # fmt: skip

    def linear(name, diffusers, original, inputs, outputs, logical, piece=(0, 1)):
        """`inputs` and `outputs` are the axes that the kernel maps from and to."""
        into, out = math.prod(inputs), math.prod(outputs)
        ours, (theirs, first) = f"blocks.{name}", _layer(diffusers, original)
        return (
            Entry(
                f"{ours}.kernel", f"{theirs}.weight", f"{first}.weight",
                (*inputs, *outputs), (out, into), (1, 0), layers, ("layers", *logical), piece=piece,
            ),
            Entry(
                f"{ours}.bias", f"{theirs}.bias", f"{first}.bias", outputs, (out,), (),
                layers, ("layers", *logical[len(inputs) :]), piece=piece,
            ),
        )  # fmt: skip

    def projection(name: str, number: int) -> tuple[Entry, ...]:
        logical = ("embed", "heads", "head_dim")
        return linear(
            f"attn.{name}", f"self_attn.{name}_proj", "attn.to_qkv", (dim,), heads, logical,
            piece=(number, 3),
        )  # fmt: skip

    return (
        Entry(
            "patch", f"{_PREFIX}embeddings.patch_embedding.weight", "visual.patch_embedding.weight",
            (patch, patch, 3, dim), (dim, 3, patch, patch), (2, 3, 1, 0),
            logical=(None, None, None, "embed"),
        ),
        Entry(
            "class_token", f"{_PREFIX}embeddings.class_embedding", "visual.cls_embedding",
            (dim,), (dim,), logical=("embed",), original_stored=(1, 1, dim),
        ),
        Entry(
            "positions", f"{_PREFIX}embeddings.position_embedding.weight", "visual.pos_embedding",
            (positions, dim), (positions, dim), logical=(None, "embed"),
            original_stored=(1, positions, dim),
        ),
        *norm("norm", f"{_PREFIX}pre_layrnorm", "visual.pre_norm"),
        *norm("blocks.norm1", *_layer("layer_norm1", "norm1"), layers),
        *projection("q", 0),
        *projection("k", 1),
        *projection("v", 2),
        *linear(
            "attn.out", "self_attn.out_proj", "attn.proj", heads, (dim,),
            ("heads", "head_dim", "embed"),
        ),
        *norm("blocks.norm2", *_layer("layer_norm2", "norm2"), layers),
        *linear("fc1", "mlp.fc1", "mlp.0", (dim,), (hidden,), ("embed", "mlp")),
        *linear("fc2", "mlp.fc2", "mlp.2", (hidden,), (dim,), ("mlp", "embed")),
    )  # fmt: skip


def clip_aliases(config: ImageConfig) -> dict[str, str]:
    """Other keys of the same tensors, by the key in the table.

    Transformers 5 writes them without `vision_model.`.
    """
    keys = itertools.chain(*(entry.keys("diffusers") for entry in clip_entries(config)))
    return {key: key.removeprefix(_PREFIX) for key in keys}


def clip_ignored(config: ImageConfig) -> tuple[str, ...]:
    """Patterns of keys whose tensors `CLIPVision` does not use.

    They are the last block's, what comes after it, and the original file's text encoder.
    """
    last = config.layers - 1
    theirs = (f"encoder.layers.{last}.*", "post_layernorm.*", "embeddings.position_ids")
    original = (f"transformer.{last}.*", "post_norm.*", "head")
    return (
        *theirs,
        *(_PREFIX + key for key in theirs),
        "visual_projection.weight",
        *("visual." + key for key in original),
        "textual.*",
        "log_scale",
    )
