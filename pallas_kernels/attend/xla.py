"""`attend` on any device: the scores of a chunk of rows or groups at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..chunks import map_chunks
from ..numerics import MASKED, accumulator, precision


def attend(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    values: tuple[Float[Array, "g s _"], ...],
    *,
    scale: float,
    bias: Float[Array, "g s"] | None = None,
    mask: Bool[Array, "g s"] | None = None,
    gains: tuple[float, ...] | None = None,
    block_sizes: BlockSizes,
) -> tuple[tuple[Float[Array, "g n _"], ...], Float[Array, "g n"]]:
    """`(outs, lse)` with at most `block_sizes.scores()` scores alive at once.

    Differentiable by JAX itself in both modes; the backward pass computes each chunk's scores
    again.
    """
    budget = block_sizes.scores()
    rows, keys = q.shape[1], k.shape[1]
    chunk = functools.partial(_attend_chunk, scale=scale, gains=gains or (1.0,) * len(values))
    if rows * keys <= budget or rows == 1:
        return map_chunks(chunk, budget // (rows * keys), q, k, values, bias, mask)

    def one_group(group: Any) -> Any:
        q, *fixed = group
        fixed = jax.tree.map(lambda x: x[None], tuple(fixed))
        return map_chunks(some_rows, budget // keys, q, shared=fixed)

    def some_rows(fixed: Any, q: Any) -> Any:
        return jax.tree.map(lambda x: x[0], chunk((), q[None], *fixed))

    arrays = (q, k, values, bias, mask)
    if q.shape[0] == 1:
        out = one_group(jax.tree.map(lambda x: x[0], arrays))
        return jax.tree.map(lambda x: x[None], out)
    return jax.lax.map(one_group, arrays)


def _attend_chunk(shared, q, k, values, bias, mask, *, scale, gains):
    del shared
    wide, exact = accumulator(q.dtype), precision(q.dtype)
    dot = functools.partial(jnp.einsum, precision=exact, preferred_element_type=wide)
    x = scale * dot("gnd,gsd->gns", q, k)
    if bias is not None:
        x = x + bias[:, None, :]
    if mask is not None:
        x = jnp.where(mask[:, None, :], x, MASKED)
    # The shift cancels from the result, so its gradient is zero and needs no computing.
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    p = jnp.exp(x - top)
    if mask is None:
        total = p.sum(-1)
        lse = top[..., 0] + jnp.log(total)
    else:
        p = jnp.where(mask[:, None, :], p, 0)
        some = mask.any(-1)[:, None]
        total = jnp.where(some, p.sum(-1), 1)
        lse = jnp.where(some, top[..., 0] + jnp.log(total), -jnp.inf)
    outs = tuple(
        dot("gns,gse->gne", p.astype(v.dtype), v) * (gain / total[..., None])
        for gain, v in zip(gains, values, strict=True)
    )
    return outs, lse
