"""The gradients of `gpu_forward.softmax_rows` on a Hopper GPU: one kernel, keys stationary.

    x = scale q . k ;  p = exp(x - lse) ;  delta = sum_i dout_i . out_i - dlse
    dx = p (sum_i gain_i dout_i . value_i - delta)
    dq = scale dx k ;  dk = scale dx^T q  (+ gain_0 p^T dout_0, where K is the first value)
    dvalue_i = gain_i p^T dout_i

One kernel or two? In units of rows x keys x d, with values `[K | V]`: the scores 1, the gradients
of the weights 2, dq 1, dk 2, dV 1, which is 7. A kernel with rows stationary (dq) and one with keys
stationary (the rest) make the first three units twice, 10 in all, as many as two backward calls of
a library. So it is one kernel. It keeps dk and dV of 128 keys in registers (64 a thread each), and
dq is added up in memory, in float32, by the copy engine: 32 KB for every 64 rows and 128 keys, in
which time the matrix units make 7 x 2.1 million multiplications (3,600 cycles: 9 bytes a cycle and
multiprocessor). The price is that the order of that sum differs from run to run.

Two warpgroups have 64 of the keys each, and a third copies rows ahead of them. Products are started
as soon as what they need is there, and run while the next numbers are computed:

    scores -> | dout . value             | p^T dout               | dq       | dx^T q
              | exponentials of the scores | dx, to shared memory  |          | dq, to memory

dq needs the dx of both warpgroups, which meet there once in a tile of rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from ..gpu import mode
from ..gpu.batching import flat_vmap
from ..gpu.call import (
    LOG2E,
    NOBODY,
    PANEL,
    ROWS,
    by_column,
    fetch,
    full,
    line_memory,
    load_panel,
    load_per_column,
    send,
    store,
    tile_memory,
    tiles,
)
from ..gpu.overlap import (
    launch_adding,
    run_products,
    send_added,
    store_sum,
    sum_memory,
)
from .gpu_forward import WORKERS

# Keys of a block of threads.
KEYS = WORKERS * ROWS

# The widest dk and gradients of values that fit into registers together, in multiples of a key.
WIDEST = 2

# Registers of a thread of either kind: (2 * 232 + 40) * 128 of 65,536. Fewer do not hold what the
# copies need.
WORKER_REGISTERS = 240
COPIER_REGISTERS = 24

# Shared memory that barriers and alignment may need, in bytes.
SPARE = 1024

# Tiles of rows that are there or on their way.
MOST_STAGES = 4


def softmax_rows_backward(
    q: Float[Array, "x y n d"],
    k: Float[Array, "x y s d"],
    values: tuple[Float[Array, "x y s _"], ...],
    outs: tuple[Float[Array, "x y n _"], ...],
    lse: Float[Array, "x y n"],
    douts: tuple[Float[Array, "x y n _"], ...],
    dlse: Float[Array, "x y n"],
    *,
    scale: float,
    gains: tuple[float, ...],
    shared: bool,
    name: str,
    mask: Bool[Array, "x y s"] | None = None,
) -> tuple[Array, Array, tuple[Array, ...]]:
    """`(dq, dk, dvalues)` in the dtypes of q, k and the values; groups are `[x, y]`.

    With `shared`, K stands before `values` as one of them (in `outs`, `douts` and `gains`), and dk
    has both of its terms. In memory arrays lie as `[x, rows, y, dim]`, as they do forward. Keys of
    a false `mask` have no gradient, nor have rows whose log-sum-exp is -inf.

    Raises:
        NotImplementedError: for what `unserved` says.
    """
    if reason := unserved(k, values, scale=scale, gains=gains, shared=shared):
        raise NotImplementedError(reason)
    sources = (k, *values)
    delta = sum(
        jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        for dout, out in zip(douts, outs, strict=True)
    )
    douts = tuple(dout.astype(out.dtype) for dout, out in zip(douts, outs, strict=True))
    if mask is not None:
        # Masked keys are like those beyond the end: zeros, whose own gradients nobody reads.
        sources = tuple(jnp.where(mask[..., None], a, 0) for a in sources)
        lse = jnp.where(jnp.isneginf(lse), NOBODY, lse)
    # Sums of products that begin with these are `x - lse` and what dx is p times, up to a factor.
    arrays = (q, *douts, *sources, lse / -scale, (delta - dlse) / -gains[0])
    run = functools.partial(
        _launch, count=len(douts), scale=scale, gains=gains, shared=shared,
        absent=mask is not None or k.shape[2] % KEYS > 0, name=name,
    )  # fmt: skip
    dq, *of_keys = flat_vmap(run, *arrays)
    if mask is not None:
        of_keys = [jnp.where(mask[..., None], a, 0) for a in of_keys]
    dk, *dvalues = of_keys
    return dq, dk, tuple(dvalues)


def unserved(
    k: Array, values: tuple[Array, ...], *, scale: float, gains: tuple[float, ...], shared: bool
) -> str:
    """Why the kernel can't take these; empty if it can."""
    if not gains:
        return "the GPU kernel of gradients takes no attention without values"
    if scale <= 0 or 0 in gains:
        return (
            "the GPU kernel of gradients takes a scale above zero and no gain of zero, "
            f"got {scale} and {gains}"
        )
    d, columns = k.shape[-1], sum(x.shape[-1] for x in (k, *values))
    if columns > WIDEST * d:
        return (
            f"the GPU kernel of gradients takes keys of {d} and values of up to "
            f"{WIDEST * d} columns together, got {columns}"
        )
    return ""


def _launch(*arrays, count, scale, gains, shared, absent, name):
    (q, *douts), sources = arrays[: 1 + count], arrays[1 + count : -2]
    dtype = q.dtype
    (x, y, n, d), s = q.shape, sources[0].shape[2]
    widths = [a.shape[-1] for a in sources]
    dout_widths = [a.shape[-1] for a in douts]
    # The source that each of `douts` belongs to, and its gain beside that of the first.
    value_of = range(0 if shared else 1, len(sources))
    ratios = [gain / gains[0] for gain in gains]
    # dx is made with a factor that lets both terms of dk be one sum; the rest of it comes later.
    early_factor, late_factor = (scale, gains[0]) if shared else (gains[0], scale)
    # The product of the weights with the first of `douts` is made beside that of dx with q, both
    # for dk, if other products of the weights are there to run while dx is computed.
    late = int(shared and len(sources) > 1)
    # A tile of scores is two products of 64 x 64 columns for each warpgroup where the head is
    # narrow, so that each has a 64 x 64 part of dq in either case.
    parts = KEYS // d
    rows = parts * ROWS
    row_tiles, key_tiles = -(-n // rows), -(-s // KEYS)
    stages = _stages(rows, d, widths, dout_widths, row_tiles)
    panels = [width // PANEL for width in widths]

    def body(*refs):
        q_ref, *dout_refs = refs[: 1 + count]
        source_refs = refs[1 + count :][: len(sources)]
        lines_ref, dq_ref, *refs = refs[1 + count + len(sources) :]
        result_refs, refs = refs[: len(sources)], refs[len(sources) :]
        row_memories, refs = refs[: 1 + count], refs[1 + count :]
        key_memories, refs = refs[: len(sources)], refs[len(sources) :]
        lines, dx_memory, dq_memory, loaded, released, keys_loaded, met = refs
        q_tiles, *dout_tiles = map(tiles, row_memories)
        held = [tiles(memory) for memory in key_memories]
        dx_tiles, dq_tiles = tiles(dx_memory), tiles(dq_memory)
        warpgroup = lax.axis_index("warpgroup")

        def hidden(number):
            # Known, all addresses that depend on it would be kept from tile to tile, in registers
            # that are wanted for the sums.
            return lax.optimization_barrier(jnp.int32(number))

        def key_tile(at):
            return lax.div(at, key_tiles), lax.rem(at, key_tiles)

        def place(group, start, length):
            return lax.div(group, y), pl.ds(start, length), lax.rem(group, y)

        def row_tile(tile, step):
            # Neighbouring blocks start at different rows: they add to different parts of dq.
            return lax.rem(step + lax.div(tile * row_tiles, key_tiles), row_tiles)

        def keys_of(worker):
            return [tile_.rows(worker * ROWS, ROWS) for tile_ in held]

        def meet():
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        @pl.when(warpgroup < WORKERS)
        def _():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            at, mine = lax.axis_index("blocks"), keys_of(hidden(warpgroup))
            plgpu.barrier_wait(keys_loaded)
            # Gains other than the first's: on the values themselves, for all rows at once.
            for i, ratio in zip(value_of, ratios, strict=True):
                if ratio != 1.0:
                    for panel in range(panels[i]):
                        value = load_panel(mine[i], panel).astype(jnp.float32) * ratio
                        mine[i].tiled[panel] = value.astype(dtype)
            plgpu.commit_smem()

            def start(slot):
                """What the scores and the gradients of the weights begin with."""
                found = [
                    load_per_column(lines.at[slot, i, pl.ds(part * ROWS, ROWS)])
                    for i in range(2)
                    for part in range(parts)
                ]
                return [by_column(line, (ROWS, ROWS)) for line in found]

            def visit(step, sums):
                worker = hidden(warpgroup)
                mine = keys_of(worker)
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(loaded.at[slot])
                q_here = q_tiles.at(slot)
                douts_here = [dout.at(slot) for dout in dout_tiles]
                dx_here = dx_tiles.at(lax.rem(step, 2))

                def weigh(running):
                    scores, of_weights = running[:parts], running[parts : 2 * parts]
                    targets = running[2 * parts :]
                    for part in range(parts):
                        for panel in range(d // PANEL):
                            right = q_here.rows(part * ROWS, ROWS).tiled.at[panel]
                            scores[part].add(mine[0].tiled.at[panel], right, turn_b=True)
                    # Of these products, those that may still run when a part of the scores is read.
                    later = 0
                    for part in range(parts):
                        for i, dout in zip(value_of, douts_here, strict=True):
                            for panel in range(panels[i]):
                                right = dout.rows(part * ROWS, ROWS).tiled.at[panel]
                                of_weights[part].add(mine[i].tiled.at[panel], right, turn_b=True)
                                later += 1
                    weights = []
                    for part in range(parts):
                        found = scores[part].read(later) * (scale * LOG2E)
                        if absent:
                            # Absent keys are zeros, and so is what they add to dq, as long as their
                            # weights are finite. No other score is above 0 here.
                            found = jnp.minimum(found, 0.0)
                        weights.append(jnp.exp2(found))
                    # Behind the barrier the rounded ones are all that is kept of the weights.
                    rounded = [lax.optimization_barrier(p.astype(dtype)) for p in weights]
                    later = 0
                    for part in range(parts):
                        for i, dout in list(zip(value_of, douts_here, strict=True))[late:]:
                            for panel in range(panels[i]):
                                right = dout.rows(part * ROWS, ROWS).tiled.at[panel]
                                targets[sum(panels[:i]) + panel].add(rounded[part], right)
                                later += 1
                    dx = []
                    for part, p in enumerate(x.astype(jnp.float32) for x in rounded):
                        found = p * (of_weights[part].read(later) * early_factor)
                        dx.append(found.astype(dtype))
                    store(dx, dx_here.rows(worker * ROWS, ROWS))
                    plgpu.commit_smem()
                    meet()
                    return [*dx, *rounded[: late * parts]]

                kept = [jax.ShapeDtypeStruct((ROWS, ROWS), dtype)] * (parts * (1 + late))
                found, lefts = run_products([*start(slot), *sums], weigh, kept)
                sums = found[2 * parts :]

                def spread(running):
                    dq, *dk = running
                    # 64 of the rows, or 64 of the columns, of dq.
                    which, columns = (worker, 0) if parts > 1 else (0, worker)
                    dq.add(dx_here.tiled.at[which], held[0].tiled.at[columns], turn_a=True)
                    rights = [q_here, douts_here[0]][: 1 + late]
                    for i, left_side in enumerate(lefts):
                        right = rights[i // parts].rows(i % parts * ROWS, ROWS)
                        for panel, target in enumerate(dk):
                            target.add(left_side, right.tiled.at[panel])
                    found = dq.read(len(lefts) * len(dk))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    result = dq_tiles.at(worker)
                    store_sum(found, result)
                    plgpu.commit_smem()
                    group, tile = key_tile(hidden(at))
                    there = place(group, row_tile(tile, step) * rows + which * ROWS, ROWS)
                    send_added(result, dq_ref, there, columns * PANEL, tile == 0)
                    plgpu.commit_smem_to_gmem_group()
                    return []

                found, _ = run_products([full((ROWS, ROWS), 0.0), *sums[: panels[0]]], spread)
                plgpu.barrier_arrive(released.at[slot])
                return [*found[1:], *sums[panels[0] :]]

            sums = [full((ROWS, PANEL), 0.0) for _ in range(sum(panels))]
            sums = lax.fori_loop(0, hidden(row_tiles), visit, sums)
            meet()  # K serves both warpgroups up to here; now the results take the keys' places
            worker, (group, tile) = hidden(warpgroup), key_tile(hidden(at))
            mine = keys_of(worker)
            factors = (late_factor, *gains[shared:])
            for i, (result, to) in enumerate(zip(mine, result_refs, strict=True)):
                here = sums[sum(panels[:i]) :][: panels[i]]
                store([x * factors[i] for x in here], result)
                plgpu.commit_smem()
                send(result, to, place(group, tile * KEYS + worker * ROWS, ROWS))
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WORKERS)
        def _():
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            group, tile = key_tile(lax.axis_index("blocks"))
            for ref, to in zip(source_refs, held, strict=True):
                fetch(ref, place(group, tile * KEYS, KEYS), to, keys_loaded)

            @pl.loop(0, hidden(row_tiles))
            def _(step):
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(released.at[slot])

                start = row_tile(tile, step) * rows
                for ref, to in zip((q_ref, *dout_refs), (q_tiles, *dout_tiles), strict=True):
                    fetch(ref, place(group, start, rows), to.at(slot), loaded.at[slot])
                there = lines_ref.at[group, row_tile(tile, step)]
                plgpu.copy_gmem_to_smem(there, lines.at[slot], loaded.at[slot])

            for step in range(row_tiles - stages, row_tiles):  # no signal is left unheard
                plgpu.barrier_wait(released.at[step % stages])

    stored_rows, stored_keys = _stored(n, row_tiles * rows), _stored(s, key_tiles * KEYS)
    moved = sum(a.nbytes for a in (q, *douts, *sources)) + 8 * x * y * n
    units = d + 2 * sum(dout_widths) + 2 * d
    dq, *results = launch_adding(
        body,
        name=name,
        grid=(x * y * key_tiles,),
        grid_names=("blocks",),
        threads=WORKERS + 1,
        out_type=[
            jax.ShapeDtypeStruct((x, stored_rows, y, d), jnp.float32),
            *(jax.ShapeDtypeStruct((x, stored_keys, y, a.shape[-1]), a.dtype) for a in sources),
        ],
        scratch=(
            *(tile_memory((stages,), rows, width, dtype) for width in (d, *dout_widths)),
            *(tile_memory((), KEYS, width, dtype) for width in widths),
            line_memory((stages, 2, rows)),
            tile_memory((2,), KEYS, rows, dtype),
            sum_memory((WORKERS,), ROWS, PANEL),
            plgpu.Barrier(
                num_arrivals=(d + sum(dout_widths)) // PANEL + 1, num_barriers=stages
            ),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=sum(panels)),
            plgpu.Barrier(num_arrivals=WORKERS),
        ),
        flops=2 * x * y * n * s * units,
        moved=moved + sum(a.nbytes for a in sources) + 4 * q.size,
    )(
        *(a.swapaxes(1, 2) for a in (q, *douts, *sources)),
        _lines(arrays[-2:], rows, row_tiles),
    )  # fmt: skip
    dq = (dq[:, :n] * late_factor).astype(dtype).swapaxes(1, 2)
    return dq, *(a[:, :s].swapaxes(1, 2) for a in results)


def _stages(rows: int, d: int, widths: list[int], dout_widths: list[int], row_tiles: int) -> int:
    """How many tiles of rows fit into shared memory beside the rest."""
    fixed = 2 * KEYS * sum(widths) + 2 * 2 * KEYS * rows + 4 * WORKERS * ROWS * PANEL
    stage = 2 * rows * (d + sum(dout_widths)) + 2 * 4 * rows
    return min((mode.SHARED_MEMORY - SPARE - fixed) // stage, row_tiles, MOST_STAGES)


def _lines(pair: Any, rows: int, row_tiles: int) -> Float[Array, "g tiles 2 rows"]:
    """The log-sum-exp and the shift of each row, those of a tile side by side."""

    def line(x, beyond):
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        extra = row_tiles * rows - x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, extra)), constant_values=beyond)
        return x.reshape(-1, row_tiles, rows)

    return jnp.stack([line(pair[0], -NOBODY), line(pair[1], 0.0)], axis=2)


def _stored(length: int, padded: int) -> int:
    """Rows of a result. The interpreter, unlike the copy engine, cannot leave out rows."""
    return length if mode.interpreting() is None else padded
