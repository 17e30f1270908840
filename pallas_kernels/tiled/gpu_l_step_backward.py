"""The gradients of the L step over thousands of key blocks, on a Hopper GPU.

    p = 2^(x - lse) ;  dp = dout . Y ;  df = p (dp - delta) ,  delta[l] = dout . out - dlse
    dq = df aL ;  daL = df^T q ;  dY = p^T dout ;  dcL = -sum_l df

A block of threads is one warpgroup with one position. It keeps q, dout and the sums of dq, and the
key blocks pass by, 64 at a time. Their scores are made twice, with the queries as rows for dq and
with the key blocks as rows for the rest: so every product has its left side in registers as it
comes. daL and dY are written over aL and Y in shared memory, and leave from there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..gpu import mode
from ..gpu.call import (
    LOG2E,
    NOBODY,
    PANEL,
    ROWS,
    add_dot,
    by_column,
    by_row,
    dot,
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
from ..gpu.order import groups_first, rows_first
from ..numerics import MASKED

NAME = "tiled_l_step_backward"

# Query blocks: their scores, and those of as many key blocks, fill a product.
LONGEST = ROWS

# Key blocks that are copied and multiplied at a time.
KEYS = 64

# Steps that are there or on their way.
STAGES = 2


def l_step_backward(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    y: Float[Array, "g M n e"],
    lse: Float[Array, "g m n"],
    dout: Float[Array, "g m n e"],
    delta: Float[Array, "g m n"],
    *,
    entries: int = 1,
) -> tuple[Array, Array, Array, Array]:
    """`(dq, daL, dcL, dY)` in the dtypes of q, aL and Y; dcL in float32. At most 64 query blocks.

    `lse` is the forward pass's; `delta` is `dout . out - dlse`, in float32. `entries` says of how
    many entries of a batch the groups are the heads; it changes only where arrays lie.
    """
    (g, m, n, d), blocks, e = q.shape, al.shape[1], y.shape[-1]
    heads, steps = g // entries, -(-blocks // KEYS)
    line = steps * KEYS

    def lines(x: Array, length: int, beyond: float) -> Array:
        pad = ((0, 0), (0, length - x.shape[1]), (0, 0))
        return jnp.pad(x.astype(jnp.float32), pad, constant_values=beyond).swapaxes(1, 2)

    def body(
        steps_ref, q_ref, dout_ref, al_ref, y_ref, bias_ref, lse_ref, delta_ref,
        dq_ref, dal_ref, dy_ref, dcl_ref,
        q_memory, dout_memory, al_memory, y_memory, bias_lines, lse_line, delta_line, dcl_line,
        rows_loaded, loaded,
    ):  # fmt: skip
        *single, al_tiles, y_tiles = map(tiles, (q_memory, dout_memory, al_memory, y_memory))
        at = lax.axis_index("blocks")
        head, token = lax.rem(at, heads), lax.div(at, heads)
        entry, position = lax.div(token, n), lax.rem(token, n)
        group = entry * heads + head

        def place(step):
            return entry, pl.ds(step * KEYS, KEYS), position, head

        def load(step, slot):
            barrier = loaded.at[slot]
            fetch(al_ref, place(step), al_tiles.at(slot), barrier)
            fetch(y_ref, place(step), y_tiles.at(slot), barrier)
            source = bias_ref.at[group, position, pl.ds(step * KEYS, KEYS)]
            plgpu.copy_gmem_to_smem(source, bias_lines.at[slot], barrier)

        def held(step):
            # One slot is slot 0, but a compiler that knows it computes the address of every tile
            # once and for all, and has no registers left: nor may it know how many steps there are.
            return [x.at(lax.shift_right_logical(step, 30)) for x in single]

        def visit(step: Any, dq: Any) -> Any:
            slot = lax.rem(step, STAGES)
            queries, douts = held(step)
            plgpu.barrier_wait(loaded.at[slot])
            al_here, y_here, bias = al_tiles.at(slot), y_tiles.at(slot), bias_lines.at[slot]

            x, dp = dots_transposed([(queries, al_here), (douts, y_here)])
            shift = by_column(load_per_column(bias), x.shape) - by_row(
                load_per_row(lse_line), x.shape
            )
            df = jnp.exp2(x * LOG2E + shift) * (dp - by_row(load_per_row(delta_line), x.shape))
            df, dq = lax.optimization_barrier((df.astype(al.dtype), dq))
            dq = add_dot(dq, df, [al_here])

            x, dp = dots_transposed([(al_here, queries), (y_here, douts)])
            shift = by_row(load_per_row(bias), x.shape) - by_column(
                load_per_column(lse_line), x.shape
            )
            p = jnp.exp2(x * LOG2E + shift)
            df = p * (dp - by_column(load_per_column(delta_line), x.shape))
            dcl = -df.sum(axis=1)
            df, p, dcl, dq = lax.optimization_barrier(
                (df.astype(al.dtype), p.astype(y.dtype), dcl, dq)
            )
            # Every thread is done with the slot, and with the line.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(dot(p, douts), y_here)
            store(dot(df, queries), al_here)
            dcl_line[...] = dcl
            plgpu.commit_smem()
            send(al_here, dal_ref, place(step))
            send(y_here, dy_ref, place(step))
            to = dcl_ref.at[group, position, pl.ds(step * KEYS, KEYS)]
            plgpu.copy_smem_to_gmem(dcl_line, to, commit_group=False)
            plgpu.commit_smem_to_gmem_group()

            @pl.when(step + STAGES < steps)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load(step + STAGES, slot)

            return dq

        rows = entry, pl.ds(at * 0, ROWS), position, head
        queries, douts = held(at * 0)
        fetch(q_ref, rows, queries, rows_loaded)
        fetch(dout_ref, rows, douts, rows_loaded)
        plgpu.copy_gmem_to_smem(lse_ref.at[group, position], lse_line, rows_loaded)
        plgpu.copy_gmem_to_smem(delta_ref.at[group, position], delta_line, rows_loaded)
        for step in range(min(STAGES, steps)):
            load(at * 0 + step, step)
        plgpu.barrier_wait(rows_loaded)
        nothing = [full((ROWS, PANEL), 0.0) for _ in range(d // PANEL)]
        dq = lax.fori_loop(0, steps_ref[0], visit, nothing)
        store(dq, queries)
        plgpu.commit_smem()
        send(queries, dq_ref, rows)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    # The interpreter, unlike the copy engine, cannot leave out rows.
    stored = (m, blocks) if mode.interpreting() is None else (ROWS, line)
    dq, dal, dy, dcl = launch(
        body,
        name=NAME,
        grid=(g * n,),
        grid_names=("blocks",),
        threads=1,
        out_type=(
            jax.ShapeDtypeStruct((entries, stored[0], n, heads, d), q.dtype),
            jax.ShapeDtypeStruct((entries, stored[1], n, heads, d), al.dtype),
            jax.ShapeDtypeStruct((entries, stored[1], n, heads, e), y.dtype),
            jax.ShapeDtypeStruct((g, n, line), jnp.float32),
        ),
        scratch=(
            tile_memory((1,), ROWS, d, q.dtype),
            tile_memory((1,), ROWS, e, y.dtype),
            tile_memory((STAGES,), KEYS, d, al.dtype),
            tile_memory((STAGES,), KEYS, e, y.dtype),
            line_memory((STAGES, KEYS)),
            line_memory((ROWS,)),
            line_memory((ROWS,)),
            line_memory((KEYS,)),
            plgpu.Barrier(num_arrivals=(d + e) // PANEL + 2),
            plgpu.Barrier(num_arrivals=(d + e) // PANEL + 1, num_barriers=STAGES),
        ),
        flops=2 * g * n * m * blocks * (3 * d + 2 * e),
        moved=2 * g * n * ((2 * d + e) * m + 2 * (d + e) * blocks),
    )(
        jnp.full((1,), steps, jnp.int32),
        *(rows_first(x, entries) for x in (q, dout.astype(y.dtype), al, y)),
        lines(-LOG2E * cl, line, MASKED), lines(LOG2E * lse, ROWS, NOBODY), lines(delta, ROWS, 0.0),
    )  # fmt: skip
    dq, dal, dy = map(groups_first, (dq, dal, dy))
    return dq[:, :m], dal[:, :blocks], dcl[..., :blocks].swapaxes(1, 2), dy[:, :blocks]
