"""What the TPU kernels share: the chips, how a kernel is launched, and the table of block sizes."""
