"""Flax NNX modules around the attention methods; `nnx.bridge.to_linen` makes Linen ones of them."""

from .attention import VideoSelfAttention
from .salad import SaladAttention

__all__ = ["SaladAttention", "VideoSelfAttention"]
