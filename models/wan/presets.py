"""The published Wan models by name."""

from __future__ import annotations

import dataclasses

from .config import ImageConfig, TransformerConfig, VAEConfig, WanConfig

# Mean and deviation of each latent channel, as published with the autoencoder of Wan2.2.
_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

VAE_2_1 = VAEConfig()
VAE_2_2 = VAEConfig(
    dim=160,
    decoder_dim=256,
    latent_channels=48,
    patch=2,
    residual=True,
    mean=_MEAN_2_2,
    std=_STD_2_2,
)

_SMALL = TransformerConfig(dim=1536, heads=12, layers=30, ffn_dim=8960)
_MIDDLE = TransformerConfig(
    dim=3072, heads=24, layers=30, ffn_dim=14_336,
    in_channels=48, out_channels=48, per_token_time=True,
)  # fmt: skip
_LARGE = TransformerConfig(dim=5120, heads=40, layers=40, ffn_dim=13_824)
# Noise, a mask of which frames are given, and the given frames.
_LARGE_IMAGE = TransformerConfig(dim=5120, heads=40, layers=40, ffn_dim=13_824, in_channels=36)
_LARGE_IMAGE_CLIP = TransformerConfig(
    dim=5120, heads=40, layers=40, ffn_dim=13_824, in_channels=36, image_dim=1280
)
# The states of two images: 257 of each.
_LARGE_TWO_IMAGES = dataclasses.replace(_LARGE_IMAGE_CLIP, image_positions=514)

#: Every model that weights are published for, with the settings that its authors sample with.
MODELS = {
    config.name: config
    for config in (
        WanConfig("wan2.1-t2v-1.3B", _SMALL),
        WanConfig("wan2.1-t2v-14B", _LARGE, size=(1280, 720)),
        WanConfig(
            "wan2.1-i2v-14B-480P", _LARGE_IMAGE_CLIP, image=ImageConfig(), shift=3.0, steps=40,
        ),
        WanConfig(
            "wan2.1-i2v-14B-720P", _LARGE_IMAGE_CLIP, image=ImageConfig(), steps=40,
            size=(1280, 720),
        ),
        WanConfig(
            "wan2.1-flf2v-14B-720P", _LARGE_TWO_IMAGES, image=ImageConfig(), shift=16.0,
            size=(1280, 720),
        ),
        WanConfig(
            "wan2.2-t2v-A14B", _LARGE, boundary=0.875, guidance=4.0, guidance_low=3.0,
            shift=12.0, steps=40, size=(1280, 720),
        ),
        WanConfig(
            "wan2.2-i2v-A14B", _LARGE_IMAGE, boundary=0.9, guidance=3.5, steps=40, size=(1280, 720)
        ),
        WanConfig(
            "wan2.2-ti2v-5B", _MIDDLE, vae=VAE_2_2, first_frame=True, fps=24, frames=121,
            size=(1280, 704),
        ),
    )
}  # fmt: skip
