"""The parts of a Wan model: the module of each, its table of keys, and what files hold besides."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ..clip import CLIPVision
from ..config import WanConfig
from ..keys_clip import clip_aliases, clip_entries, clip_ignored
from ..keys_text import text_aliases, text_entries
from ..keys_transformer import transformer_entries
from ..keys_vae import vae_entries
from ..transformer import WanTransformer
from ..umt5 import UMT5Encoder
from ..vae import WanVAE
from .configs import FIELDS
from .entry import Entry


@dataclasses.dataclass(frozen=True)
class Part:
    """How one part is built and stored.

    Attributes:
      build: makes the module from its sizes; called abstractly.
      entries: its table of parameters, from its sizes.
      ignored: patterns of keys that files may hold and that nothing here reads, likewise.
      aliases: other keys of the same tensors by the key in the table, likewise.
      float32: patterns of Diffusers' keys that stay float32 whatever is asked for, as there.
    """

    build: Callable[[Any], nnx.Module]
    entries: Callable[[Any], tuple[Entry, ...]]
    ignored: Callable[[Any], tuple[str, ...]] = lambda sizes: ()
    aliases: Callable[[Any], Mapping[str, str]] = lambda sizes: {}
    float32: tuple[str, ...] = ()


_TRANSFORMER = Part(
    lambda sizes: WanTransformer(sizes, rngs=nnx.Rngs(0)),
    transformer_entries,
    # A norm of queries to the image that some exports hold and that no forward pass uses.
    ignored=lambda sizes: ("blocks.*.attn2.norm_added_q.weight",),
    float32=(
        "*time_embedder*",
        "*scale_shift_table*",
        "*norm1*",
        "*norm2*",
        "*norm3*",
        "*linear_branch.gate*",
    ),
)

#: Every part by the name that it has in `Found.parts`.
PARTS = {
    "transformer": _TRANSFORMER,
    "transformer_2": _TRANSFORMER,
    "vae": Part(lambda sizes: WanVAE(sizes, rngs=nnx.Rngs(0)), vae_entries),
    "text_encoder": Part(
        lambda sizes: UMT5Encoder(sizes, rngs=nnx.Rngs(0)), text_entries, aliases=text_aliases
    ),
    "image_encoder": Part(
        lambda sizes: CLIPVision(sizes, rngs=nnx.Rngs(0)), clip_entries, clip_ignored, clip_aliases
    ),
}


def sizes_of(config: WanConfig, part: str) -> Any:
    """The sizes of one part.

    Raises:
      ValueError: there is no such part, or not in this model.
    """
    if part not in PARTS:
        raise ValueError(f"expected a part of {sorted(PARTS)}, got {part!r}")
    sizes = getattr(config, FIELDS[part])
    if sizes is None:
        raise ValueError(f"expected a model with a part {part}, got {config.name}")
    return sizes


def part_entries(config: WanConfig, part: str) -> tuple[Entry, ...]:
    """The table of one part's parameters."""
    sizes = sizes_of(config, part)
    return PARTS[part].entries(sizes)


def abstract_part(config: WanConfig, part: str) -> nnx.Module:
    """One part whose parameters are shapes; `split_params(model)[0](params)` fills it."""
    sizes = sizes_of(config, part)
    return nnx.eval_shape(lambda: PARTS[part].build(sizes))


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Whether a key is of any of the patterns."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
