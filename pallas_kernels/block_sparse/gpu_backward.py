"""The gradient of block-sparse attention on a Hopper GPU: two walks, which make the scores again.

    P  = exp(x - lse)                                  lse is known: no maximum, P <= 1
    dP = dout . v ;  dS = P (dP - delta) ;  delta = dout . out - dlse
    dq = scale sum_s dS k[s]                           query blocks walk over their key blocks
    dk = scale sum_n dS q[n] ;  dv = sum_n P dout[n]   key blocks over the query blocks that keep
                                                       them

The second walk is over the transposed lists, and its scores are transposed too: the left side of
every product is in registers as it comes, or in shared memory as it was copied. Nothing is added up
in memory, so that two runs give the same bits. Seven products where one walk would make five.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from ..gpu import mode
from ..gpu.call import (
    LOG2E,
    NOBODY,
    PANEL,
    ROWS,
    add_dots,
    by_column,
    by_row,
    column_numbers,
    dots_transposed,
    fetch,
    full,
    launch,
    line_memory,
    load_per_column,
    load_per_row,
    send,
    store,
    tile_memory,
    tiles,
)
from . import gpu_walk
from .gpu_walk import TILE, WORKERS, Walk


def backward(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    keep: Bool[Array, "g p blocks"],
    out: Float[Array, "g n e"],
    lse: Float[Array, "g n"],
    dout: Float[Array, "g n e"],
    dlse: Float[Array, "g n"],
    *,
    block: int,
    length: int,
    scale: float,
    kept: int,
) -> tuple[Float[Array, "g n d"], Float[Array, "g s d"], Float[Array, "g s e"]]:
    """`(dq, dk, dv)` from the result of the forward pass and its gradient."""
    n, s = q.shape[1], k.shape[1]
    empty = jnp.isneginf(lse)
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    delta = delta - jnp.where(empty, 0.0, dlse)
    lse = jnp.where(empty, NOBODY, lse * LOG2E)
    arrays = q, k, v, dout.astype(q.dtype), _whole_tiles(lse), _whole_tiles(delta)
    how: dict[str, Any] = {"block": block, "scale": scale, "kept": kept}
    dq = _of_queries(*arrays, gpu_walk.schedule(keep, block, length, ROWS), **how)
    dk, dv = _of_keys(*arrays, gpu_walk.schedule(keep.swapaxes(1, 2), block, n, ROWS), **how)
    if length < s:
        dk, dv = (x.at[:, length:].set(0) for x in (dk, dv))
    return dq, dk, dv


def _of_queries(q, k, v, dout, lse, delta, order, *, block, scale, kept) -> Array:
    """`dq`: each tile of 128 queries walks over the key blocks that it keeps."""
    (g, n, d), e = q.shape, v.shape[-1]
    plan = gpu_walk.plan(block, 2 * ROWS * (d + e), 2 * TILE * (d + e))
    factor = scale * LOG2E

    def body(
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, order_ref, numbers_ref, dq_ref,
        q_memory, dout_memory, k_memory, v_memory, lines, own_loaded, loaded, released,
    ):  # fmt: skip
        keys, values = tiles(k_memory), tiles(v_memory)

        def compute(worker, index, numbers):
            queries, douts = tiles(q_memory).at(worker), tiles(dout_memory).at(worker)
            barrier = own_loaded.at[worker]
            fetch(q_ref, index, queries, barrier)
            fetch(dout_ref, index, douts, barrier)
            plgpu.copy_gmem_to_smem(lse_ref.at[index], lines.at[worker, 0], barrier)
            plgpu.copy_gmem_to_smem(delta_ref.at[index], lines.at[worker, 1], barrier)
            plgpu.barrier_wait(barrier)
            lse, shift = load_per_row(lines.at[worker, 0]), load_per_row(lines.at[worker, 1])
            way = Walk(plan, numbers, worker, loaded, released)

            def add(slot, sums, then, limit=None):
                here, values_here = keys.at(slot), values.at(slot)
                x, dp = dots_transposed([(queries, here), (douts, values_here)])
                if limit is not None:
                    x = jnp.where(column_numbers(x.shape) < limit, x, -jnp.inf)
                p = jnp.exp2(x * factor - by_row(lse, x.shape))
                ds = (p * (dp - by_row(shift, p.shape))).astype(k.dtype)
                ds, sums = lax.optimization_barrier((ds, sums))
                return add_dots(sums, [(ds, [here])], then=then)

            sums = way.run(
                lambda slots, sums, then: add(slots[0], sums, then),
                first=lambda slot, then: add(slot, [], then, way.limit),
            )
            store([x * scale for x in sums], queries)
            plgpu.commit_smem()
            send(queries, dq_ref, index)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        def copy(group, slot, start):
            index = (group, pl.ds(start, ROWS))
            fetch(k_ref, index, keys.at(slot), loaded.at[slot])
            fetch(v_ref, index, values.at(slot), loaded.at[slot])

        gpu_walk.run(plan, order_ref, numbers_ref, compute, copy, released)

    (dq,) = launch(
        body,
        name="block_sparse_dq",
        **gpu_walk.grid_of(g, n),
        threads=WORKERS + 1,
        out_type=(jax.ShapeDtypeStruct((g, _stored(n), d), q.dtype),),
        scratch=(
            tile_memory((WORKERS,), ROWS, d, q.dtype),
            tile_memory((WORKERS,), ROWS, e, q.dtype),
            tile_memory((plan.stages,), ROWS, d, k.dtype),
            tile_memory((plan.stages,), ROWS, e, v.dtype),
            line_memory((WORKERS, 2, ROWS)),
            plgpu.Barrier(num_arrivals=(d + e) // PANEL + 2, num_barriers=WORKERS),
            plgpu.Barrier(num_arrivals=(d + e) // PANEL, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=plan.stages),
        ),
        flops=2 * g * n * kept * block * (2 * d + e),
        moved=2 * q.nbytes + k.nbytes + v.nbytes + dout.nbytes + 8 * g * n,
    )(q, k, v, dout, lse, delta, *order)
    return dq[:, :n]


def _of_keys(q, k, v, dout, lse, delta, order, *, block, scale, kept) -> tuple[Array, Array]:
    """`(dk, dv)`: each tile of 128 keys walks over the query blocks that keep it."""
    (g, s, d), e, n = k.shape, v.shape[-1], q.shape[1]
    plan = gpu_walk.plan(block, 2 * ROWS * (d + e) + 8 * ROWS, 2 * TILE * (d + e))
    factor = scale * LOG2E

    def body(
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, order_ref, numbers_ref, dk_ref, dv_ref,
        k_memory, v_memory, q_memory, dout_memory, lse_lines, delta_lines,
        own_loaded, loaded, released,
    ):  # fmt: skip
        queries, douts = tiles(q_memory), tiles(dout_memory)

        def compute(worker, index, numbers):
            keys, values = tiles(k_memory).at(worker), tiles(v_memory).at(worker)
            fetch(k_ref, index, keys, own_loaded.at[worker])
            fetch(v_ref, index, values, own_loaded.at[worker])
            plgpu.barrier_wait(own_loaded.at[worker])
            way = Walk(plan, numbers, worker, loaded, released)
            # All queries of a block count, but the list may be empty.
            none = jnp.where(way.limit > 0, 0.0, NOBODY)

            def add(slots, sums, then):
                (slot,) = slots
                here, douts_here = queries.at(slot), douts.at(slot)
                (x,) = dots_transposed([(keys, here)])
                lse = load_per_column(lse_lines.at[slot]) + none
                p = jnp.exp2(x * factor - by_column(lse, x.shape))
                # Rounded and used at once: the two sums leave few registers for more.
                p = lax.optimization_barrier(p.astype(q.dtype))
                dv = add_dots(sums[1], [(p, [douts_here])])
                (dp,) = dots_transposed([(values, douts_here)])
                shift = by_column(load_per_column(delta_lines.at[slot]), dp.shape)
                ds = (p.astype(jnp.float32) * (dp - shift)).astype(q.dtype)
                dk = add_dots(sums[0], [(ds, [here])], then=then)
                return [dk, dv]

            zeros = [[full((ROWS, PANEL), 0.0) for _ in range(w // PANEL)] for w in (d, e)]
            dk, dv = way.run(add, start=zeros)
            store([x * scale for x in dk], keys)
            store(dv, values)
            plgpu.commit_smem()
            send(keys, dk_ref, index)
            send(values, dv_ref, index)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        def copy(group, slot, start):
            index = (group, pl.ds(start, ROWS))
            fetch(q_ref, index, queries.at(slot), loaded.at[slot])
            fetch(dout_ref, index, douts.at(slot), loaded.at[slot])
            plgpu.copy_gmem_to_smem(lse_ref.at[index], lse_lines.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(delta_ref.at[index], delta_lines.at[slot], loaded.at[slot])

        gpu_walk.run(plan, order_ref, numbers_ref, compute, copy, released)

    dk, dv = launch(
        body,
        name="block_sparse_dkv",
        **gpu_walk.grid_of(g, s),
        threads=WORKERS + 1,
        out_type=tuple(jax.ShapeDtypeStruct((g, _stored(s), w), k.dtype) for w in (d, e)),
        scratch=(
            tile_memory((WORKERS,), ROWS, d, k.dtype),
            tile_memory((WORKERS,), ROWS, e, k.dtype),
            tile_memory((plan.stages,), ROWS, d, q.dtype),
            tile_memory((plan.stages,), ROWS, e, q.dtype),
            line_memory((plan.stages, ROWS)),
            line_memory((plan.stages, ROWS)),
            plgpu.Barrier(num_arrivals=(d + e) // PANEL, num_barriers=WORKERS),
            plgpu.Barrier(num_arrivals=(d + e) // PANEL + 2, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=plan.stages),
        ),
        flops=4 * g * n * kept * block * (d + e),
        moved=2 * (k.nbytes + v.nbytes) + q.nbytes + dout.nbytes + 8 * g * n,
    )(q, k, v, dout, lse, delta, *order)
    return dk[:, :s], dv[:, :s]


def _whole_tiles(x: Float[Array, "g n"]) -> Float[Array, "g _"]:
    """Padded to whole tiles: a line is copied whole."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE)))


def _stored(length: int) -> int:
    """Rows of a result. The interpreter, unlike the copy engine, cannot leave out rows."""
    return length if mode.interpreting() is None else length + -length % TILE
