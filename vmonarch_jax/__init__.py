"""Structured attention for video diffusion transformers, in JAX."""

from typing import TYPE_CHECKING, Any

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes

from . import flops
from .adaspa import AdaSpa
from .adaspa_call import AdaSpaState
from .block_sparse import (
    Blocks,
    block_mass,
    block_sparse_attention,
    dense_attention_mass,
    top_blocks,
)
from .certificate import attention_gap
from .corrected import Corrected, CorrectedState
from .dense import dense_attention
from .dispatch import default_implementation
from .explain import Explanation, explain
from .grid import VideoGrid
from .guided import Guided, GuidedState
from .linear import linear_attention
from .memory import attend, init_state, remembers
from .methods import Attention, Dense, TiledMonarch, VMonarch
from .parts import Part, merge_attention
from .salad import Salad, SlidingWindow
from .sequence import monarch_attention
from .video import tiled_monarch_attention, vmonarch_attention

if TYPE_CHECKING:
    from . import nn

__version__ = "0.1.0"

__all__ = [
    "AdaSpa",
    "AdaSpaState",
    "Attention",
    "BlockSizes",
    "Blocks",
    "Corrected",
    "CorrectedState",
    "Dense",
    "Explanation",
    "Guided",
    "GuidedState",
    "Part",
    "Salad",
    "SlidingWindow",
    "TiledMonarch",
    "VMonarch",
    "VideoGrid",
    "attend",
    "attention_gap",
    "block_mass",
    "block_sparse_attention",
    "default_implementation",
    "dense_attention",
    "dense_attention_mass",
    "explain",
    "flops",
    "init_state",
    "linear_attention",
    "merge_attention",
    "monarch_attention",
    "nn",
    "remembers",
    "tiled_monarch_attention",
    "top_blocks",
    "vmonarch_attention",
]


def __getattr__(name: str) -> Any:
    """Import `vmonarch_jax.nn`, and Flax with it, only when somebody asks for it."""
    if name == "nn":
        import importlib

        return importlib.import_module(".nn", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
