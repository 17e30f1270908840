"""R steps of some query positions on every key block of some heads, on a Hopper GPU.

    x[k,n,i] = scale q[k mod m, n] . K[k,i] ;  R = softmax_i x ;  lseR[k,n] = logsumexp_i x
    aL[k,n] = scale sum_i R K[k,i] ;  Y[k,n] = sum_i R V[k,i] ;  cL[k,n] = q . aL - lseR

Positions n count those of all query tiles, which share the key blocks: a tile of 64 rows takes them
as they come, so that nothing is lost to rows of 52 or 80. A block of threads is one warpgroup. It
holds K and V of one key block while the rows of all positions pass by, two tiles of them under way,
and writes `[aL | Y]` side by side, as the L step reads them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..gpu import mode
from ..gpu.call import (
    LOG2E,
    PANEL,
    ROWS,
    Tiles,
    add_dot,
    by_row,
    column_numbers,
    dot_transposed,
    fetch,
    launch,
    line_memory,
    load_panel,
    round_up,
    send,
    store,
    tile_memory,
    tiles,
)

NAME = "tiled_r_step"

# wgmma takes the keys of a product with the weights in multiples of a panel's width: half panels
# pad 80 keys to 96 instead of 128.
HALF_PANEL = 32

# Keys of a block: more would need more registers for the scores, and more shared memory.
LONGEST_BLOCK = 128

# Blocks of threads that share a multiprocessor: one computes while another waits.
PER_PROCESSOR = 2

# Tiles of queries that are there or on their way.
AHEAD = 2


def r_step(
    start: Int[Array, "2"],
    q: Float[Array, "g m n d"],
    k: Float[Array, "z M b h d"],
    v: Float[Array, "z M b h e"],
    *,
    heads: int,
    positions: int,
    scale: float,
) -> tuple[Float[Array, "heads M positions w"], Float[Array, "heads M positions"]]:
    """`([aL | Y], -cL log2 e)` of `heads` groups and `positions` positions from `start` on.

    `start` is the first group and the first position. `positions` is a multiple of 64; those
    beyond the last one get numbers without a meaning, or none. Groups are the `h` heads of each of
    `z` entries of a batch: K and V lie as a caller's tokens do. `w = d + e`.
    """
    (_, m, n, d), (_, blocks, b, each, e) = q.shape, v.shape
    panel = HALF_PANEL if round_up(b, HALF_PANEL) < round_up(b, PANEL) else PANEL
    keys = round_up(b, panel)
    row_tiles = positions // ROWS
    units = heads * blocks
    grid = min(units, PER_PROCESSOR * mode.multiprocessors())
    factor = scale * LOG2E

    def body(
        start_ref, q_ref, k_ref, v_ref, averages_ref, bias_ref,
        q_memory, k_memory, v_memory, y_memory, line, q_loaded, loaded,
    ):  # fmt: skip
        queries, *single = map(tiles, (q_memory, k_memory, v_memory, y_memory))
        first = lax.axis_index("blocks")
        mine = lax.div(units - 1 - first, grid) + 1
        first_group, first_position = start_ref[0], start_ref[1]
        left = lax.div(n - first_position + ROWS - 1, ROWS)
        tiles_here = lax.min(jnp.int32(row_tiles), left)
        steps = mine * tiles_here

        def held(step):
            # One slot is slot 0, but a compiler that knows it computes the address of every tile
            # once and for all, and has no registers left.
            return [x.at(lax.shift_right_logical(step, 30)) for x in single]

        def place(unit):
            at = first + unit * grid
            return lax.div(at, blocks), lax.rem(at, blocks)

        def load_keys(unit):
            head, block = place(unit)
            group = first_group + head
            index = (lax.div(group, each), block, pl.ds(block * 0, keys), lax.rem(group, each))
            for ref, to in zip((k_ref, v_ref), held(unit)[:2], strict=True):
                fetch(ref, index, to, loaded)

        def load_queries(step):
            head, block = place(lax.div(step, tiles_here))
            row = first_position + lax.rem(step, tiles_here) * ROWS
            slot = lax.rem(step, AHEAD)
            index = (first_group + head, lax.rem(block, m), pl.ds(row, ROWS))
            fetch(q_ref, index, queries.at(slot), q_loaded.at[slot])

        load_keys(first * 0)
        for step in range(AHEAD):

            @pl.when(step < steps)
            def _(step=step):
                load_queries(first * 0 + step)

        @pl.loop(0, steps)
        def _(step):
            unit, tile = lax.div(step, tiles_here), lax.rem(step, tiles_here)
            head, block = place(unit)
            rows = queries.at(lax.rem(step, AHEAD))
            k_tiles, v_tiles, y_tiles = held(step)

            @pl.when(tile == 0)
            def _():
                plgpu.barrier_wait(loaded)

            plgpu.barrier_wait(q_loaded.at[lax.rem(step, AHEAD)])
            x = dot_transposed(rows, k_tiles)
            if keys > b:
                x = jnp.where(column_numbers(x.shape) < b, x, -jnp.inf)
            top = x.max(axis=1) * factor
            p = jnp.exp2(x * factor - by_row(top, x.shape))
            total = p.sum(axis=1)
            share = 1.0 / total
            weights = p.astype(k.dtype)
            sums = add_dot([], weights, [k_tiles])
            gain = by_row(share * scale, (ROWS, panel))
            al = [(x * gain).astype(k.dtype) for x in sums]
            bias = top + jnp.log(total) * LOG2E - _row_dots(rows, al) * LOG2E
            to = pl.ds(tile * ROWS, ROWS)

            def write_al():  # over the queries, which nobody needs any more
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                store(al, rows)
                line[...] = bias
                plgpu.commit_smem()
                send(rows, averages_ref, (head, block, to))
                plgpu.copy_smem_to_gmem(line, bias_ref.at[head, block, to], commit_group=False)
                plgpu.commit_smem_to_gmem_group()

            sums = add_dot([], weights, [v_tiles], then=write_al)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            gain = by_row(share, (ROWS, panel))
            store([x * gain for x in sums], y_tiles)
            plgpu.commit_smem()
            send(y_tiles, averages_ref, (head, block, to), d)
            plgpu.commit_smem_to_gmem_group()

            # Every thread has passed a barrier since it last used the keys.
            @pl.when((tile == tiles_here - 1) & (unit + 1 < mine))
            def _():
                load_keys(unit + 1)

            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            @pl.when(step + AHEAD < steps)
            def _():
                load_queries(step + AHEAD)

        plgpu.wait_smem_to_gmem(0)

    panels = (d + e) // panel
    return launch(
        body,
        name=NAME,
        grid=(grid,),
        grid_names=("blocks",),
        threads=1,
        out_type=(
            jax.ShapeDtypeStruct((heads, blocks, positions, d + e), k.dtype),
            jax.ShapeDtypeStruct((heads, blocks, positions), jnp.float32),
        ),
        scratch=(
            tile_memory((AHEAD,), ROWS, d, q.dtype, panel),
            tile_memory((1,), keys, d, k.dtype, panel),
            tile_memory((1,), keys, e, v.dtype, panel),
            tile_memory((1,), ROWS, e, v.dtype, panel),
            line_memory((ROWS,)),
            plgpu.Barrier(num_arrivals=d // panel, num_barriers=AHEAD),
            plgpu.Barrier(num_arrivals=panels),
        ),
        flops=2 * units * positions * b * (2 * d + e),
        moved=heads * (2 * m * positions * d + blocks * (d + e) * 2 * (b + positions)),
    )(start, q, k, v)


def _row_dots(a: Tiles, b: list[Float[Array, "n w"]]) -> Float[Array, "n"]:
    """The product of each row of a matrix in shared memory with one in registers."""
    total = jnp.zeros((), jnp.float32)
    for i, x in enumerate(b):
        total = total + (load_panel(a, i).astype(jnp.float32) * x.astype(jnp.float32)).sum(axis=1)
    return total
