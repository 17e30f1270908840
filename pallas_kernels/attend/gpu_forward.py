"""Softmax attention of groups of rows on a Hopper GPU, with K itself as one of the values.

    x[n,s] = scale q[n] . k[s] ;  lse[n] = logsumexp_s x
    out_i[n] = gain_i sum_s exp(x - lse) value_i[s]
    entropy[n] = (scale / gain_0) q[n] . out_0[n] - lse[n]

With `shared`, K is the first value: the R step reads `[K | V]` from memory once, and makes its
scores once, for both aL and Y. That is 6 units of matrix work a block where two calls of a
library's attention take 8.

A block of threads takes 128 rows of a group: two warpgroups of 64 rows each, which take turns
between matrix products and exponentials, and a third that copies keys and values ahead of them.
This is FlashAttention-3's schedule, after JAX's own example of it
(`jax/experimental/pallas/ops/gpu/attention_mgpu.py`). Neither the rows nor the keys need be a
multiple of anything: the copy engine fills what is missing with zeros, and the last keys' scores
are masked. Rows need not lie side by side in memory either: with two axes of groups they lie as a
caller's tokens do, with the heads (the second axis) between them.
"""

import math
from typing import Any

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
    LOWEST,
    PANEL,
    ROWS,
    TINY_SUM,
    add_dot,
    by_column,
    by_row,
    column_numbers,
    dot_transposed,
    fetch,
    launch,
    line_memory,
    load_panel,
    load_per_column,
    round_up,
    send,
    store,
    tile_memory,
    tiles,
)
from ..numerics import MASKED

# Keys that are copied and multiplied at a time, with results up to `NARROW` wide, and with wider
# ones or a bias, which leave a thread fewer registers for scores.
KEYS = 128
KEYS_OF_WIDE = 64
NARROW = 128

# Shared memory for the keys and values that are there or on their way, in bytes.
AHEAD = 128 * 1024

# Warpgroups that compute; one more copies.
WORKERS = 2

# Registers of a thread of either kind: (2 * 240 + 24) * 128 of 65,536.
WORKER_REGISTERS = 240
COPIER_REGISTERS = 24


def softmax_rows(
    q: Float[Array, "*g n d"],
    k: Float[Array, "*g s d"],
    values: tuple[Float[Array, "*g s _"], ...],
    bias: Float[Array, "*g s"] | None = None,
    *,
    scale: float,
    gains: tuple[float, ...],
    shared: bool,
    entropy: bool,
    name: str,
) -> tuple[list[Float[Array, "*g n _"]], Float[Array, "*g n"], Float[Array, "*g n"] | None]:
    """`(outs, lse, entropy)`: outs in the dtypes of their values, the rest in float32.

    `bias` is added to the scores; keys with `MASKED` have no weight, and rows without any other get
    zeros and -inf. The entropy's product is that of the rounded first result. `None` unless asked
    for. Groups have
    one axis or two. With one, memory is in the order of the axes; with two, groups `[x, y]`, it is
    `[x, rows, y, dim]`, and arrays that do not lie so are transposed.
    """
    groups, (n, d), s = q.shape[:-2], q.shape[-2:], k.shape[-2]
    g, heads = math.prod(groups), groups[1] if len(groups) == 2 else 1
    sources = (k, *values)
    used = range(0 if shared else 1, len(sources))
    widths = tuple(sources[i].shape[-1] for i in used)
    dtypes = tuple(sources[i].dtype for i in used)
    tile_rows = WORKERS * ROWS
    row_tiles = -(-n // tile_rows)
    block = KEYS if sum(widths) <= NARROW and bias is None else KEYS_OF_WIDE
    whole, left = divmod(s, block)
    steps = whole + (left > 0)
    first_keys = round_up(left, PANEL) or block
    stages = min(AHEAD // (2 * block * sum(x.shape[-1] for x in sources)), steps)
    factor = scale * LOG2E
    left_to_scale = scale / gains[0] if entropy and scale else 0.0
    added = [] if bias is None else [_lines(bias.reshape(g, s) * LOG2E, block)]

    def body(*refs):
        q_ref, *source_refs = refs[: 1 + len(sources)]
        refs = list(refs[1 + len(sources) :])
        bias_ref: Any = refs.pop(0) if added else None
        out_refs = refs[: len(widths)]
        lse_ref, *rest = refs[len(widths) :]
        entropy_ref, rest = (rest[0], rest[1:]) if entropy else (None, rest)
        q_memory, out_memory, lines, q_loaded, turn, loaded, released, *memories = rest
        bias_lines: Any = memories.pop() if added else None
        worker = lax.axis_index("warpgroup")
        at = lax.axis_index("blocks")
        group = lax.div(at, row_tiles)

        def place(rows):
            return lax.div(group, heads), rows, lax.rem(group, heads)

        held = [tiles(memory) for memory in memories]

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(worker < WORKERS)
        def _():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            rows = tiles(q_memory).at(worker)
            first = lax.rem(at, row_tiles) * tile_rows + worker * ROWS
            fetch(q_ref, place(pl.ds(first, ROWS)), rows, q_loaded.at[worker])
            plgpu.barrier_wait(q_loaded.at[worker])
            plgpu.barrier_wait(loaded.at[0])
            pl.when(worker == 1)(take_turns)

            def visit(step, carry, count):
                slot = lax.rem(step, stages)
                x = dot_transposed(rows, held[0].at(slot).rows(0, count), then=take_turns)
                rest = factor
                if added:  # what is beyond the end has a bias too
                    here = load_per_column(bias_lines.at[slot, pl.ds(0, count)])
                    x, rest = x * factor + by_column(here, x.shape), 1.0
                elif left and carry is None:
                    x = jnp.where(column_numbers(x.shape) < left, x, -jnp.inf)
                top = x.max(axis=1) * rest
                if carry is None:
                    top = jnp.maximum(top, LOWEST) if added else top
                    p = jnp.exp2(x * rest - by_row(top, x.shape))
                    total, sums = p.sum(axis=1), []
                else:
                    old, total, sums = carry
                    top = jnp.maximum(old, top)
                    shrink = jnp.exp2(old - top)
                    p = jnp.exp2(x * rest - by_row(top, x.shape))
                    total = total * shrink + p.sum(axis=1)
                    sums = [x * by_row(shrink, x.shape) for x in sums]
                weights = p.astype(q.dtype)
                top, total, sums, weights = lax.optimization_barrier((top, total, sums, weights))
                take_turns()

                def wait_for_more():
                    @pl.when(step + 1 < steps)
                    def _():
                        plgpu.barrier_wait(loaded.at[lax.rem(step + 1, stages)])

                right = [held[i].at(slot).rows(0, count) for i in used]
                sums = add_dot(sums, weights, right, then=wait_for_more)
                plgpu.barrier_arrive(released.at[slot])
                return top, total, sums

            # What is no multiple of the block comes first: no sums are alive yet, so that the
            # masked scores have registers enough.
            carry = visit(jnp.int32(0), None, first_keys)
            carry = lax.fori_loop(1, steps, lambda step, carry: visit(step, carry, block), carry)
            top, total, sums = carry
            pl.when(worker == 0)(take_turns)

            lse = top * LN2 + jnp.log(total)
            share = 1.0 / (jnp.maximum(total, TINY_SUM) if added else total)
            buffer = tiles(out_memory).at(worker)
            line = lines.at[worker]
            for i, width in enumerate(widths):
                count = width // PANEL
                gain = share * gains[i]
                out = [(x * by_row(gain, x.shape)).astype(dtypes[i]) for x in sums[:count]]
                sums = sums[count:]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                part = buffer.first_panels(count)
                store(out, part)
                if i == 0:
                    line[0] = lse
                    if entropy:
                        line[1] = _dot_of_rows(rows, out) * left_to_scale - lse
                plgpu.commit_smem()
                send(part, out_refs[i], place(pl.ds(first, ROWS)))
                if i == 0:
                    to = pl.ds(first, ROWS)
                    plgpu.copy_smem_to_gmem(line.at[0], lse_ref.at[group, to], commit_group=False)
                    if entropy_ref is not None:
                        plgpu.copy_smem_to_gmem(
                            line.at[1], entropy_ref.at[group, to], commit_group=False
                        )
                plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        @pl.when(worker == WORKERS)
        def _():
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

            def copy(slot, step, start, count):
                index = place(pl.ds(start, count))
                for ref, to in zip(source_refs, held, strict=True):
                    fetch(ref, index, to.at(slot).rows(0, count), loaded.at[slot])
                if added:
                    source = bias_ref.at[group, step]
                    plgpu.copy_gmem_to_smem(source, bias_lines.at[slot], loaded.at[slot])

            def start(step):
                return (step - 1) * block if left else step * block

            copy(0, at * 0, at * 0 + (s - left if left else 0), first_keys)
            for step in range(1, stages):
                copy(step, at * 0 + step, start(jnp.int32(step)), block)

            @pl.loop(stages, steps)
            def _(step):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(released.at[slot])
                copy(slot, step, start(step), block)

            for step in range(steps - stages, steps):  # nobody leaves with a signal unheard
                plgpu.barrier_wait(released.at[step % stages])

    padded = row_tiles * tile_rows
    lines = (jax.ShapeDtypeStruct((g, padded), jnp.float32),) * (1 + entropy)
    results = launch(
        body,
        name=name,
        grid=(g * row_tiles,),
        grid_names=("blocks",),
        threads=WORKERS + 1,
        out_type=(
            *(
                jax.ShapeDtypeStruct((g // heads, _stored(n, padded), heads, width), dtype)
                for width, dtype in zip(widths, dtypes, strict=True)
            ),
            *lines,
        ),
        scratch=(
            tile_memory((WORKERS,), ROWS, d, q.dtype),
            tile_memory((WORKERS,), ROWS, max(widths), dtypes[0]),
            line_memory((WORKERS, 2, ROWS)),
            plgpu.Barrier(num_arrivals=d // PANEL, num_barriers=WORKERS),
            plgpu.Barrier(num_arrivals=WORKERS),
            plgpu.Barrier(
                num_arrivals=sum(x.shape[-1] for x in sources) // PANEL + len(added),
                num_barriers=stages,
            ),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages),
            *(tile_memory((stages,), block, x.shape[-1], x.dtype) for x in sources),
            *(line_memory((stages, block)) for _ in added),
        ),
        flops=2 * g * n * s * (d + sum(widths)),
        moved=sum(x.nbytes for x in (q, *sources)) + 2 * g * n * sum(widths) + 8 * g * n,
    )(*(_heads_apart(x) for x in (q, *sources)), *added)
    outs = [out[:, :n].swapaxes(1, 2) for out in results[: len(widths)]]
    outs = [out.reshape(*groups, *out.shape[2:]) for out in outs]
    lse, *entropies = (line[:, :n].reshape(*groups, n) for line in results[len(widths) :])
    return outs, lse, entropies[0] if entropies else None


def _lines(bias: Float[Array, "g s"], block: int) -> Float[Array, "g steps block"]:
    """A line for each block of keys, the odd ones first as they are visited."""
    g, s = bias.shape
    left = s % block
    if not left:
        return bias.reshape(g, -1, block)
    whole, odd = bias[:, : s - left].reshape(g, -1, block), bias[:, None, s - left :]
    odd = jnp.pad(odd, ((0, 0), (0, 0), (0, block - left)), constant_values=MASKED)
    return jnp.concatenate([odd, whole], axis=1)


def _heads_apart(x: Float[Array, "*g n d"]) -> Float[Array, "x n y d"]:
    """Groups of one axis have one head."""
    return x.swapaxes(1, 2) if x.ndim == 4 else x[:, :, None]


def _dot_of_rows(a: Any, b: list[Float[Array, "n 64"]]) -> Float[Array, "n"]:
    """The product of each row of a matrix in shared memory with one in registers."""
    products = [
        (load_panel(a, i).astype(jnp.float32) * x.astype(jnp.float32)).sum(axis=1)
        for i, x in enumerate(b)
    ]
    return sum(products[1:], start=products[0])


def _stored(length: int, padded: int) -> int:
    """Rows of a result. The interpreter, unlike the copy engine, cannot leave out rows."""
    return length if mode.interpreting() is None else padded
