"""Wan2.1 and Wan2.2 video diffusion models in NNX, under any attention method."""
