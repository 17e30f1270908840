"""Video diffusion transformers: models, data, training, sampling.

This face needs the core dependencies only; data, training and pictures live in submodules that
need the extra `video`.
"""

from .attention_schedule import AttentionSchedule
from .config import CONFIGS, VideoDiTConfig
from .dit import VideoDiT, capture_qkv, patchify, unpatchify
from .export import export_params, load_model, load_params
from .flow import FlowConfig, flow_loss, guide, interpolate, shift_time
from .labels import MOTIONS, PHOTOS
from .params import split_params
from .salad import add_branches, drop_branches, mean_gates
from .sampler import integrate, sample, time_steps

__all__ = [
    "CONFIGS",
    "MOTIONS",
    "PHOTOS",
    "AttentionSchedule",
    "FlowConfig",
    "VideoDiT",
    "VideoDiTConfig",
    "add_branches",
    "capture_qkv",
    "drop_branches",
    "export_params",
    "flow_loss",
    "guide",
    "integrate",
    "interpolate",
    "load_model",
    "load_params",
    "mean_gates",
    "patchify",
    "sample",
    "shift_time",
    "split_params",
    "time_steps",
    "unpatchify",
]
