"""The gradients of the L step of 65 to 128 frames on a Hopper GPU.

They are those of `gpu_backward.py`, where a warpgroup makes the scores twice, once for each of the
two sides that a product needs them on. For this many frames it has too few registers for that and
one position has twice the work, so here two warpgroups share a position, each with 64 queries and
64 key blocks, and make the scores once:

    each for its queries      P = softmax_k x, dP, df, with the key blocks in the columns
    over shared memory        P^T, then df^T, turned as they are written
    each for its key blocks   dY = P^T dout, daL = df^T q, dcL = -rows of df^T

The arrays of a position of 128 frames take 128 KB of the 227 KB, so two positions do not fit.
Instead the copies of the next position's arrays start as soon as the last product with this one's
is done, and results leave from the memory of arrays that are no longer needed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from ..gpu import mode
from ..gpu.call import (
    LOG2E,
    LOWEST,
    PANEL,
    ROWS,
    TINY_SUM,
    Tiles,
    by_column,
    by_row,
    dot_transposed,
    fetch,
    launch,
    line_memory,
    load_panel,
    load_per_column,
    load_per_row,
    send,
    store,
    tile_memory,
    tiles,
)
from ..gpu.order import groups_first, rows_first
from ..gpu.turned import products, store_turned
from .gpu_forward import position_lines, rows_of

# Warpgroups of a position, each with `ROWS` queries and `ROWS` key blocks.
WORKERS = 2
LONGEST = WORKERS * ROWS

# Queries of the next position are copied while this one's are used.
QUERY_SLOTS = 2


def last_backward(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    bias: Float[Array, "g M n"],
    y: Float[Array, "g M n e"],
    dout: Float[Array, "g m n e"],
    dlse: Float[Array, "g m n"],
    *,
    gain: float = 1.0,
    entries: int = 1,
) -> tuple[Array, Array, Array, Array]:
    """`(dq, daL, dcL, dY)` in the dtypes of q, aL and Y; dcL in float32.

    The groups are the heads of `entries` entries of a batch.
    """
    (g, m, n, d), blocks, e = q.shape, al.shape[1], y.shape[-1]
    heads, widest = g // entries, max(d, e)

    def body(
        q_ref, al_ref, y_ref, dout_ref, bias_ref, dlse_ref, dq_ref, dal_ref, dy_ref, dcl_ref,
        q_memory, al_memory, y_memory, dout_memory, turned_memory, bias_line, dlse_line, dcl_lines,
        q_loaded, al_loaded, values_loaded, together,
    ):  # fmt: skip
        q_slots, *slots, turned_slots = map(
            tiles, (q_memory, al_memory, y_memory, dout_memory, turned_memory)
        )
        walk = Walk(g, n, heads)

        def load_q(step):
            slot = lax.rem(step, QUERY_SLOTS)
            fetch(
                q_ref, walk.rows(walk.place(step), 0, LONGEST), q_slots.at(slot), q_loaded.at[slot]
            )

        def load_al(step):
            place = walk.place(step)
            fetch(al_ref, walk.rows(place, 0, LONGEST), slots[0].at(0), al_loaded)
            plgpu.copy_gmem_to_smem(bias_ref.at[place], bias_line, al_loaded)

        def load_values(step):
            place = walk.place(step)
            for ref, to in zip((y_ref, dout_ref), slots[1:], strict=True):
                to = to.at(0).first_panels(e // PANEL)
                fetch(ref, walk.rows(place, 0, LONGEST), to, values_loaded)
            plgpu.copy_gmem_to_smem(dlse_ref.at[place], dlse_line, values_loaded)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            load_q(0)
            load_al(0)
            load_values(0)
            pl.when(walk.steps > 1)(lambda: load_q(1))

        @pl.loop(0, walk.steps)
        def _(step):
            slot = lax.rem(step, QUERY_SLOTS)
            zero = hidden_zero(step)
            mine = Mine(lax.axis_index("warpgroup") + zero)
            q_here = q_slots.at(slot)
            al_tiles, y_tiles, memory = (x.at(zero) for x in slots)
            dout_tiles, dq_tiles = (memory.first_panels(x // PANEL) for x in (e, d))
            turned = turned_slots.at(zero)
            plgpu.barrier_wait(q_loaded.at[slot])
            plgpu.barrier_wait(al_loaded)
            x = dot_transposed(mine.rows(q_here), al_tiles)
            x = x * (gain * LOG2E) + by_column(load_per_column(bias_line), x.shape)
            top = jnp.maximum(x.max(axis=1), LOWEST)
            p = jnp.exp2(x - by_row(top, x.shape))
            p = p * by_row(1.0 / jnp.maximum(p.sum(axis=1), TINY_SUM), x.shape)
            plgpu.barrier_wait(values_loaded)
            dp = dot_transposed(mine.rows(dout_tiles), y_tiles)
            shift = (p * dp).sum(axis=1) - load_per_row(mine.line(dlse_line))
            df = (gain * p * (dp - by_row(shift, p.shape))).astype(q.dtype)
            p, df = lax.optimization_barrier((p.astype(y.dtype), df))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store_turned(p, turned.at(mine.worker))
            plgpu.commit_smem()
            meet(together)

            dy, dq = products(mine.turned_terms(turned, dout_tiles), [(df, al_tiles)])
            meet(together)

            @pl.when((lax.axis_index("warpgroup") == 0) & (step + 1 < walk.steps))
            def _():
                load_al(step + 1)

            store_turned(df, turned.at(mine.worker))
            store(dy, mine.rows(y_tiles))
            store(dq, mine.rows(dq_tiles))
            plgpu.commit_smem()
            index = walk.rows(walk.place(step), mine.start, ROWS)
            send(mine.rows(y_tiles), dy_ref, index)
            send(mine.rows(dq_tiles), dq_ref, index)
            plgpu.commit_smem_to_gmem_group()
            meet(together)

            dcl_lines[mine.worker] = mine.minus_sums(turned) / gain
            (dal,) = products(mine.turned_terms(turned, q_here))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            meet(together)

            @pl.when(lax.axis_index("warpgroup") == 0)
            def _():
                pl.when(step + 1 < walk.steps)(lambda: load_values(step + 1))
                pl.when(step + 2 < walk.steps)(lambda: load_q(step + 2))

            place = walk.place(step)
            mine.send_turned(dal, turned, dal_ref, walk.rows(place, mine.start, ROWS))
            mine.send_line(dcl_lines, dcl_ref, place)

        plgpu.wait_smem_to_gmem(0)

    dq, dal, dy, dcl = launch(
        body,
        name="l_step_last_backward_long",
        grid=(Walk(g, n, heads).blocks,),
        grid_names=("blocks",),
        threads=WORKERS,
        out_type=(
            jax.ShapeDtypeStruct((entries, stored(m), n, heads, d), q.dtype),
            jax.ShapeDtypeStruct((entries, stored(blocks), n, heads, d), al.dtype),
            jax.ShapeDtypeStruct((entries, stored(blocks), n, heads, e), y.dtype),
            jax.ShapeDtypeStruct((g, n, LONGEST), jnp.float32),
        ),
        scratch=(
            tile_memory((QUERY_SLOTS,), LONGEST, d, q.dtype),
            tile_memory((1,), LONGEST, d, q.dtype),
            tile_memory((1,), LONGEST, e, q.dtype),
            tile_memory((1,), LONGEST, widest, q.dtype),
            tile_memory((1, WORKERS), LONGEST, ROWS, q.dtype),
            line_memory((LONGEST,)),
            line_memory((LONGEST,)),
            line_memory((WORKERS, ROWS)),
            plgpu.Barrier(num_arrivals=d // PANEL, num_barriers=QUERY_SLOTS),
            plgpu.Barrier(num_arrivals=d // PANEL + 1),
            plgpu.Barrier(num_arrivals=2 * e // PANEL + 1),
            plgpu.Barrier(num_arrivals=WORKERS),
        ),
        flops=2 * g * n * m * blocks * (3 * d + 2 * e),
        moved=2 * g * n * (2 * m * d + m * e + 2 * blocks * (d + e)),
    )(
        *(rows_first(x, entries) for x in (q, al, y, dout)),
        position_lines(bias * LOG2E, LONGEST), position_lines(dlse, LONGEST, beyond=0.0),
    )  # fmt: skip
    dq, dal, dy = map(groups_first, (dq[:, :m], dal[:, :blocks], dy[:, :blocks]))
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
    heads = g // entries
    if queries is None:
        queries = jnp.ones((g, m, n), bool)
    # Rows that are no queries, and those beyond the array, weigh nothing.
    kept = position_lines(queries.astype(jnp.float32), LONGEST, beyond=0.0)

    def body(
        q_ref, al_ref, dqt_ref, bias_ref, kept_ref, dq_ref, dal_ref, dcl_ref,
        q_memory, al_memory, dqt_memory, turned_memory, bias_lines, kept_lines, mass_line,
        dcl_lines, loaded, dqt_loaded, together,
    ):  # fmt: skip
        q_slots, al_slots, ds_slots, turned_slots = map(
            tiles, (q_memory, al_memory, dqt_memory, turned_memory)
        )
        walk = Walk(g, n, heads)

        def load(step):
            place, slot = walk.place(step), lax.rem(step, QUERY_SLOTS)
            barrier = loaded.at[slot]
            for ref, to in ((q_ref, q_slots), (al_ref, al_slots)):
                fetch(ref, walk.rows(place, 0, LONGEST), to.at(slot), barrier)
            plgpu.copy_gmem_to_smem(bias_ref.at[place], bias_lines.at[slot], barrier)
            plgpu.copy_gmem_to_smem(kept_ref.at[place], kept_lines.at[slot], barrier)

        def load_dqt(step):
            fetch(dqt_ref, walk.rows(walk.place(step), 0, LONGEST), ds_slots.at(0), dqt_loaded)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            load(0)
            load_dqt(0)
            pl.when(walk.steps > 1)(lambda: load(1))

        @pl.loop(0, walk.steps)
        def _(step):
            slot = lax.rem(step, QUERY_SLOTS)
            zero = hidden_zero(step)
            mine = Mine(lax.axis_index("warpgroup") + zero)
            q_here, al_here = q_slots.at(slot), al_slots.at(slot)
            ds_tiles, turned = ds_slots.at(zero), turned_slots.at(zero)
            plgpu.barrier_wait(loaded.at[slot])
            x = dot_transposed(mine.rows(q_here), al_here)
            x = x * (gain * LOG2E) + by_column(load_per_column(bias_lines.at[slot]), x.shape)
            top = jnp.maximum(x.max(axis=1), LOWEST)
            weights = jnp.exp2(x - by_row(top, x.shape))
            kept = load_per_row(mine.line(kept_lines.at[slot]))
            kept = kept / jnp.maximum(weights.sum(axis=1), TINY_SUM)
            weights = (weights * by_row(kept, x.shape)).astype(q.dtype)
            weights = lax.optimization_barrier(weights)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store_turned(weights, turned.at(mine.worker))
            plgpu.commit_smem()
            meet(together)

            (mean,) = products(mine.turned_terms(turned, q_here))
            mass = -mine.minus_sums(turned)
            share = 1.0 / jnp.maximum(mass, floor)
            through = jnp.zeros_like(mass)
            plgpu.barrier_wait(dqt_loaded)
            ds_mine = mine.rows(ds_tiles)
            for panel, x in enumerate(mean):
                ds = load_panel(ds_mine, panel).astype(jnp.float32) * by_row(share, x.shape)
                through = through + (x * ds).sum(axis=1)
                ds_mine.tiled[panel] = ds.astype(q.dtype)
            mine.line(mass_line.at[zero])[...] = jnp.where(mass > floor, -share * through, 0.0)
            plgpu.commit_smem()
            meet(together)

            dl = dot_transposed(mine.rows(q_here), ds_tiles)
            dl = dl + by_column(load_per_column(mass_line.at[zero]), dl.shape)
            df = weights.astype(jnp.float32) * dl
            df, weights = lax.optimization_barrier((df, weights))
            shift = by_row(df.sum(axis=1), df.shape)
            df = (gain * (df - weights.astype(jnp.float32) * shift)).astype(q.dtype)
            df = lax.optimization_barrier(df)
            store_turned(df, turned.at(mine.worker))
            plgpu.commit_smem()
            (dq,) = products([(weights, ds_tiles), (df, al_here)])
            meet(together)

            store(dq, ds_mine)
            plgpu.commit_smem()
            send(ds_mine, dq_ref, walk.rows(walk.place(step), mine.start, ROWS))
            plgpu.commit_smem_to_gmem_group()
            dcl_lines[mine.worker] = mine.minus_sums(turned) / gain
            (dal,) = products(mine.turned_terms(turned, q_here))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            meet(together)

            @pl.when(lax.axis_index("warpgroup") == 0)
            def _():
                pl.when(step + 1 < walk.steps)(lambda: load_dqt(step + 1))
                pl.when(step + 2 < walk.steps)(lambda: load(step + 2))

            place = walk.place(step)
            mine.send_turned(dal, turned, dal_ref, walk.rows(place, mine.start, ROWS))
            mine.send_line(dcl_lines, dcl_ref, place)

        plgpu.wait_smem_to_gmem(0)

    dq, dal, dcl = launch(
        body,
        name="l_step_middle_backward_long",
        grid=(Walk(g, n, heads).blocks,),
        grid_names=("blocks",),
        threads=WORKERS,
        out_type=(
            jax.ShapeDtypeStruct((entries, stored(m), n, heads, d), q.dtype),
            jax.ShapeDtypeStruct((entries, stored(blocks), n, heads, d), al.dtype),
            jax.ShapeDtypeStruct((g, n, LONGEST), jnp.float32),
        ),
        scratch=(
            tile_memory((QUERY_SLOTS,), LONGEST, d, q.dtype),
            tile_memory((QUERY_SLOTS,), LONGEST, d, q.dtype),
            tile_memory((1,), LONGEST, d, q.dtype),
            tile_memory((1, WORKERS), LONGEST, ROWS, q.dtype),
            line_memory((QUERY_SLOTS, LONGEST)),
            line_memory((QUERY_SLOTS, LONGEST)),
            line_memory((1, LONGEST)),
            line_memory((WORKERS, ROWS)),
            plgpu.Barrier(num_arrivals=2 * d // PANEL + 2, num_barriers=QUERY_SLOTS),
            plgpu.Barrier(num_arrivals=d // PANEL),
            plgpu.Barrier(num_arrivals=WORKERS),
        ),
        flops=2 * g * n * m * blocks * 6 * d,
        moved=2 * g * n * d * (2 * m + 3 * blocks),
    )(
        *(rows_first(x, entries) for x in (q, al, dqt)),
        position_lines(bias * LOG2E, LONGEST), kept,
    )  # fmt: skip
    dq, dal = map(groups_first, (dq[:, :m], dal[:, :blocks]))
    return dq, dal, dcl[..., :blocks].swapaxes(1, 2)


class Walk(NamedTuple):
    """A block of threads' walk over positions: neighbouring blocks have neighbours in memory."""

    groups: int
    n: int
    heads: int

    @property
    def blocks(self) -> int:
        """Blocks of threads: one a multiprocessor."""
        return min(self.groups * self.n, mode.multiprocessors())

    @property
    def steps(self) -> Any:
        """Positions of this block."""
        return lax.div(self.groups * self.n - 1 - lax.axis_index("blocks"), self.blocks) + 1

    def place(self, step: Any) -> tuple[Any, Any]:
        """Group and position of a step; the heads of an entry are neighbours at a position."""
        at = lax.axis_index("blocks") + step * self.blocks
        whole = self.n * self.heads
        entry, at = lax.div(at, whole), lax.rem(at, whole)
        return entry * self.heads + lax.rem(at, self.heads), lax.div(at, self.heads)

    def rows(self, place: tuple[Any, Any], start: Any, count: int) -> tuple[Any, ...]:
        """The index of rows of a position, which may pass the end of the array."""
        return rows_of(*place, start, count, self.heads)


class Mine(NamedTuple):
    """A warpgroup's share of a position: which 64 queries and which 64 key blocks."""

    worker: Any

    @property
    def start(self) -> Any:
        """Its first row."""
        return self.worker * ROWS

    def rows(self, matrix: Tiles) -> Tiles:
        """Its rows of a matrix."""
        return matrix.rows(self.start, ROWS)

    def line(self, line: Any) -> Any:
        """Its part of a line."""
        return line.at[pl.ds(self.start, ROWS)]

    def turned_terms(self, turned: Tiles, right: Tiles) -> list[tuple[Any, Tiles]]:
        """The terms of the product of its rows of a turned matrix with `right`."""
        return [
            (self.rows(turned.at(half)).tiled.at[0], right.rows(half * ROWS, ROWS))
            for half in range(WORKERS)
        ]

    def minus_sums(self, turned: Tiles) -> Float[Array, "64"]:
        """Minus the sum of each of its rows of a turned matrix."""
        halves = [load_panel(self.rows(turned.at(half)), 0) for half in range(WORKERS)]
        first, second = (x.astype(jnp.float32).sum(axis=1) for x in halves)
        return -(first + second)

    def send_turned(self, x: list[Array], turned: Tiles, to: Any, index: tuple[Any, ...]) -> None:
        """Sends its rows of a result from its own part of the turned matrix's memory."""
        memory = turned.at(self.worker)
        for panel, part in enumerate(x):
            store([part], memory.rows(panel * ROWS, ROWS))
        plgpu.commit_smem()
        for panel in range(len(x)):
            source = memory.rows(panel * ROWS, ROWS)
            send(source, to, index, panel * PANEL)

    def send_line(self, lines: Any, to: Any, place: tuple[Any, Any]) -> None:
        """Sends its part of a line, and commits what was sent before it."""
        there = to.at[(*place, pl.ds(self.start, ROWS))]
        plgpu.copy_smem_to_gmem(lines.at[self.worker], there, commit_group=False)
        plgpu.commit_smem_to_gmem_group()


def hidden_zero(step: Any) -> Any:
    """Zero, which the compiler does not know.

    What is indexed with it has its addresses computed where they are used. A compiler that knows
    them computes the address of every tile before the loop, and has no registers left.
    """
    return lax.shift_right_logical(step, 30)


def meet(barrier: Any) -> None:
    """Waits until both warpgroups are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def stored(length: int) -> int:
    """Rows of a result. The interpreter, unlike the copy engine, cannot leave out rows."""
    return length if mode.interpreting() is None else LONGEST
