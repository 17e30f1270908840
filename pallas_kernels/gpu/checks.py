"""What the GPU kernels take."""

import jax.numpy as jnp
from jaxtyping import Array

from . import mode

# Largest head dim whose kernels were compiled and looked at.
WIDEST = 128


def check(*arrays: Array) -> None:
    """That every array has a dtype and a head dim that wgmma serves here.

    Raises:
        NotImplementedError: with the reason, also where there is no Hopper GPU.
    """
    if reason := mode.unavailable():
        raise NotImplementedError(reason)
    dtypes = {x.dtype for x in arrays}
    if len(dtypes) > 1 or arrays[0].dtype not in (jnp.bfloat16, jnp.float16):
        names = sorted(str(dtype) for dtype in dtypes)
        raise NotImplementedError(f"GPU kernels take bfloat16 or float16 throughout, got {names}")
    for x in arrays:
        if x.shape[-1] % 64 or x.shape[-1] > WIDEST:
            raise NotImplementedError(f"GPU kernels take head dims of 64 or 128, got {x.shape[-1]}")
        if 0 in x.shape:
            raise NotImplementedError("GPU kernels take no empty arrays")
