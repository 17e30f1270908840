"""The mass of every pair of blocks on a Hopper GPU, in one pass over the keys.

    x[n,s]    = scale q[n] . k[s]
    mass[p,c] = sum over n in query block p, s in key block c of exp(x - lse[n])

A block of threads has 128 rows, 64 for each of two warpgroups, and walks over all keys. A key block
leaves a number for each row, a line in shared memory. 64 such lines are a square, which one load
turns into sums over its rows: no thread waits for another on the way. The sums of 64 rows at a time
are what is written; with blocks of 128, two of them are added up outside.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..gpu.call import (
    LOG2E,
    PANEL,
    ROWS,
    by_row,
    column_numbers,
    dots_transposed,
    fetch,
    full,
    launch,
    line_memory,
    load_per_row,
    load_square,
    tile_memory,
    tiles,
)
from .gpu_walk import COPIER_REGISTERS, TILE, WORKER_REGISTERS, WORKERS, grid_of

# Keys that are copied at a time, and how many of such copies are there or on their way.
KEYS = 128
STAGES = 4

# Key blocks whose masses are written at a time.
CHUNK = 64

# Room after each line, so that eight lines of a square begin in different banks.
APART = 8


def masses(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    lse: Float[Array, "g n"],
    *,
    block: int,
    length: int,
    scale: float,
) -> Float[Array, "g p blocks"]:
    """`mass` in float32; rows with an infinite `lse` have none."""
    g, n, d = q.shape
    blocks = k.shape[1] // block
    tiles_of_rows = -(-n // TILE)
    padded = tiles_of_rows * TILE
    columns = -(-blocks // CHUNK) * CHUNK
    of_chunk = CHUNK * block // KEYS  # copies
    copies = -(-length // KEYS)
    chunks = -(-copies // of_chunk)
    stages = min(STAGES, copies)
    factor = scale * LOG2E
    lse = jnp.pad(lse * LOG2E, ((0, 0), (0, padded - n)), constant_values=jnp.inf)

    def body(
        q_ref, k_ref, lse_ref, mass_ref,
        q_memory, lse_lines, squares, sums, own_loaded, loaded, released, k_memory,
    ):  # fmt: skip
        worker = lax.axis_index("warpgroup")
        group, tile = lax.axis_index("groups"), lax.axis_index("tiles")
        keys = tiles(k_memory)

        @pl.when(worker < WORKERS)
        def _():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            rows = tiles(q_memory).at(worker)
            index = (group, pl.ds(tile * TILE + worker * ROWS, ROWS))
            fetch(q_ref, index, rows, own_loaded.at[worker])
            plgpu.copy_gmem_to_smem(lse_ref.at[index], lse_lines.at[worker], own_loaded.at[worker])
            plgpu.barrier_wait(own_loaded.at[worker])
            lse_here = load_per_row(lse_lines.at[worker])
            square = squares.at[worker, :, pl.ds(0, ROWS)]

            def visit(copy, limit=None):
                """The lines of a copy's key blocks; `limit`: tokens of it that count."""
                slot = lax.rem(copy, stages)
                plgpu.barrier_wait(loaded.at[slot])
                here = [keys.at(slot).rows(start, block) for start in range(0, KEYS, block)]
                found = dots_transposed([(rows, x) for x in here])
                plgpu.barrier_arrive(released.at[slot])
                for i, x in enumerate(found):
                    if limit is not None:
                        x = jnp.where(column_numbers(x.shape) < limit - i * block, x, -jnp.inf)
                    p = jnp.exp2(x * factor - by_row(lse_here, x.shape))
                    line = lax.rem(copy * len(found) + i, CHUNK)
                    square[line] = p.sum(axis=1)

            def write(chunk):
                plgpu.commit_smem()
                of_blocks = load_square(square).sum(axis=1)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                sums[worker] = of_blocks
                plgpu.commit_smem()
                to = mass_ref.at[group, tile * WORKERS + worker, pl.ds(chunk * CHUNK, CHUNK)]
                plgpu.copy_smem_to_gmem(sums.at[worker], to)

            def turn(chunk):
                @pl.loop(chunk * of_chunk, (chunk + 1) * of_chunk)
                def _(copy):
                    visit(copy)

                write(chunk)

            pl.loop(0, chunks - 1)(turn)
            # The last chunk has what is not full.
            for line in range(CHUNK):
                square[line] = full((ROWS,), 0.0)

            @pl.loop((chunks - 1) * of_chunk, copies - 1)
            def _(copy):
                visit(copy)

            visit(jnp.int32(copies - 1), length - (copies - 1) * KEYS)
            write(chunks - 1)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(worker == WORKERS)
        def _():
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

            def copy(step, slot):
                index = (group, pl.ds(step * KEYS, KEYS))
                fetch(k_ref, index, keys.at(slot), loaded.at[slot])

            for step in range(stages):
                copy(tile * 0 + step, step)  # traced: the last copy may reach beyond the keys

            @pl.loop(stages, copies)
            def _(step):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(released.at[slot])
                copy(step, slot)

            for step in range(copies - stages, copies):  # nobody leaves with a signal unheard
                plgpu.barrier_wait(released.at[step % stages])

    (found,) = launch(
        body,
        name="block_mass",
        **grid_of(g, n),
        threads=WORKERS + 1,
        out_type=(jax.ShapeDtypeStruct((g, tiles_of_rows * WORKERS, columns), jnp.float32),),
        scratch=(
            tile_memory((WORKERS,), ROWS, d, q.dtype),
            line_memory((WORKERS, ROWS)),
            line_memory((WORKERS, CHUNK, ROWS + APART)),
            line_memory((WORKERS, CHUNK)),
            plgpu.Barrier(num_arrivals=d // PANEL + 1, num_barriers=WORKERS),
            plgpu.Barrier(num_arrivals=d // PANEL, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            tile_memory((stages,), KEYS, d, k.dtype),
        ),
        flops=2 * g * n * length * d,
        moved=q.nbytes + k.nbytes + 4 * g * n + 4 * g * (n // ROWS) * blocks,
    )(q, k, lse)
    # Chunks without a real key were never written.
    written = jnp.arange(blocks) < chunks * CHUNK
    found = jnp.where(written, found[..., :blocks], 0.0)
    return found.reshape(g, -1, block // ROWS, blocks).sum(2)[:, : n // block]
