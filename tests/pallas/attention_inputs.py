"""Random arrays of attention, the float64 oracle's view of them, and exact gradients."""

import jax
import jax.numpy as jnp
import numpy as np


def arrays(shapes, dtype, seed=0):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def attention(q, k, values, *, scale, bias=None, mask=None, gains=None):
    """`(outs, lse)` in float64 NumPy, and no other code's formula."""
    q, k, *values = (np.asarray(x, np.float64) for x in (q, k, *values))
    x = scale * q @ np.swapaxes(k, -1, -2)
    if bias is not None:
        x = x + np.asarray(bias, np.float64)[:, None, :]
    if mask is not None:
        x = np.where(np.asarray(mask)[:, None, :], x, -np.inf)
    top = x.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(x - top)
    total = p.sum(-1, keepdims=True)
    some = total > 0
    p = np.where(some, p / np.where(some, total, 1), 0)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    gains = gains or (1.0,) * len(values)
    return [gain * p @ v for gain, v in zip(gains, values, strict=True)], lse


def oracle_gradient(function, arguments, cotangents):
    """The vector-Jacobian product of an oracle, at the rounded inputs but in float32."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    _, pullback = jax.vjp(function, *wide)
    return pullback(jax.tree.map(lambda x: x.astype(jnp.float32), cotangents))
