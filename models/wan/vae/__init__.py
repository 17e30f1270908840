"""The causal 3-D autoencoders of Wan2.1 and Wan2.2: video to latents and back."""

from .autoencoder import WanVAE

__all__ = ["WanVAE"]
