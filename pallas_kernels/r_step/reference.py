"""The oracle of the R step: all scores at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..numerics import accumulator
from .step import RStep


def r_step(
    qt: Float[Array, "g M n d"],
    k: Float[Array, "g M b d"],
    values: tuple[Float[Array, "g M b _"], ...],
    *,
    scale: float,
    keys: Bool[Array, "g M b"] | None = None,
    entropy_gradient: bool = False,
    block_sizes=None,
) -> RStep:
    """By definition, in float32; `entropy_gradient` says whether `cL` has a gradient."""
    del block_sizes
    wide = accumulator(qt.dtype)
    highest = jax.lax.Precision.HIGHEST
    x = scale * jnp.einsum("gkjd,gkid->gkji", qt.astype(wide), k.astype(wide), precision=highest)
    some = jnp.full((*x.shape[:2], 1), True) if keys is None else keys.any(-1, keepdims=True)
    keep = jnp.full((1, 1, 1, 1), True) if keys is None else keys[..., None, :]
    safe = keep | ~some[..., None]
    lse = jnp.where(some, jax.nn.logsumexp(x, axis=-1, where=safe), -jnp.inf)
    r = jnp.where(keep & some[..., None], jax.nn.softmax(x, axis=-1, where=safe), 0)
    al = scale * jnp.einsum("gkji,gkid->gkjd", r, k.astype(wide), precision=highest)
    al = al.astype(k.dtype)
    ys = tuple(
        jnp.einsum("gkji,gkie->gkje", r, v.astype(wide), precision=highest).astype(v.dtype)
        for v in values
    )
    cl = jnp.einsum("gkjd,gkjd->gkj", qt.astype(wide), al.astype(wide), precision=highest) - lse
    cl = jnp.where(some, cl, 0)
    return RStep(al, ys, cl if entropy_gradient else jax.lax.stop_gradient(cl), lse)
