"""Softmax attention of blocks of rows on their kept key blocks, on a Hopper GPU.

    x[n,s] = scale q[n] . k[s] ;  lse[n] = logsumexp_s x ;  out[n] = sum_s exp(x - lse) v[s]

FlashAttention-3's schedule, as `attend/gpu_forward.py` has it for all keys, over the walk of
`gpu_walk.py`. Bytes copied from L2 for each FLOP: with blocks of 128, 1 for 128, as dense attention
in tiles of 128 rows; with blocks of 64, 1 for 64 if two neighbouring lists have nothing in common,
and 1 for 128 if they are the same.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..gpu import mode
from ..gpu.call import (
    LN2,
    LOG2E,
    PANEL,
    ROWS,
    add_dots,
    by_row,
    column_numbers,
    dots_transposed,
    fetch,
    launch,
    send,
    store,
    tile_memory,
    tiles,
)
from . import gpu_walk
from .gpu_walk import TILE, WORKERS, Schedule, Walk

# Below every score: a row whose scores are all masked has no weight, and no NaN.
LOWEST = -1e30


def forward(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    order: Schedule,
    *,
    block: int,
    scale: float,
    kept: int,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"]]:
    """`(out, lse)`: out in the dtype of v, lse in float32; `kept` blocks of a row are counted."""
    (g, n, d), e = q.shape, v.shape[-1]
    widest = max(d, e)
    plan = gpu_walk.plan(block, 2 * block * (d + e), 2 * TILE * widest)
    factor = scale * LOG2E

    def body(
        q_ref, k_ref, v_ref, order_ref, numbers_ref, out_ref, lse_ref,
        row_memory, k_memory, v_memory, q_loaded, turn, loaded, released,
    ):  # fmt: skip
        keys, values = tiles(k_memory), tiles(v_memory)

        def take_turns():
            # Only where both walk over the same list do they have as many turns.
            if plan.lists == 1:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def compute(worker, index, numbers):
            buffer = tiles(row_memory).at(worker)
            rows = buffer.first_panels(d // PANEL)
            fetch(q_ref, index, rows, q_loaded.at[worker])
            way = Walk(plan, numbers, worker, loaded, released)
            plgpu.barrier_wait(q_loaded.at[worker])

            def scores(slots):
                return dots_transposed([(rows, keys.at(slot)) for slot in slots], then=take_turns)

            def add(slots, weights, carry, then):
                weights = [p.astype(q.dtype) for p in weights]
                (top, total, sums), weights = lax.optimization_barrier((carry, weights))
                take_turns()
                right = [[values.at(slot)] for slot in slots]
                sums = add_dots(sums, list(zip(weights, right, strict=True)), then=then)
                return top, total, sums

            def first(slot, then):
                pl.when(worker == 1)(take_turns)
                (x,) = scores([slot])
                x = jnp.where(column_numbers(x.shape) < way.limit, x, -jnp.inf)
                top = jnp.maximum(x.max(axis=1) * factor, LOWEST)
                p = jnp.exp2(x * factor - by_row(top, x.shape))
                return add([slot], [p], (top, p.sum(axis=1), []), then)

            def more(slots, carry, then):
                old, total, sums = carry
                found, top = scores(slots), old
                for x in found:
                    top = jnp.maximum(top, x.max(axis=1) * factor)
                shrink = jnp.exp2(old - top)
                weights = [jnp.exp2(x * factor - by_row(top, x.shape)) for x in found]
                total = sum((p.sum(axis=1) for p in weights), start=total * shrink)
                sums = [x * by_row(shrink, x.shape) for x in sums]
                return add(slots, weights, (top, total, sums), then)

            top, total, sums = way.run(more, first=first, at_once=plan.lists)
            pl.when(worker == 0)(take_turns)

            some = total > 0.0
            share = jnp.where(some, 1.0 / total, 0.0)
            # The rows of q are no longer needed, and their memory takes the result.
            result = buffer.first_panels(e // PANEL)
            store([x * by_row(share, x.shape) for x in sums], result)
            # Straight to memory: a line of shared memory would cost a slot of keys.
            lse_ref[index] = jnp.where(some, top * LN2 + jnp.log(total), -jnp.inf)
            plgpu.commit_smem()
            send(result, out_ref, index)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        def copy(group, slot, start):
            index = (group, pl.ds(start, block))
            fetch(k_ref, index, keys.at(slot), loaded.at[slot])
            fetch(v_ref, index, values.at(slot), loaded.at[slot])

        gpu_walk.run(plan, order_ref, numbers_ref, compute, copy, released)

    padded = n + -n % TILE
    stored = n if mode.interpreting() is None else padded
    out, lse = launch(
        body,
        name="block_sparse",
        **gpu_walk.grid_of(g, n),
        threads=WORKERS + 1,
        out_type=(
            jax.ShapeDtypeStruct((g, stored, e), v.dtype),
            jax.ShapeDtypeStruct((g, padded), jnp.float32),
        ),
        scratch=(
            tile_memory((WORKERS,), ROWS, widest, q.dtype),
            tile_memory((plan.stages,), block, d, k.dtype),
            tile_memory((plan.stages,), block, e, v.dtype),
            plgpu.Barrier(num_arrivals=d // PANEL, num_barriers=WORKERS),
            plgpu.Barrier(num_arrivals=WORKERS),
            plgpu.Barrier(num_arrivals=(d + e) // PANEL, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=plan.stages),
        ),
        flops=2 * g * n * kept * block * (d + e),
        moved=q.nbytes + k.nbytes + v.nbytes + 2 * g * n * e + 4 * g * n,
    )(q, k, v, *order)
    return out[:, :n], lse[:, :n]
