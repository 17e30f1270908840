"""The L step of some query positions over every key block of all tiles, on a Hopper GPU.

    x[l,k] = (q[l] . aL[k] - cL[k]) log2 e
    out[l] = sum_k 2^(x - top[l]) Y[k] / l[l] ;  lse[l] = (top[l] + log2 l[l]) ln 2

Each position is attention of its `m` rows on as many keys as there are key blocks: thousands, 64
of them at a time with running maxima. A block of threads is one warpgroup with one position (and 64
of its rows). aL and Y are read once, and that is what it waits for: two blocks of threads a
multiprocessor have the next keys on their way while they compute.

The last key blocks come first: the R step wrote them last, so that they may still lie in L2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..gpu import mode
from ..gpu.call import (
    LN2,
    LOG2E,
    PANEL,
    ROWS,
    add_dot,
    by_column,
    by_row,
    dot_transposed,
    fetch,
    full,
    launch,
    line_memory,
    load_per_column,
    send,
    store,
    tile_memory,
    tiles,
)
from ..numerics import MASKED

NAME = "tiled_l_step"

# Key blocks that are copied and multiplied at a time.
KEYS = 64

# Blocks of threads that share a multiprocessor, and the most copies that one has under way.
PER_PROCESSOR = 2
MOST_STAGES = 4

# Shared memory of a block of threads that is left for the compiler's own use, in bytes.
SPARE = 4096


def l_step(
    start: Int[Array, "2"],
    q: Float[Array, "g m n d"],
    averages: Float[Array, "heads M positions w"],
    bias: Float[Array, "heads M positions"],
) -> tuple[Float[Array, "heads m positions e"], Float[Array, "heads m positions"]]:
    """`(out, lse)` of the positions of `q` from `start` (a group, a position) on.

    `averages` and `bias` are the R step's. Positions beyond the last one of `q` get nothing.
    """
    (_, m, n, d), (heads, blocks, positions, width) = q.shape, averages.shape
    e = width - d
    row_tiles, steps = -(-m // ROWS), -(-blocks // KEYS)
    rows, line = row_tiles * ROWS, steps * KEYS
    memory = mode.SHARED_MEMORY // PER_PROCESSOR - SPARE - 2 * ROWS * (d + e)
    stages = min(MOST_STAGES, memory // (KEYS * (2 * width + 4)), steps)

    def body(
        start_ref, q_ref, averages_ref, bias_ref, out_ref, lse_ref,
        q_memory, al_memory, y_memory, bias_lines, out_memory, lse_line, q_loaded, loaded,
    ):  # fmt: skip
        queries, al_tiles, y_tiles, out_tiles = map(
            tiles, (q_memory, al_memory, y_memory, out_memory)
        )
        at = lax.axis_index("blocks")
        row = lax.rem(at, row_tiles) * ROWS
        place = lax.div(at, row_tiles)
        head, position = lax.div(place, positions), lax.rem(place, positions)
        group, token = start_ref[0] + head, start_ref[1] + position

        def load(step, slot):
            key = (steps - 1 - step) * KEYS
            index, barrier = (head, pl.ds(key, KEYS), position), loaded.at[slot]
            fetch(averages_ref, index, al_tiles.at(slot), barrier)
            fetch(averages_ref, index, y_tiles.at(slot), barrier, d)
            source = bias_ref.at[head, position, pl.ds(key, KEYS)]
            plgpu.copy_gmem_to_smem(source, bias_lines.at[slot], barrier)

        def visit(step: Any, carry: Any) -> Any:
            top, total, sums = carry
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(loaded.at[slot])
            x = dot_transposed(queries, al_tiles.at(slot))
            x = x * LOG2E + by_column(load_per_column(bias_lines.at[slot]), x.shape)
            old, top = top, jnp.maximum(top, x.max(axis=1))
            shrink = jnp.exp2(old - top)
            p = jnp.exp2(x - by_row(top, x.shape))
            total = total * shrink + p.sum(axis=1)
            sums = [x * by_row(shrink, x.shape) for x in sums]
            sums = add_dot(sums, p.astype(averages.dtype), [y_tiles.at(slot)])
            plgpu.commit_smem()  # every thread is done with the slot

            @pl.when(step + stages < steps)
            def _():
                load(step + stages, slot)

            return top, total, sums

        @pl.when(token < n)
        def _():
            fetch(q_ref, (group, pl.ds(row, ROWS), token), queries, q_loaded)
            for step in range(stages):
                load(at * 0 + step, step)
            plgpu.barrier_wait(q_loaded)
            nothing = [full((ROWS, PANEL), 0.0) for _ in range(e // PANEL)]
            carry = (full((ROWS,), MASKED), full((ROWS,), 0.0), nothing)
            top, total, sums = lax.fori_loop(0, steps, visit, carry)

            share = 1.0 / total
            store([x * by_row(share, x.shape) for x in sums], out_tiles)
            lse_line[...] = top * LN2 + jnp.log(total)
            plgpu.commit_smem()
            send(out_tiles, out_ref, (head, pl.ds(row, ROWS), position))
            to = lse_ref.at[head, position, pl.ds(row, ROWS)]
            plgpu.copy_smem_to_gmem(lse_line, to, commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

    # The interpreter, unlike the copy engine, cannot leave out rows.
    stored = m if mode.interpreting() is None else rows
    beyond = ((0, 0), (0, line - blocks), (0, 0))
    lines = jnp.pad(bias, beyond, constant_values=MASKED).swapaxes(1, 2)
    out, lse = launch(
        body,
        name=NAME,
        grid=(heads * positions * row_tiles,),
        grid_names=("blocks",),
        threads=1,
        out_type=(
            jax.ShapeDtypeStruct((heads, stored, positions, e), averages.dtype),
            jax.ShapeDtypeStruct((heads, positions, rows), jnp.float32),
        ),
        scratch=(
            tile_memory((), ROWS, d, q.dtype),
            tile_memory((stages,), KEYS, d, averages.dtype),
            tile_memory((stages,), KEYS, e, averages.dtype),
            line_memory((stages, KEYS)),
            tile_memory((), ROWS, e, averages.dtype),
            line_memory((ROWS,)),
            plgpu.Barrier(num_arrivals=d // PANEL),
            plgpu.Barrier(num_arrivals=width // PANEL + 1, num_barriers=stages),
        ),
        flops=2 * heads * positions * m * blocks * width,
        moved=2 * heads * positions * width * (m + row_tiles * blocks),
    )(start, q, averages, lines)
    return out[:, :m], lse[..., :m].swapaxes(1, 2)
