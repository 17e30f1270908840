"""Video diffusion transformers that use the attention methods."""
