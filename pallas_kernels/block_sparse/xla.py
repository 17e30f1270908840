"""Block-sparse attention on any device: some query blocks at a time walk over their key blocks.

A step of the walk gathers a few key blocks for each query block of a chunk and updates a running
softmax. The number of steps is that of the longest list in the chunk, not the room for it, so lists
of different lengths cost what they hold. Nothing is quadratic: a chunk holds `block_sizes.scores()`
scores.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..block_sizes import BlockSizes
from ..chunks import chunk_length, map_chunks
from ..numerics import MASKED, accumulator, precision
from ..varying import varying

# Keys that one step of the walk gathers for a query block: enough for long products.
STEP_KEYS = 2048

# Where the running maximum starts: below every score, and so far above a masked one that its weight
# is zero without a second mask.
NOTHING = MASKED / 2


class _Plan(NamedTuple):
    """What is static of a call."""

    block: int
    length: int  # keys that are there
    scale: float
    slots: int  # key blocks a step of the walk
    chunk: int  # query blocks at a time


def block_sparse(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    indices: Int[Array, "g p c"],
    counts: Int[Array, "g p"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"]]:
    """`(out, lse)`; a row without keys gives zeros and -inf. Differentiable in q, k and v."""
    budget = block_sizes.scores()
    most, listed = max(1, min(STEP_KEYS // block, budget // block**2)), indices.shape[-1]
    # Even shares, so that the last step of the walk is not mostly empty.
    slots = -(-listed // -(-listed // most))
    room = -(-listed // slots) * slots
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, room - listed)))
    at_once = max(1, budget // (slots * block**2))
    plan = _Plan(block, length, scale, slots, chunk_length(indices.shape[1], at_once))
    short = indices.shape[1] % plan.chunk
    if short:  # whole chunks; the lists that are added are empty
        more = plan.chunk - short
        q = jnp.pad(q, ((0, 0), (0, more * block), (0, 0)))
        indices = jnp.pad(indices, ((0, 0), (0, more), (0, 0)))
        padded = jnp.pad(counts, ((0, 0), (0, more)))
    else:
        padded = counts
    rows = counts.shape[1] * block
    part: Any = _attend(plan, q, k, v, indices, padded)
    out, lse = part
    return out[:, :rows].astype(v.dtype), lse[:, :rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q: Array, k: Array, v: Array, indices: Array, counts: Array):
    def group(arrays: Any) -> Any:
        q, k, v, indices, counts = arrays
        k, v = _in_blocks(k, plan.block), _in_blocks(v, plan.block)
        chunks = _chunks(plan, q, indices, counts)
        out, lse = jax.lax.map(lambda chunk: _walk(plan, k, v, *chunk), chunks)
        return out.reshape(-1, v.shape[-1]), lse.reshape(-1)

    return jax.lax.map(group, (q, k, v, indices, counts))


def _walk(plan: _Plan, k: Array, v: Array, q: Array, indices: Array, counts: Array):
    """The running softmax of some query blocks `[p, block, d]` over their key blocks."""
    wide = accumulator(q.dtype)
    rows = q.shape[:2]

    def step(number: Any, carry: Any) -> Any:
        top, total, sums = carry
        here, keep = _gather(plan, number, indices, counts)
        x = _scores(plan, q, k[here], keep)
        new = jnp.maximum(top, x.max(-1))
        p = jnp.exp(x - new[..., None])
        fade = jnp.exp(top - new)
        more = _dot("pqk,pke->pqe", p.astype(v.dtype), _keys(v[here]), wide)
        return new, total * fade + p.sum(-1), sums * fade[..., None] + more

    start = (
        jnp.full(rows, NOTHING, wide), jnp.zeros(rows, wide), jnp.zeros((*rows, v.shape[-1]), wide),
    )  # fmt: skip
    start = varying(start, q, k, v, counts)
    top, total, sums = jax.lax.fori_loop(0, _steps(plan, counts), step, start)
    some = total > 0
    safe = jnp.where(some, total, 1)
    return sums / safe[..., None], jnp.where(some, top + jnp.log(safe), -jnp.inf)


def _forward(plan, q, k, v, indices, counts):
    part: Any = _attend(plan, q, k, v, indices, counts)
    out, lse = part
    return (out, lse), (q, k, v, indices, counts, out, lse)


def _backward(plan, saved, gradient):
    """With p from the kept log-sum-exp: dx = p (dout . v - dout . out + dlse)."""
    q, k, v, indices, counts, out, lse = saved
    dout, dlse = gradient
    wide = accumulator(q.dtype)
    # A row without keys: no weight, no gradient.
    lse = jnp.where(jnp.isneginf(lse), -MASKED, lse)
    dlse = jnp.where(lse == -MASKED, 0, dlse)
    shift = dlse - (dout.astype(wide) * out.astype(wide)).sum(-1)

    def group(arrays: Any) -> Any:
        q, k, v, indices, counts, dout, lse, shift = arrays
        k, v = _in_blocks(k, plan.block), _in_blocks(v, plan.block)
        of_rows = (x.reshape(-1, plan.chunk, plan.block, *x.shape[1:]) for x in (dout, lse, shift))
        chunks = (*_chunks(plan, q, indices, counts), *of_rows)
        zeros = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
        zeros = varying(zeros, arrays)
        (dk, dv), dq = jax.lax.scan(functools.partial(_walk_back, plan, k, v), zeros, chunks)
        return tuple(x.reshape(-1, x.shape[-1]) for x in (dq, dk, dv))

    arrays = (q, k, v, indices, counts, dout, lse, shift)
    dq, dk, dv = jax.lax.map(group, arrays)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _walk_back(plan, k, v, of_keys, chunk):
    """One chunk of query blocks: adds to the gradients of k and v, returns that of q."""
    q, indices, counts, dout, lse, shift = chunk
    wide = accumulator(q.dtype)

    def step(number: Any, carry: Any) -> Any:
        dq, dk, dv = carry
        here, keep = _gather(plan, number, indices, counts)
        keys, values = k[here], v[here]
        p = jnp.exp(_scores(plan, q, keys, keep) - lse[..., None])
        dp = _dot("pqe,pke->pqk", dout.astype(v.dtype), _keys(values), wide)
        dx = (plan.scale * p * (dp + shift[..., None])).astype(q.dtype)
        dq = dq + _dot("pqk,pkd->pqd", dx, _keys(keys), wide)
        here_dk = _dot("pqk,pqd->pkd", dx, q, wide).reshape(keys.shape)
        here_dv = _dot("pqk,pqe->pke", p.astype(v.dtype), dout.astype(v.dtype), wide)
        return dq, dk.at[here].add(here_dk), dv.at[here].add(here_dv.reshape(values.shape))

    start = varying((jnp.zeros(q.shape, wide), *of_keys), chunk, k, v)
    dq, dk, dv = jax.lax.fori_loop(0, _steps(plan, counts), step, start)
    return (dk, dv), dq


_attend.defvjp(_forward, _backward)


def _chunks(plan: _Plan, q: Array, indices: Array, counts: Array) -> tuple[Array, Array, Array]:
    """Query blocks, lists and their lengths of one group, chunk by chunk."""
    q = q.reshape(-1, plan.chunk, plan.block, q.shape[-1])
    indices = indices.reshape(-1, plan.chunk, indices.shape[-1])
    return q, indices, counts.reshape(-1, plan.chunk)


def _in_blocks(x: Array, block: int) -> Array:
    return x.reshape(-1, block, x.shape[-1])


def _keys(x: Float[Array, "p slots block d"]) -> Float[Array, "p keys d"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _steps(plan: _Plan, counts: Array) -> Array:
    """Steps of the walk that the longest list takes."""
    return (counts.max() + plan.slots - 1) // plan.slots


def _gather(plan: _Plan, number: Any, indices: Array, counts: Array) -> tuple[Array, Array]:
    """The key blocks `[p, slots]` of one step, and which of their keys are there, `[p, keys]`."""
    start = number * plan.slots
    here = jax.lax.dynamic_slice_in_dim(indices, start, plan.slots, axis=1)
    used = start + jnp.arange(plan.slots) < counts[:, None]
    keys = here[..., None] * plan.block + jnp.arange(plan.block)
    keep = used[..., None] & (keys < plan.length)
    return here, keep.reshape(keep.shape[0], -1)


def _scores(plan: _Plan, q: Array, keys: Array, keep: Array) -> Float[Array, "p q keys"]:
    x = plan.scale * _dot("pqd,pkd->pqk", q, _keys(keys), accumulator(q.dtype))
    return jnp.where(keep[:, None], x, MASKED)


def _dot(what: str, a: Array, b: Array, wide: Any) -> Array:
    return jnp.einsum(what, a, b, precision=precision(a.dtype), preferred_element_type=wide)


def block_mass(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    lse: Float[Array, "g n"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> Float[Array, "g p blocks"]:
    """`mass`; a padded row has an infinite `lse`."""

    def rows(k: Any, q: Any, lse: Any) -> Any:
        p = jnp.exp(_all_scores(q, k, length, scale) - lse[..., None])
        return _sums(p, block)

    return _by_rows(rows, block, block_sizes, k, (k,), (q, lse))


def attend_mass(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    *,
    block: int,
    rows: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"], Float[Array, "g p blocks"]]:
    """Dense `(out, lse)` and the mass of its weights; only the first `rows` queries have any."""
    wide = accumulator(q.dtype)
    groups, n = q.shape[:2]
    real = jnp.broadcast_to(jnp.arange(n) < rows, (groups, n))

    def some(k: Any, v: Any, q: Any, real: Any) -> Any:
        x = _all_scores(q, k, length, scale)
        top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
        p = jnp.exp(x - top)
        total = p.sum(-1)
        lse = top[..., 0] + jnp.log(total)
        out = _dot("pqk,ke->pqe", p.astype(v.dtype), v, wide) / total[..., None]
        weights = jnp.where(real, 1 / total, 0)[..., None] * p
        return out.astype(v.dtype), lse, _sums(jax.lax.stop_gradient(weights), block)

    out, lse, mass = _by_rows(some, block, block_sizes, k, (k, v), (q, real))
    return out.reshape(groups, n, -1), lse.reshape(groups, n), mass


def _by_rows(function: Any, block: int, block_sizes: BlockSizes, k: Any, keys: Any, rows: Any):
    """`function(*keys, *rows)` of one group's keys and some of its query blocks at a time."""
    at_once = max(1, block_sizes.scores() // (block * k.shape[1]))

    def group(arrays: Any) -> Any:
        keys, rows = arrays
        blocks = tuple(x.reshape(-1, block, *x.shape[1:]) for x in rows)
        return map_chunks(lambda keys, *rows: function(*keys, *rows), at_once, *blocks, shared=keys)

    return jax.lax.map(group, (keys, rows))


def _all_scores(q: Array, k: Array, length: int, scale: float) -> Float[Array, "p q s"]:
    x = scale * _dot("pqd,sd->pqs", q, k, accumulator(q.dtype))
    return jnp.where(jnp.arange(k.shape[0]) < length, x, MASKED)


def _sums(p: Float[Array, "p q s"], block: int) -> Float[Array, "p blocks"]:
    return p.reshape(*p.shape[:2], -1, block).sum((1, 3))
