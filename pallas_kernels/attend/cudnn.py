"""`attend` by cuDNN's flash attention: a call for each of the values, keys split for few rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..gpu import cudnn
from ..gpu.order import by_entry, from_entries
from ..numerics import scaled

Part = tuple[tuple[Float[Array, "g n _"], ...], Float[Array, "g n"]]

# Where a row of the output's gradient is too short to carry the gradient of its log-sum-exp, a
# row of this length, relative to that gradient, stands in for it. What it adds of its own is below
# rounding. float16 has no room for less, nor for the reciprocal.
SHORT, SHORT_FLOAT16 = 2.0**-30, 2.0**-10


def attend(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    values: tuple[Float[Array, "g s d"], ...],
    *,
    scale: float,
    bias: Float[Array, "g s"] | None = None,
    mask: Bool[Array, "g s"] | None = None,
    gains: tuple[float, ...] | None = None,
    known: Part | None = None,
    entries: int = 1,
    block_sizes: BlockSizes,
) -> Part:
    """`(outs, lse)`, outs in the dtype of the values, lse in float32.

        lse[g,n] = logsumexp_s (scale q . k) ;  out = gain * sum_s exp(x - lse) values

    `entries` says of how many entries of a batch the groups are the heads; it changes only where
    arrays lie.

    `known` is the result, where a caller kept it from an earlier forward pass: nothing is computed
    then, but the gradient is still that of the attention.

    Raises:
        NotImplementedError: for a bias, a mask, or what else cuDNN can't do: it takes a bias of
            all pairs of rows and keys only, which would be quadratic in memory.
    """
    del block_sizes
    if bias is not None or mask is not None:
        raise NotImplementedError("takes no bias or mask of single keys")
    values = tuple(values)
    groups = by_entry(q, entries)
    cudnn.check(groups, k, values)
    gains = tuple(map(float, gains or (1.0,) * len(values)))
    parts = cudnn.split_keys(q.shape[0], q.shape[1], k.shape[1])
    known = jax.lax.stop_gradient(known)
    return _attend(float(scale), gains, (parts, entries), q, k, values, known)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, gains, counts, q, k, values, known):
    if known is not None:
        return known
    parts, entries = counts
    q, k, values = jax.tree.map(lambda x: by_entry(x, entries), (q, k, values))
    # Without values the log-sum-exp alone is wanted; cuDNN has no call for that.
    found = [_one(q, k, v, scale, parts) for v in values or (k,)]
    outs = tuple(scaled(out, gain) for (out, _), gain in zip(found, gains, strict=False))
    return jax.tree.map(from_entries, (outs, found[0][1]))


def _one(q: Array, k: Array, v: Array, scale: float, parts: int) -> tuple[Array, Array]:
    """One call of `[x, y, n, d]`; parts of the keys are more entries, merged afterwards."""
    if parts == 1:
        return cudnn.forward(q, k, v, scale)
    (x, y, n, d), keys = q.shape, k.shape[2] // parts
    # Heads go behind the tokens first: cut in another order, the keys would be moved.
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    q = jnp.broadcast_to(q[:, None], (x, parts, *q.shape[1:])).reshape(-1, n, y, d)
    k, v = (array.reshape(-1, keys, y, d) for array in (k, v))
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    out, lse = cudnn.forward(q, k, v, scale)
    out, lse = out.reshape(x, parts, y, n, d), lse.reshape(x, parts, y, n)
    top = lse.max(1, keepdims=True)
    weights = jnp.exp(lse - top)
    total = weights.sum(1)
    merged = jnp.einsum("xpyn,xpynd->xynd", weights, out.astype(lse.dtype)) / total[..., None]
    return merged.astype(v.dtype), top[:, 0] + jnp.log(total)


def _forward(scale, gains, counts, q, k, values, known):
    part: Any = _attend(scale, gains, counts, q, k, values, known)
    return part, (q, k, values, part)


def _backward(scale, gains, counts, saved: Any, gradient: Any):
    _, entries = counts  # here a block of threads has every few keys already: no parts
    q, k, values, (outs, lse) = saved
    arrays = jax.tree.map(lambda x: by_entry(x, entries), (q, k, values, outs, lse, *gradient))
    found = backward(*arrays, scale=scale, gains=gains)
    return (*jax.tree.map(from_entries, found), None)


_attend.defvjp(_forward, _backward)


def backward(
    q: Float[Array, "x y n d"],
    k: Float[Array, "x y s d"],
    values: tuple[Float[Array, "x y s d"], ...],
    outs: tuple[Float[Array, "x y n d"], ...],
    lse: Float[Array, "x y n"],
    douts: tuple[Float[Array, "x y n d"], ...],
    dlse: Float[Array, "x y n"],
    *,
    scale: float,
    gains: tuple[float, ...],
) -> tuple[Array, Array, tuple[Array, ...]]:
    """`(dq, dk, dvalues)`, a call for each of the values; `outs` are those with their gains.

    The gradient of the log-sum-exp is one more term of each row's shift, which cuDNN takes from
    `dout . out`:

        dx = p (dout . v - dout . out + dlse)

    so it enters through the `out` of the first call: `out - dlse dout / |dout|^2`.
    """
    if not values:
        values, gains = (k,), (1.0,)
        outs = douts = (jnp.zeros_like(q),)
    dq, dk, dvalues = [], [], []
    for number, (v, out, dout, gain) in enumerate(zip(values, outs, douts, gains, strict=True)):
        out, dout = scaled(out, 1 / gain), scaled(dout.astype(v.dtype), gain)
        if number == 0:
            out, dout = shifted(out, dout, dlse)
        of_q, of_k, of_v = cudnn.backward(q, k, v, lse, out, dout, scale)
        dq.append(of_q)
        dk.append(of_k)
        dvalues.append(of_v)
    return added(dq), added(dk), tuple(dvalues)


def shifted(out: Array, dout: Array, dlse: Array) -> tuple[Array, Array]:
    """`(out, dout)` with `dout . out` less by dlse."""
    wide = dlse[..., None]
    rows = dout.astype(wide.dtype)
    square = jnp.square(rows).sum(-1, keepdims=True)
    length = SHORT_FLOAT16 if dout.dtype == jnp.float16 else SHORT
    stand_in = jnp.abs(wide) * (length * out.shape[-1] ** -0.5)
    short = (wide != 0) & (square < jnp.square(stand_in) * out.shape[-1])
    rows = jnp.where(short, stand_in, rows)
    square = jnp.where(short, jnp.square(stand_in) * out.shape[-1], square)
    shift = wide / jnp.where(square > 0, square, 1) * rows
    less = (out.astype(wide.dtype) - shift).astype(out.dtype)
    # Where nothing flows into the log-sum-exp at all the compiler sees that this is `out` itself.
    return jnp.where(wide == 0, out, less), rows.astype(dout.dtype)


def added(terms: list[Array]) -> Array:
    """The sum, rounded once."""
    if len(terms) == 1:
        return terms[0]
    wide = jnp.promote_types(terms[0].dtype, jnp.float32)
    total = functools.reduce(jnp.add, (x.astype(wide) for x in terms))
    return total.astype(terms[0].dtype)
