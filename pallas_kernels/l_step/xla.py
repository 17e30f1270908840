"""The L step on any device: a chunk of positions, or of rows, at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..attend.xla import attend
from ..block_sizes import BlockSizes
from ..chunks import map_chunks
from ..numerics import MASKED, TINY_MASS, accumulator, precision


def last(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    y: Float[Array, "g M n e"],
    *,
    key_blocks: Bool[Array, "g M"] | None = None,
    left_out: Bool[Array, "g m M"] | None = None,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g m n e"], Float[Array, "g m n"]]:
    """`(out, lse)`: for each position, attention of the rows `l` on the key blocks `k`.

    `left_out`: the pairs of a query and a key block that are attended to elsewhere.
    """
    if left_out is not None:
        run = functools.partial(_last_of_some, block_sizes=block_sizes)
        return _over_groups(run, q, al, cl, y, key_blocks, left_out)
    run = functools.partial(_last, block_sizes=block_sizes)
    return _over_groups(run, q, al, cl, y, key_blocks)


def middle(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    *,
    floor: float,
    queries: Bool[Array, "g m n"] | None = None,
    key_blocks: Bool[Array, "g M"] | None = None,
    block_sizes: BlockSizes,
) -> Float[Array, "g M n d"]:
    """The mean queries `qt` of the next iteration, in float32.

    While the rows and key blocks of one position fit the budget, chunks of positions are
    computed in one go. Beyond it the sum over `l` would need every row of L at once, so the
    rows' log-sum-exp is found first and then chunks of key blocks are summed: twice the dot
    products, nothing quadratic, no running state.
    """
    run = functools.partial(_middle, floor=max(floor, TINY_MASS), block_sizes=block_sizes)
    return _over_groups(run, q, al, cl, queries, key_blocks)


def _over_groups(run: Callable[..., Any], *arrays: Any) -> Any:
    """`run` for every group; one group alone is not mapped, which keeps its programs simple."""
    if arrays[0].shape[0] > 1:
        return jax.vmap(run)(*arrays)
    return jax.tree.map(lambda x: x[None], run(*jax.tree.map(lambda x: x[0], arrays)))


def _last(q, al, cl, y, key_blocks, *, block_sizes):
    budget = block_sizes.scores()
    rows, blocks = q.shape[0], al.shape[0]

    def some_positions(key_blocks, q, al, cl, y):
        q, al, y = (x.swapaxes(0, 1) for x in (q, al, y))
        mask = None if key_blocks is None else jnp.broadcast_to(key_blocks, al.shape[:2])
        (out,), lse = attend(q, al, (y,), scale=1.0, bias=-cl.T, mask=mask, block_sizes=block_sizes)
        return out, lse

    most = budget // (rows * blocks)
    out, lse = map_chunks(some_positions, most, q, al, cl, y, shared=key_blocks, axis=1)
    return out.swapaxes(0, 1), lse.T


def _last_of_some(q, al, cl, y, key_blocks, left_out, *, block_sizes):
    """`_last` where every row has key blocks of its own, the same ones at all positions."""
    budget = block_sizes.scores()
    rows, blocks = q.shape[0], al.shape[0]

    def some_positions(shared, q, al, cl, y):
        key_blocks, left_out = shared
        fixed = (key_blocks, al, cl, y)
        out, lse = map_chunks(some_rows, budget // (blocks * q.shape[1]), q, left_out, shared=fixed)
        return out.swapaxes(0, 1), lse.T

    def some_rows(fixed, q, left_out):
        key_blocks, al, cl, y = fixed
        keep = ~left_out if key_blocks is None else ~left_out & key_blocks
        keep = keep[:, None]
        f = jnp.where(keep, _dot("ljd,kjd->ljk", q, al) - cl.T, MASKED)
        top = jax.lax.stop_gradient(f.max(-1, keepdims=True))
        p = jnp.where(keep, jnp.exp(f - top), 0)
        some = keep.any(-1)
        total = jnp.where(some, p.sum(-1), 1)
        lse = jnp.where(some, top[..., 0] + jnp.log(total), -jnp.inf)
        return _dot("ljk,kje->lje", p.astype(y.dtype), y) / total[..., None], lse

    most, shared = budget // (rows * blocks), (key_blocks, left_out)
    out, lse = map_chunks(some_positions, most, q, al, cl, y, shared=shared, axis=1)
    return out.swapaxes(0, 1), lse.T


def _middle(q, al, cl, queries, key_blocks, *, floor, block_sizes):
    budget = block_sizes.scores()
    rows, blocks = q.shape[0], al.shape[0]
    if rows * blocks <= budget:
        chunk = functools.partial(_middle_chunk, floor=floor)
        most = budget // (rows * blocks)
        qt = map_chunks(chunk, most, q, al, cl, queries, shared=key_blocks, axis=1)
        return qt.swapaxes(0, 1)

    q, al, cl = q.swapaxes(0, 1), al.swapaxes(0, 1), cl.T
    queries = None if queries is None else queries.T
    mask = None if key_blocks is None else jnp.broadcast_to(key_blocks, cl.shape)
    _, lse = attend(q, al, (), scale=1.0, bias=-cl, mask=mask, block_sizes=block_sizes)

    def one_position(position):
        q, al, cl, queries, lse = position

        def some_blocks(rows_of_it, al, cl, key_blocks):
            q, queries, lse = rows_of_it
            f = _dot("ld,kd->lk", q, al) - cl
            if key_blocks is not None:
                f = jnp.where(key_blocks, f, MASKED)
            weights = _drop(jnp.exp(f - lse[:, None]), queries, key_blocks)
            return _mean_queries(weights[None], q[None], floor)[0]

        blocks_of_it = (al, cl, key_blocks)
        return map_chunks(some_blocks, budget // rows, *blocks_of_it, shared=(q, queries, lse))

    if key_blocks is not None:
        # exp(masked - (-inf)) would be inf where no key block is left at all.
        lse = jnp.where(key_blocks.any(), lse, 0)
    return jax.lax.map(one_position, (q, al, cl, queries, lse)).swapaxes(0, 1)


def _dot(formula, x, y):
    exact = precision(x.dtype)
    return jnp.einsum(formula, x, y, precision=exact, preferred_element_type=accumulator(x.dtype))


def _middle_chunk(key_blocks, q, al, cl, queries, *, floor):
    q, al, cl = q.swapaxes(0, 1), al.swapaxes(0, 1), cl.T
    queries = None if queries is None else queries.T
    f = _dot("jld,jkd->jlk", q, al) - cl[:, None, :]
    if key_blocks is not None:
        f = jnp.where(key_blocks, f, MASKED)
    top = jax.lax.stop_gradient(f.max(-1, keepdims=True))
    p = jnp.exp(f - top)
    weights = _drop(p / p.sum(-1, keepdims=True), queries, key_blocks)
    return _mean_queries(weights, q, floor)


def _drop(weights, queries, key_blocks):
    """Weights of real rows on real key blocks; zero elsewhere."""
    if key_blocks is not None:
        weights = jnp.where(key_blocks, weights, 0)
    if queries is not None:
        weights = jnp.where(queries[..., None], weights, 0)
    return weights


def _mean_queries(weights, q, floor):
    cr = weights.sum(-2)
    # Weights and queries in float32: a mean of queries feeds another iteration, and this
    # product is small beside the R step's.
    total = _dot("jlk,jld->jkd", weights, q.astype(weights.dtype))
    return total / jnp.maximum(cr, floor)[..., None]
