"""Parts, `(out, lse)`, and the one operation that merges them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Part(NamedTuple):
    """Attention over some set of keys: its output and the log of its softmax's denominator."""

    out: Float[Array, "*rows d"]
    lse: Float[Array, "*rows"]


def merge_attention(
    parts: Iterable[tuple[Float[Array, "batch seq heads d"], Float[Array, "batch seq heads"]]],
) -> Part:
    """Attention over the union of disjoint key sets, from the attention over each.

        lse = logaddexp(lse1, lse2)
        out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2

    Exact where the parts are exact, associative and commutative up to rounding. The certificate
    holds for the merged part as for each of them.

    Args:
        parts: `(out, lse)` pairs over disjoint sets of keys and the same rows: `out`
            `[batch, seq, heads, head_dim]`, `lse` `[batch, seq, heads]`, as every attention here
            returns with `return_lse=True`. A row without any key has `lse = -inf`.

    Returns:
        `(out, lse)`; `out` in the dtype of the first part, `lse` in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: if there is no part, or the shapes do not match.

    Example:
        >>> first = vm.dense_attention(q, k[:, :8], v[:, :8], return_lse=True)
        >>> rest = vm.dense_attention(q, k[:, 8:], v[:, 8:], return_lse=True)
        >>> out, lse = vm.merge_attention([first, rest])
    """
    parts = [Part(jnp.asarray(out), jnp.asarray(lse)) for out, lse in parts]
    if not parts:
        raise ValueError("`parts` must hold at least one (out, lse) pair, got none")
    expected = parts[0].out.shape
    for index, (out, lse) in enumerate(parts):
        if out.shape != expected or lse.shape != expected[:-1]:
            raise ValueError(
                f"every part must have out of shape {expected} and lse of shape {expected[:-1]}, "
                f"got {out.shape} and {lse.shape} in part {index}"
            )
    top = jnp.max(jnp.stack([lse for _, lse in parts]), axis=0)
    # A row that no part has a key for: any finite shift serves, its weights are all zero.
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = sum(weights[1:], weights[0])
    safe = jnp.where(total > 0, total, 1)
    out = sum(
        (w / safe)[..., None] * out.astype(w.dtype)
        for w, (out, _) in zip(weights, parts, strict=True)
    )
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    lse = jnp.where(jnp.isnan(total), total, lse)
    return Part(jnp.asarray(out).astype(parts[0].out.dtype), lse)


def with_rows(
    part: tuple[Float[Array, "z h n d"], Float[Array, "z h n"]],
    rows: Any,
    exact: tuple[Float[Array, "z h r d"], Float[Array, "z h r"]],
) -> Part:
    """`part` with those of `exact` in place of the rows numbered `rows`, heads-major."""
    # Without the barrier XLA for GPUs (JAX 0.11) joins a kernel with the update of its results into
    # one operation, which it then fails to compile.
    part = jax.lax.optimization_barrier(part)
    return Part(*(x.at[:, :, rows].set(e) for x, e in zip(part, exact, strict=True)))
