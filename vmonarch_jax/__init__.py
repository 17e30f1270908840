"""Structured attention for video diffusion transformers."""
