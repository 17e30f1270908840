"""Dense attention: exact, quadratic in time, linear in memory."""

import functools
from typing import Any

from jaxtyping import Array, Bool, Float

from . import checks
from .dispatch import Backend, Implementation, dispatch
from .heads import by_heads, dense_part
from .parts import Part


def dense_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads value_dim"],
    *,
    scale: float | None = None,
    key_mask: Bool[Array, "batch keys"] | None = None,
    implementation: Implementation = None,
    return_lse: bool = False,
    block_sizes: Any = None,
) -> Float[Array, "batch seq heads value_dim"] | Part:
    """Softmax attention of every query on every key.

        out[n] = sum_s softmax_s(scale q[n] . k[s]) v[s] ;  lse[n] = logsumexp_s(scale q[n] . k[s])

    Args:
        query: `[batch, seq, heads, head_dim]`, any floating dtype; scores and sums are float32.
        key: `[batch, keys, heads, head_dim]`; `keys` may differ from `seq`.
        value: `[batch, keys, heads, value_dim]`.
        scale: of the logits; `None`: `head_dim**-0.5`.
        key_mask: `[batch, keys]`, True where a key is attended to. A row without any key gives
            zeros and `lse = -inf`.
        implementation: "reference", "xla", a sequence of names, or `None` for the best that
            works here.
        return_lse: also return the log-sum-exp.
        block_sizes: a `vm.BlockSizes`; changes the speed only.

    Returns:
        `out`, `[batch, seq, heads, value_dim]` in the dtype of the inputs, or the part
        `(out, lse)` with `lse` `[batch, seq, heads]` in float32.

    Raises:
        ValueError: if shapes, dtypes or options are wrong.
        NotImplementedError: if no named implementation can do the call.

    Example:
        >>> out, lse = vm.dense_attention(query, key, value, return_lse=True)
    """
    query, key, value = checks.attention_inputs(query, key, value, same_length=False)
    key_mask = checks.mask_of("key_mask", key_mask, key.shape[0], key.shape[1])
    scale = checks.scale_of(scale, query.shape[-1])
    block_sizes = checks.block_sizes_of(block_sizes)

    def part(backend: Backend) -> Part:
        heads = functools.partial(dense_part, scale=scale, block_sizes=block_sizes)
        scores = query.shape[1] * key.shape[1]
        on = {"backend": backend, "block_sizes": block_sizes}
        return by_heads(heads, (query, key, value), key_mask, scores=scores, **on)

    out, lse = dispatch(implementation, part)
    return Part(out, lse) if return_lse else out
