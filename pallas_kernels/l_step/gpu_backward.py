"""The gradients of the L step on a Hopper GPU: a kernel each, everything of a position at once.

    last:    p = softmax_k x ;  dp = dout . Y ;  df = p (dp - sum_k p dp + dlse)
             dq = gain df aL ;  daL = gain df^T q ;  dY = p^T dout ;  dcL = -sum_l df
    middle:  cR, S = sum_l L, sum_l L q ;  dS = dqt / max(cR, floor)
             dcR = -dqt . qt / max(cR, floor) where cR > floor, else 0
             dL = q . dS + dcR ;  df = L (dL - sum_k L dL)
             dq = L dS + gain df aL ;  daL = gain df^T q ;  dcL = -sum_l df

As forward, each input is read once and each gradient written once. The scores are made again,
once with the queries as rows and once with the key blocks as rows: so every product has its left
side in registers as it comes, and nothing is turned in shared memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from ..gpu.call import (
    LINE,
    LOG2E,
    LOWEST,
    NOBODY,
    PANEL,
    ROWS,
    TINY_SUM,
    Tiles,
    add_dot,
    by_column,
    by_row,
    dot,
    dot_transposed,
    fetch,
    launch,
    line_memory,
    load_panel,
    load_per_column,
    load_per_row,
    round_up,
    send,
    store,
    tile_memory,
    tiles,
)
from ..gpu.order import groups_first, rows_first
from ..numerics import MASKED
from .gpu_forward import (
    Plan,
    blocks_of_threads,
    plan,
    position_lines,
    rows_of,
    stored,
    walk,
)


def last_backward(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    bias: Float[Array, "g M n"],
    y: Float[Array, "g M n e"],
    dout: Float[Array, "g m n e"],
    dlse: Float[Array, "g m n"],
    gain: float = 1.0,
    entries: int = 1,
) -> tuple[Array, Array, Array, Array]:
    """`(dq, daL, dcL, dY)` in the dtypes of q, aL and Y; dcL in float32.

    The groups are the heads of `entries` entries of a batch.
    """
    (g, m, n, d), blocks, e = q.shape, al.shape[1], y.shape[-1]
    heads, factor = g // entries, gain * LOG2E
    rows, keys = round_up(m, ROWS), round_up(blocks, ROWS)
    row_line, key_line = round_up(rows, LINE), round_up(keys, LINE)
    width = round_up(blocks, 4)
    widest = max(d, e)
    stage = 2 * (rows + keys) * (d + e) + 4 * (row_line + key_line)
    way = plan(stage, 2 * ROWS * widest + 4 * (2 * rows + ROWS), least=1)

    def body(
        q_ref, al_ref, y_ref, dout_ref, bias_ref, dlse_ref, dq_ref, dal_ref, dy_ref, dcl_ref,
        q_memory, al_memory, y_memory, dout_memory, bias_lines, dlse_lines,
        result_memory, dcl_lines, lse_line, shift_line, loaded,
    ):  # fmt: skip
        q_tiles, al_tiles, y_tiles, dout_tiles, results = map(
            tiles, (q_memory, al_memory, y_memory, dout_memory, result_memory)
        )

        def load(group, position, slot):
            barrier = loaded.at[slot]
            for ref, to, length in (
                (q_ref, q_tiles, rows), (dout_ref, dout_tiles, rows),
                (al_ref, al_tiles, keys), (y_ref, y_tiles, keys),
            ):  # fmt: skip
                fetch(ref, rows_of(group, position, 0, length, heads), to.at(slot), barrier)
            plgpu.copy_gmem_to_smem(bias_ref.at[group, position], bias_lines.at[slot], barrier)
            plgpu.copy_gmem_to_smem(dlse_ref.at[group, position], dlse_lines.at[slot], barrier)

        def compute(step, group, position, slot):
            q_here, al_here, y_here, dout_here = (
                x.at(slot) for x in (q_tiles, al_tiles, y_tiles, dout_tiles)
            )
            out = Results(results, way, step * (rows + 2 * keys) // ROWS)
            bias = load_per_column(bias_lines.at[slot, pl.ds(0, keys)])
            for start in range(0, rows, ROWS):
                these = pl.ds(start, ROWS)
                x = dot_transposed(q_here.rows(start, ROWS), al_here)
                x = x * factor + by_column(bias, x.shape)
                top = jnp.maximum(x.max(axis=1), LOWEST)
                p = jnp.exp2(x - by_row(top, x.shape))
                total = p.sum(axis=1)
                p = p * by_row(1.0 / jnp.maximum(total, TINY_SUM), x.shape)
                dp = dot_transposed(dout_here.rows(start, ROWS), y_here)
                shift = (p * dp).sum(axis=1) - load_per_row(dlse_lines.at[slot, these])
                df = (p * (dp - by_row(shift, p.shape)) * gain).astype(al.dtype)
                df, shift, top, total = lax.optimization_barrier((df, shift, top, total))
                dq = dot(df, al_here)
                lse = top + jnp.log(total) * LOG2E
                lse_line[these] = jnp.where(total > 0.0, lse, NOBODY)
                shift_line[these] = shift
                out.put(dq, dq_ref, rows_of(group, position, start, ROWS, heads))
            for start in range(0, keys, ROWS):
                x = dot_transposed(al_here.rows(start, ROWS), q_here)
                here = load_per_row(bias_lines.at[slot, pl.ds(start, ROWS)])
                x = x * factor + by_row(here, x.shape)
                p = jnp.exp2(x - by_column(load_per_column(lse_line), x.shape))
                dp = dot_transposed(y_here.rows(start, ROWS), dout_here)
                df = p * (dp - by_column(load_per_column(shift_line), p.shape))
                # Rounded at once: the registers of the wide ones are wanted for the results.
                p, df, dcl = lax.optimization_barrier(
                    (p.astype(y.dtype), (df * gain).astype(q.dtype), -df.sum(axis=1))
                )
                dy = dot(p, dout_here)
                out.put(dy, dy_ref, rows_of(group, position, start, ROWS, heads))
                dal = dot(df, q_here)
                there = min(ROWS, width - start)
                to = dcl_ref.at[group, position, pl.ds(start, there)]
                out.put(
                    dal, dal_ref, rows_of(group, position, start, ROWS, heads),
                    (dcl, dcl_lines, to),
                )  # fmt: skip

        walk(load, compute, loaded, g, n, way, heads)

    dq, dal, dy, dcl = launch(
        body,
        name="l_step_last_backward",
        grid=(blocks_of_threads(g * n, way),),
        grid_names=("blocks",),
        threads=1,
        out_type=(
            jax.ShapeDtypeStruct((entries, stored(m), n, heads, d), q.dtype),
            jax.ShapeDtypeStruct((entries, stored(blocks), n, heads, d), al.dtype),
            jax.ShapeDtypeStruct((entries, stored(blocks), n, heads, e), y.dtype),
            jax.ShapeDtypeStruct((g, n, width), jnp.float32),
        ),
        scratch=(
            tile_memory((way.stages,), rows, d, q.dtype),
            tile_memory((way.stages,), keys, d, q.dtype),
            tile_memory((way.stages,), keys, e, q.dtype),
            tile_memory((way.stages,), rows, e, q.dtype),
            line_memory((way.stages, key_line)),
            line_memory((way.stages, row_line)),
            tile_memory((way.results,), ROWS, widest, q.dtype),
            line_memory((way.results, ROWS)),
            line_memory((rows,)),
            line_memory((rows,)),
            plgpu.Barrier(num_arrivals=2 * (d + e) // PANEL + 2, num_barriers=way.stages),
        ),
        flops=2 * g * n * m * blocks * (3 * d + 2 * e),
        moved=2 * g * n * (2 * m * d + m * e + 2 * blocks * (d + e)),
    )(
        *(rows_first(x, entries) for x in (q, al, y, dout)),
        position_lines(bias * LOG2E, key_line), position_lines(dlse, row_line, beyond=0.0),
    )  # fmt: skip
    dq, dal, dy = (
        groups_first(dq[:, :m]),
        groups_first(dal[:, :blocks]),
        groups_first(dy[:, :blocks]),
    )
    return dq, dal, dcl[..., :blocks].swapaxes(1, 2), dy


def middle_backward(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    bias: Float[Array, "g M n"],
    queries: Bool[Array, "g m n"] | None,
    dqt: Float[Array, "g M n d"],
    *,
    floor: float,
    gain: float = 1.0,
    entries: int = 1,
) -> tuple[Array, Array, Array]:
    """`(dq, daL, dcL)` in the dtypes of q and aL; dcL in float32; gain and entries as above."""
    (g, m, n, d), blocks = q.shape, al.shape[1]
    heads, factor = g // entries, gain * LOG2E
    rows, keys = round_up(m, ROWS), round_up(blocks, ROWS)
    row_line, key_line = round_up(rows, LINE), round_up(keys, LINE)
    width = round_up(blocks, 4)
    stage = 2 * d * (rows + 2 * keys) + 4 * (row_line + key_line)
    way = plan(stage, 2 * ROWS * d + 4 * (2 * rows + keys + ROWS), least=1)
    if queries is None:
        queries = jnp.ones((g, m, n), bool)
    barred = position_lines(jnp.where(queries, 0.0, -MASKED), row_line, beyond=-MASKED)

    def body(
        q_ref, al_ref, dqt_ref, bias_ref, barred_ref, dq_ref, dal_ref, dcl_ref,
        q_memory, al_memory, dqt_memory, bias_lines, barred_lines,
        result_memory, dcl_lines, lse_line, shift_line, mass_line, loaded,
    ):  # fmt: skip
        q_tiles, al_tiles, dqt_tiles, results = map(
            tiles, (q_memory, al_memory, dqt_memory, result_memory)
        )

        def load(group, position, slot):
            barrier = loaded.at[slot]
            for ref, to, length in (
                (q_ref, q_tiles, rows), (al_ref, al_tiles, keys), (dqt_ref, dqt_tiles, keys),
            ):  # fmt: skip
                fetch(ref, rows_of(group, position, 0, length, heads), to.at(slot), barrier)
            plgpu.copy_gmem_to_smem(bias_ref.at[group, position], bias_lines.at[slot], barrier)
            plgpu.copy_gmem_to_smem(barred_ref.at[group, position], barred_lines.at[slot], barrier)

        def compute(step, group, position, slot):
            q_here, al_here, ds_here = (x.at(slot) for x in (q_tiles, al_tiles, dqt_tiles))
            out = Results(results, way, step * (rows + keys) // ROWS)

            def scores(start):
                x = dot_transposed(q_here.rows(start, ROWS), al_here)
                bias = load_per_column(bias_lines.at[slot, pl.ds(0, keys)])
                return x * factor + by_column(bias, x.shape)

            def turned_weights(start):
                x = dot_transposed(al_here.rows(start, ROWS), q_here)
                here = load_per_row(bias_lines.at[slot, pl.ds(start, ROWS)])
                lse = load_per_column(lse_line)
                return jnp.exp2(x * factor + by_row(here, x.shape) - by_column(lse, x.shape))

            for start in range(0, rows, ROWS):
                these = pl.ds(start, ROWS)
                x = scores(start)
                top = jnp.maximum(x.max(axis=1), LOWEST)
                total = jnp.exp2(x - by_row(top, x.shape)).sum(axis=1)
                lse = top + jnp.log(jnp.maximum(total, TINY_SUM)) * LOG2E
                lse_line[these] = lse + load_per_row(barred_lines.at[slot, these])

            for start in range(0, keys, ROWS):
                weights = turned_weights(start)
                weights, mass = lax.optimization_barrier(
                    (weights.astype(q.dtype), weights.sum(axis=1))
                )
                share = 1.0 / jnp.maximum(mass, floor)
                mean = dot(weights, q_here)
                dqt_here = ds_here.rows(start, ROWS)
                through = jnp.zeros_like(mass)
                for panel, x in enumerate(mean):
                    ds = load_panel(dqt_here, panel).astype(jnp.float32) * by_row(share, x.shape)
                    through = through + (x * ds).sum(axis=1)
                    dqt_here.tiled[panel] = ds.astype(q.dtype)
                mass_line[pl.ds(start, ROWS)] = jnp.where(mass > floor, -share * through, 0.0)
            plgpu.commit_smem()

            for start in range(0, rows, ROWS):
                these = pl.ds(start, ROWS)
                x = scores(start)
                weights = jnp.exp2(x - by_row(load_per_row(lse_line.at[these]), x.shape))
                dl = dot_transposed(q_here.rows(start, ROWS), ds_here)
                dl = dl + by_column(load_per_column(mass_line), dl.shape)
                shift = (weights * dl).sum(axis=1)
                df = weights * (dl - by_row(shift, dl.shape))
                weights, df, shift = lax.optimization_barrier(
                    (weights.astype(q.dtype), (df * gain).astype(q.dtype), shift)
                )
                dq = add_dot(dot(weights, ds_here), df, [al_here])
                shift_line[these] = shift
                out.put(dq, dq_ref, rows_of(group, position, start, ROWS, heads))

            for start in range(0, keys, ROWS):
                weights = turned_weights(start)
                dl = dot_transposed(ds_here.rows(start, ROWS), q_here)
                dl = dl + by_row(load_per_row(mass_line.at[pl.ds(start, ROWS)]), dl.shape)
                df = weights * (dl - by_column(load_per_column(shift_line), dl.shape))
                df, dcl = lax.optimization_barrier(((df * gain).astype(q.dtype), -df.sum(axis=1)))
                dal = dot(df, q_here)
                there = min(ROWS, width - start)
                to = dcl_ref.at[group, position, pl.ds(start, there)]
                out.put(
                    dal, dal_ref, rows_of(group, position, start, ROWS, heads),
                    (dcl, dcl_lines, to),
                )  # fmt: skip

        walk(load, compute, loaded, g, n, way, heads)

    dq, dal, dcl = launch(
        body,
        name="l_step_middle_backward",
        grid=(blocks_of_threads(g * n, way),),
        grid_names=("blocks",),
        threads=1,
        out_type=(
            jax.ShapeDtypeStruct((entries, stored(m), n, heads, d), q.dtype),
            jax.ShapeDtypeStruct((entries, stored(blocks), n, heads, d), al.dtype),
            jax.ShapeDtypeStruct((g, n, width), jnp.float32),
        ),
        scratch=(
            tile_memory((way.stages,), rows, d, q.dtype),
            tile_memory((way.stages,), keys, d, q.dtype),
            tile_memory((way.stages,), keys, d, q.dtype),
            line_memory((way.stages, key_line)),
            line_memory((way.stages, row_line)),
            tile_memory((way.results,), ROWS, d, q.dtype),
            line_memory((way.results, ROWS)),
            line_memory((rows,)),
            line_memory((rows,)),
            line_memory((keys,)),
            plgpu.Barrier(num_arrivals=3 * d // PANEL + 2, num_barriers=way.stages),
        ),
        flops=2 * g * n * m * blocks * 6 * d,
        moved=2 * g * n * d * (2 * m + 3 * blocks),
    )(
        *(rows_first(x, entries) for x in (q, al, dqt)),
        position_lines(bias * LOG2E, key_line), barred,
    )  # fmt: skip
    dq, dal = groups_first(dq[:, :m]), groups_first(dal[:, :blocks])
    return dq, dal, dcl[..., :blocks].swapaxes(1, 2)


class Results:
    """Tiles of results that leave one after the other through a few slots of shared memory."""

    def __init__(self, slots: Tiles, way: Plan, sent: Any) -> None:
        """`sent`: how many have left before, as a traced number."""
        self._slots, self._way, self._sent = slots, way, sent

    def put(self, x: list[Array], to: Any, index: tuple[Any, ...], line: Any = None) -> None:
        """Sends a product, and with it `(numbers, memory, where to)`: a line of its rows."""
        at = lax.rem(self._sent, self._way.results)
        slot = self._slots.at(at).first_panels(len(x))
        plgpu.wait_smem_to_gmem(self._way.results - 1, wait_read_only=True)
        store(x, slot)
        if line is not None:
            numbers, memory, there = line
            memory[at] = numbers
        plgpu.commit_smem()
        send(slot, to, index)
        if line is not None:
            source = memory.at[at, pl.ds(0, there.shape[0])]
            plgpu.copy_smem_to_gmem(source, there, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        self._sent = self._sent + 1
