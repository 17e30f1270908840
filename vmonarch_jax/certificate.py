"""The certificate: how far an approximate row is from the dense one, exactly."""

from typing import Any

import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from . import checks
from .dense import dense_attention
from .dispatch import Implementation
from .grid import Shape3, VideoGrid

# Rounding of a log-sum-exp, in units of the inputs' precision times its size.
ROUNDING = 8


def attention_gap(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    lse: Float[Array, "batch seq heads"],
    *,
    grid: VideoGrid | Shape3 | None = None,
    scale: float | None = None,
    rows: Int[Array, " rows"] | None = None,
    key_mask: Bool[Array, "batch keys"] | None = None,
    implementation: Implementation = None,
    block_sizes: Any = None,
) -> Float[Array, "batch rows heads"]:
    """KL divergence of each approximate attention row from its dense row, in nats.

        KL(approximate row || dense row) = lse_dense - lse

    This is an identity, not an estimate: it holds for Monarch attention of any block, tile,
    steps and floor, and after merging. By Pinsker's inequality the total variation is at most
    `sqrt(KL / 2)`, so no entry of the output is further from the dense one than
    `2 sqrt(KL / 2) max|value|`.

    Args:
        query: `[batch, seq, heads, head_dim]`, as given to the attention.
        key: `[batch, keys, heads, head_dim]`.
        lse: `[batch, seq, heads]`, what the attention returned with `return_lse=True`.
        grid: where given, must have `seq` tokens.
        scale: of the logits; `None`: `head_dim**-0.5`.
        rows: token indices of the rows to check, each in `-seq..seq-1`; `None`: all. The cost
            is a dense pass over these rows.
        key_mask: `[batch, keys]`, True where the dense row attends to a key.
        implementation: as `vm.dense_attention`.
        block_sizes: a `vm.BlockSizes`; changes the speed only.

    Returns:
        `[batch, rows, heads]`, float32. What rounding puts below zero is set to zero; a value
        that stays negative is no KL: `lse` then belongs to another query, key, scale or mask.

    Raises:
        ValueError: if shapes, dtypes or options are wrong.

    Example:
        >>> out, lse = vm.vmonarch_attention(q, k, v, grid=grid, return_lse=True)
        >>> kl = vm.attention_gap(q, k, lse, grid=grid, rows=jnp.arange(0, grid.tokens, 97))
    """
    query, key, _ = checks.attention_inputs(query, key, key, same_length=grid is not None)
    if grid is not None:
        checks.grid_of(grid, query.shape[1])
    lse = jnp.asarray(lse)
    if lse.shape != query.shape[:3]:
        raise ValueError(f"`lse` must be [batch, seq, heads] = {query.shape[:3]}, got {lse.shape}")
    if rows is not None:
        rows = jnp.asarray(rows)
        if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
            raise ValueError(
                f"`rows` must be a 1-D array of token indices, got {rows.dtype} {rows.shape}"
            )
        seq = query.shape[1]
        # Under `jit` the indices have no values yet to look at.
        if not isinstance(rows, jax.core.Tracer) and rows.size:
            low, high = int(rows.min()), int(rows.max())
            if low < -seq or high >= seq:
                raise ValueError(f"`rows` must lie in {-seq}..{seq - 1}, got {low}..{high}")
        query, lse = query[:, rows], lse[:, rows]
    # One column of values, whose product is small: only the log-sum-exp is wanted.
    _, dense = dense_attention(
        query, key, key[..., :1],
        scale=scale, key_mask=key_mask, implementation=implementation, return_lse=True,
        block_sizes=block_sizes,
    )  # fmt: skip
    # A row without any key is right as it is: -inf - (-inf) would be NaN.
    gap = jnp.where(dense == lse, 0, dense - lse)
    rounding = ROUNDING * jnp.finfo(query.dtype).eps * jnp.maximum(jnp.abs(dense), 1)
    return jnp.where((gap < 0) & (gap > -rounding), 0, gap)
