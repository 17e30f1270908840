"""What the GPU kernels share: when they can run, how they are launched, products and copies."""
