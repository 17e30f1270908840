"""The oracle of `attend`: all scores at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..numerics import accumulator


def attend(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    values: tuple[Float[Array, "g s _"], ...],
    *,
    scale: float,
    bias: Float[Array, "g s"] | None = None,
    mask: Bool[Array, "g s"] | None = None,
    gains: tuple[float, ...] | None = None,
    block_sizes=None,
) -> tuple[tuple[Float[Array, "g n _"], ...], Float[Array, "g n"]]:
    """`(outs, lse)` by definition, in float32; a row without keys gives zeros and -inf."""
    del block_sizes
    wide = accumulator(q.dtype)
    highest = jax.lax.Precision.HIGHEST
    q, k = q.astype(wide), k.astype(wide)
    x = scale * jnp.einsum("gnd,gsd->gns", q, k, precision=highest)
    if bias is not None:
        x = x + bias[:, None, :]
    if mask is None:
        lse = jax.nn.logsumexp(x, axis=-1)
        p = jax.nn.softmax(x, axis=-1)
    else:
        some = mask.any(-1)[:, None]
        keep = mask[:, None, :] & some[..., None]
        lse = jax.nn.logsumexp(x, axis=-1, where=jnp.where(some[..., None], keep, True))
        lse = jnp.where(some, lse, -jnp.inf)
        p = jax.nn.softmax(x, axis=-1, where=jnp.where(some[..., None], keep, True))
        p = jnp.where(keep, p, 0)
    outs = tuple(
        gain * jnp.einsum("gns,gse->gne", p, v.astype(wide), precision=highest)
        for gain, v in zip(gains or (1.0,) * len(values), values, strict=True)
    )
    return outs, lse
