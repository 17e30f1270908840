"""Constants and dtypes that every kernel and oracle agrees on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

# A masked score: finite, so that a row with every key masked yields no inf - inf, and far
# below any real score.
MASKED = -1e30

# Least attention that a key block's mean query is divided by when no floor is asked for:
# a block that underflows to nothing keeps a mean query of zero instead of 0/0.
TINY_MASS = 1e-12


def accumulator(dtype) -> jnp.dtype:
    """float32, or float64 for float64 inputs: the dtype of scores, sums and log-sum-exps."""
    return jnp.promote_types(dtype, jnp.float32)


def precision(dtype) -> jax.lax.Precision:
    """float32 inputs mean float32 products, also where the default is bfloat16 or tf32."""
    if jnp.dtype(dtype).itemsize >= 4:
        return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT


def scaled(x: Array, gain: float) -> Array:
    """`gain x`, rounded once."""
    return x if gain == 1 else (x.astype(accumulator(x.dtype)) * gain).astype(x.dtype)
