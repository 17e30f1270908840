"""The L step of up to 128 frames on a Hopper GPU: every position's attention in shared memory.

    x[l,k] = (gain q[l] . aL[k] + bias[k]) log2 e           (bias = -cL, masked keys very low)
    last:    out[l] = sum_k 2^(x - top[l]) Y[k] / l[l] ;  lse[l] = (top[l] + log2 l[l]) ln 2
    middle:  L[l,k] = 2^(x[l,k] - lse2[l]) ;  qt[k] = sum_l L q[l] / max(sum_l L, floor)

It is bound by memory: each of q, aL and Y is read once and each result written once. A block of
threads is one warpgroup that walks over positions. While it computes one, the copies of the next
are under way, and so is the copy of the last result. Neighbouring blocks have neighbouring heads
of a position, which lie side by side in memory.

A position's rows are a frame's tokens apart in memory, where all arrays lie as a caller's do:
`[entries, frames, n, heads, d]`, whatever axes their names give them here. Hopper's copy engine
gathers the rows, fills those that are not there with zeros, and leaves them out when it writes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from ..gpu import mode
from ..gpu.call import (
    LINE,
    LN2,
    LOG2E,
    LOWEST,
    PANEL,
    ROWS,
    TINY_SUM,
    by_column,
    by_row,
    column_numbers,
    dot,
    dot_transposed,
    fetch,
    launch,
    line_memory,
    load_per_column,
    load_per_row,
    load_square,
    round_up,
    send,
    square_memory,
    store,
    tile_memory,
    tiles,
)
from ..gpu.order import groups_first, rows_first
from ..numerics import MASKED

LONGEST = 128

# wgmma takes the rows of a right side that is not transposed in multiples of its panels' width:
# half panels pad up to 32 key blocks less.
HALF_PANEL = 32

# The columns of a product are a multiple of this.
COLUMNS = 8

# Shared memory that is left for the compiler's own use, in bytes.
SPARE = 4096


@dataclasses.dataclass(frozen=True)
class Plan:
    """How positions are spread over the GPU.

    Args:
        stages: positions whose arrays a block of threads holds or awaits.
        results: tiles of results on their way out.
        per_processor: blocks of threads that share a multiprocessor.
    """

    stages: int
    results: int
    per_processor: int


def plan(stage: int, result: int, least: int = 2) -> Plan:
    """The most copies under way that fit, `stage` and `result` bytes each.

    Several blocks of threads a multiprocessor hide each other's products and exponentials; where
    they would have fewer than `least` stages, one block with more stages does.
    """
    for per_processor, most in ((4, 2), (2, 4), (1, 4)):
        memory = mode.SHARED_MEMORY // per_processor - SPARE
        for results in (2, 1):
            stages = min(most, (memory - results * result) // stage)
            if stages >= least:
                return Plan(stages, results, per_processor)
    raise NotImplementedError(f"an L step of {stage} bytes a position does not fit shared memory")


def last(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    bias: Float[Array, "g M n"],
    y: Float[Array, "g M n e"],
    left_out: Bool[Array, "g m M"] | None = None,
    gain: float = 1.0,
    entries: int = 1,
) -> tuple[Float[Array, "g m n e"], Float[Array, "g m n"]]:
    """`(out, lse)`: out in the dtype of `y`, lse in float32; zeros and -inf without any key.

    Pairs of a query and a key block may be `left_out`, at all positions alike. The groups are the
    heads of `entries` entries of a batch.
    """
    (g, m, n, d), blocks, e = q.shape, al.shape[1], y.shape[-1]
    heads, factor = g // entries, gain * LOG2E
    panel = HALF_PANEL if blocks <= HALF_PANEL else PANEL
    rows, keys = round_up(m, ROWS), round_up(blocks, panel)
    width = round_up(m, 4)
    line = round_up(keys, LINE)
    pairs = [] if left_out is None else [_pairs(left_out, rows, keys, q.dtype)]
    way = plan(
        2 * (rows * d + keys * (d + e) + len(pairs) * rows * keys) + 4 * line,
        2 * ROWS * e + 4 * ROWS,
        least=1 if pairs else 2,
    )

    def body(q_ref, al_ref, y_ref, bias_ref, *rest: Any):
        refs = list(rest)
        pairs_ref: Any = refs.pop(0) if pairs else None
        out_ref, lse_ref, q_tiles, al_tiles, y_tiles, bias_lines, out_tiles, lse_lines = refs[:8]
        pairs_lines: Any = refs[8] if pairs else None
        loaded = refs[-1]
        q_tiles, al_tiles, y_tiles, out_tiles = map(tiles, (q_tiles, al_tiles, y_tiles, out_tiles))

        def load(group, position, slot):
            barrier = loaded.at[slot]
            for ref, to, length in (
                (q_ref, q_tiles, rows), (al_ref, al_tiles, keys), (y_ref, y_tiles, keys),
            ):  # fmt: skip
                fetch(ref, rows_of(group, position, 0, length, heads), to.at(slot), barrier)
            plgpu.copy_gmem_to_smem(bias_ref.at[group, position], bias_lines.at[slot], barrier)
            if pairs:
                plgpu.copy_gmem_to_smem(pairs_ref.at[group], pairs_lines.at[slot], barrier)

        def compute(step, group, position, slot):
            bias = load_per_column(bias_lines.at[slot, pl.ds(0, keys)])
            for tile in range(rows // ROWS):
                queries = q_tiles.at(slot).rows(tile * ROWS, ROWS)
                x = dot_transposed(queries, al_tiles.at(slot))
                x = x * factor + by_column(bias, x.shape)
                if pairs:
                    out = load_square(pairs_lines.at[slot, pl.ds(tile * ROWS, ROWS)])
                    x = x + out.astype(jnp.float32) * -MASKED
                top = jnp.maximum(x.max(axis=1), LOWEST)
                p = jnp.exp2(x - by_row(top, x.shape))
                total = p.sum(axis=1)
                share = 1.0 / jnp.maximum(total, TINY_SUM)
                out = dot(p.astype(y.dtype), y_tiles.at(slot))

                at = lax.rem(step * (rows // ROWS) + tile, way.results)
                plgpu.wait_smem_to_gmem(way.results - 1, wait_read_only=True)
                store([x * by_row(share, x.shape) for x in out], out_tiles.at(at))
                lse_lines[at] = top * LN2 + jnp.log(total)
                plgpu.commit_smem()
                rows_there = rows_of(group, position, tile * ROWS, ROWS, heads)
                send(out_tiles.at(at), out_ref, rows_there)
                there = min(ROWS, width - tile * ROWS)
                to = lse_ref.at[group, position, pl.ds(tile * ROWS, there)]
                plgpu.copy_smem_to_gmem(lse_lines.at[at, pl.ds(0, there)], to)

        walk(load, compute, loaded, g, n, way, heads)

    out, lse = launch(
        body,
        name="l_step_last",
        grid=(blocks_of_threads(g * n, way),),
        grid_names=("blocks",),
        threads=1,
        out_type=(
            jax.ShapeDtypeStruct((entries, stored(m), n, heads, e), y.dtype),
            jax.ShapeDtypeStruct((g, n, width), jnp.float32),
        ),
        scratch=(
            tile_memory((way.stages,), rows, d, q.dtype),
            tile_memory((way.stages,), keys, d, al.dtype),
            tile_memory((way.stages,), keys, e, y.dtype, panel),
            line_memory((way.stages, line)),
            tile_memory((way.results,), ROWS, e, y.dtype, panel),
            line_memory((way.results, ROWS)),
            *[square_memory((way.stages, rows, keys), q.dtype, panel) for _ in pairs],
            plgpu.Barrier(
                num_arrivals=2 * d // PANEL + e // panel + 1 + len(pairs), num_barriers=way.stages
            ),
        ),
        flops=2 * g * n * m * blocks * (d + e),
        moved=2 * g * n * (m * (d + e) + blocks * (d + e)) + 4 * g * n * (line + width),
    )(*(rows_first(x, entries) for x in (q, al, y)), position_lines(bias * LOG2E, line), *pairs)
    return groups_first(out[:, :m]), lse[..., :m].swapaxes(1, 2)


def middle(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    bias: Float[Array, "g M n"],
    queries: Bool[Array, "g m n"] | None,
    *,
    floor: float,
    gain: float = 1.0,
    entries: int = 1,
) -> Float[Array, "g M n d"]:
    """The mean queries, in the dtype of `q`; the groups are the heads of `entries` of a batch.

    The scores are made twice: with the queries as rows for each row's log-sum-exp, and with the
    key blocks as rows, so that the weights are at once the left side of their product with q.
    """
    (g, m, n, d), blocks = q.shape, al.shape[1]
    heads, factor = g // entries, gain * LOG2E
    rows, keys = round_up(m, ROWS), round_up(blocks, ROWS)
    inner = round_up(blocks, COLUMNS)
    key_line, row_line = round_up(keys, LINE), round_up(rows, LINE)
    lines = 4 * (key_line + (0 if queries is None else row_line))
    way = plan(2 * d * (rows + keys) + lines, 2 * ROWS * d)
    # A row that is no query has a log-sum-exp above every score: no weight.
    barred = [] if queries is None else [jnp.where(queries, 0.0, -MASKED)]
    extra = [position_lines(x, row_line) for x in barred]

    def body(q_ref, al_ref, bias_ref, *rest: Any):
        refs = list(rest)
        barred_ref: Any = refs.pop(0) if extra else None
        qt_ref, q_tiles, al_tiles, bias_lines = refs[:4]
        barred_lines: Any = refs[4] if extra else None
        qt_tiles, lse_line, loaded = refs[-3:]
        q_tiles, al_tiles, qt_tiles = map(tiles, (q_tiles, al_tiles, qt_tiles))

        def load(group, position, slot):
            barrier = loaded.at[slot]
            for ref, to, length in ((q_ref, q_tiles, rows), (al_ref, al_tiles, keys)):
                fetch(ref, rows_of(group, position, 0, length, heads), to.at(slot), barrier)
            plgpu.copy_gmem_to_smem(bias_ref.at[group, position], bias_lines.at[slot], barrier)
            if extra:
                source = barred_ref.at[group, position]
                plgpu.copy_gmem_to_smem(source, barred_lines.at[slot], barrier)

        def compute(step, group, position, slot):
            bias = load_per_column(bias_lines.at[slot, pl.ds(0, inner)])
            for start in range(0, rows, ROWS):
                queries = q_tiles.at(slot).rows(start, ROWS)
                x = dot_transposed(queries, al_tiles.at(slot).rows(0, inner))
                x = x * factor + by_column(bias, x.shape)
                top = jnp.maximum(x.max(axis=1), LOWEST)
                total = jnp.exp2(x - by_row(top, x.shape)).sum(axis=1)
                lse = top + jnp.log(jnp.maximum(total, TINY_SUM)) * LOG2E
                if extra:
                    lse = lse + load_per_row(barred_lines.at[slot, pl.ds(start, ROWS)])
                lse_line[pl.ds(start, ROWS)] = lse
            lse = load_per_column(lse_line)
            tokens = q_tiles.at(slot)
            for tile in range(keys // ROWS):
                x = dot_transposed(al_tiles.at(slot).rows(tile * ROWS, ROWS), tokens)
                bias = load_per_row(bias_lines.at[slot, pl.ds(tile * ROWS, ROWS)])
                x = x * factor + by_row(bias, x.shape)
                weights = jnp.exp2(x - by_column(lse, x.shape))
                if rows != m:
                    weights = jnp.where(column_numbers(x.shape) < m, weights, 0.0)
                mass = weights.sum(axis=1)
                share = 1.0 / jnp.maximum(mass, floor)
                qt = dot(weights.astype(q.dtype), tokens)

                at = lax.rem(step * (keys // ROWS) + tile, way.results)
                plgpu.wait_smem_to_gmem(way.results - 1, wait_read_only=True)
                store([x * by_row(share, x.shape) for x in qt], qt_tiles.at(at))
                plgpu.commit_smem()
                rows_there = rows_of(group, position, tile * ROWS, ROWS, heads)
                send(qt_tiles.at(at), qt_ref, rows_there)
                plgpu.commit_smem_to_gmem_group()

        walk(load, compute, loaded, g, n, way, heads)

    qt = launch(
        body,
        name="l_step_middle",
        grid=(blocks_of_threads(g * n, way),),
        grid_names=("blocks",),
        threads=1,
        out_type=jax.ShapeDtypeStruct((entries, stored(blocks), n, heads, d), q.dtype),
        scratch=(
            tile_memory((way.stages,), rows, d, q.dtype),
            tile_memory((way.stages,), keys, d, al.dtype),
            line_memory((way.stages, key_line)),
            *[line_memory((way.stages, row_line)) for _ in extra],
            tile_memory((way.results,), ROWS, d, q.dtype),
            line_memory((rows,)),
            plgpu.Barrier(num_arrivals=2 * d // PANEL + 1 + len(extra), num_barriers=way.stages),
        ),
        flops=4 * g * n * m * blocks * d,
        moved=2 * g * n * d * (m + 2 * blocks) + g * n * lines,
    )(*(rows_first(x, entries) for x in (q, al)), position_lines(bias * LOG2E, key_line), *extra)
    return groups_first(qt[:, :blocks])


def _pairs(
    left_out: Bool[Array, "g m M"], rows: int, keys: int, dtype: Any
) -> Float[Array, "g rows keys"]:
    """-1 for each pair that is left out, else 0."""
    _, m, blocks = left_out.shape
    return -jnp.pad(left_out, ((0, 0), (0, rows - m), (0, keys - blocks))).astype(dtype)


def walk(
    load: Callable[..., None],
    compute: Callable[..., None],
    loaded: Any,
    g: int,
    n: int,
    way: Plan,
    heads: int = 1,
) -> None:
    """A warpgroup's walk over its positions, with the copies of `way.stages` of them under way.

    `load(group, position, slot)` starts the copies that arrive at the barrier `loaded[slot]`;
    `compute(step, group, position, slot)` uses what they brought, and is done with it when every
    thread has passed its last barrier. The `heads` groups of an entry are neighbours at a position.
    """
    blocks = blocks_of_threads(g * n, way)
    first = lax.axis_index("blocks")
    mine = lax.div(g * n - 1 - first, blocks) + 1

    def place(step):
        at = first + step * blocks
        entry, at = lax.div(at, n * heads), lax.rem(at, n * heads)
        return entry * heads + lax.rem(at, heads), lax.div(at, heads)

    for slot in range(way.stages):

        @pl.when(slot < mine)
        def _(slot=slot):
            load(*place(slot), slot)

    @pl.loop(0, mine)
    def _(step):
        # One slot is slot 0, but a compiler that knows it computes the address of every tile of a
        # position once and for all, and has no registers left.
        slot = lax.rem(step, way.stages) if way.stages > 1 else lax.shift_right_logical(step, 30)
        plgpu.barrier_wait(loaded.at[slot])
        compute(step, *place(step), slot)

        @pl.when(step + way.stages < mine)
        def _():
            load(*place(step + way.stages), slot)

    plgpu.wait_smem_to_gmem(0)


def rows_of(
    group: Any, position: Any, start: int, count: int, heads: int | None = None
) -> tuple[Any, ...]:
    """The index of rows of a position, which may pass the end of the array.

    `[groups, frames, n]` without `heads`, else `[entries, frames, n, heads]`.
    """
    rows = pl.ds(position * 0 + start, count)
    if heads is None:
        return group, rows, position
    return lax.div(group, heads), rows, position, lax.rem(group, heads)


def blocks_of_threads(positions: int, way: Plan) -> int:
    """Blocks of threads: as many as run at once."""
    return min(positions, mode.multiprocessors() * way.per_processor)


def stored(length: int) -> int:
    """Rows of a result. The interpreter, unlike the copy engine, cannot leave out rows."""
    return length if mode.interpreting() is None else round_up(length, ROWS)


def position_lines(
    x: Float[Array, "g k n"], length: int, beyond: float = MASKED
) -> Float[Array, "g n length"]:
    """A line of `length` for each position; `beyond` the end of the array."""
    x = x.swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])), constant_values=beyond)
