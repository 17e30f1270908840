"""`attend` on a TPU: rows of queries against keys that lie in VMEM whole, or pass through it.

    x[n,s] = scale * q[n] . k[s] + bias[s]
    p[n,s] = 2^(x log2 e - m)                (rounded to the dtype of the values)
    l[n]   = sum_s p ;  lse[n] = m ln 2 + log l ;  out[n] = gain * (sum_s p values[s]) / l

**Optimistic softmax.** A row maximum would have to be known before the first weight: all scores
of a row would be written to VMEM and read back. With a shift `m = 0` they flow from the first
product through the exponential to the second one. That is exact as long as `l` stays far from
overflow and underflow, which is checked: a grid step of which some row leaves
`[SMALLEST, LARGEST]` is done again with the maximum of each row (`_careful`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..block_sizes import BlockSizes
from ..numerics import MASKED, precision
from ..tpu import chips
from ..tpu.call import launch
from ..tpu.mode import available, slow_path_wanted
from ..tpu.table import choose

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# Sums of 2^x between which no shift is needed: terms lost to underflow (2^-126 each) are below
# 2^-66 of the sum, and 2^60 values of any sensible size still add up in float32.
LARGEST = 2.0**60
SMALLEST = 2.0**-60

# Where a row's maximum starts: below every score, the masked ones included.
LOWEST = 2 * MASKED

# Rows that the careful path takes at a time: its speed matters little, its code size does.
CAREFUL_ROWS = 128

# Scores of one grid step: more make a body too long for the instruction memory.
STEP_SCORES = 2_700_000

# Keys of a block that lie in VMEM all at once.
WHOLE_KEYS = 8192


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the body of the kernel is specialised for; sizes are those of one grid step."""

    groups: int  # groups in all, and in a grid step
    group_block: int
    n: int  # rows in all, and in a grid step
    rows: int
    key_blocks: int
    keys: int
    widths: tuple[int, ...]  # of the outputs
    gains: tuple[float, ...]
    scale: float
    shared: bool  # the first of the values is K itself
    entropy: bool  # write cL
    biased: bool
    dtype: Any


def softmax_rows(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    values: Sequence[Float[Array, "g s _"]],
    bias: Float[Array, "g s"] | None = None,
    *,
    scale: float,
    gains: Sequence[float],
    shared: bool,
    entropy: bool,
    name: str,
    block_sizes: BlockSizes,
) -> tuple[tuple[Array, ...], Float[Array, "g n"], Float[Array, "g n"] | None]:
    """`(outs, lse, cl)`; the kernel behind `attend` and the R step.

    With `shared`, K stands before `values` as one of them, and is read once. With `entropy`,
    `cl = q . out - lse` for the first (rounded) output.

    Raises:
        NotImplementedError: for a dtype or a size that the kernel cannot serve.
    """
    _check(q, k, values)
    groups, n, d = q.shape
    s = k.shape[1]
    widths = ((d,) if shared else ()) + tuple(v.shape[-1] for v in values)
    group_block, rows, keys = _blocks(name, groups, n, s, d, widths, q.dtype, block_sizes)
    key_blocks = pl.cdiv(s, keys)
    if s % keys:
        bias = jnp.zeros((groups, s), jnp.float32) if bias is None else bias
        extra = key_blocks * keys - s
        bias = jnp.pad(bias, ((0, 0), (0, extra)), constant_values=MASKED)
        k, *values = (jnp.pad(x, ((0, 0), (0, extra), (0, 0))) for x in (k, *values))
    plan = Plan(
        groups, group_block, n, rows, key_blocks, keys, widths, tuple(gains), scale, shared,
        entropy, bias is not None, q.dtype,
    )  # fmt: skip
    row_blocks = pl.cdiv(n, rows)
    grid = (pl.cdiv(groups, group_block), row_blocks, key_blocks)

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((group_block, rows, width), lambda g, r, j: (g, r, 0))

    def of_keys(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((group_block, keys, width), lambda g, r, j: (g, j, 0))

    # Vectors are rows of blocks: a block must be a whole dimension or a multiple of 128 wide.
    a_row = pl.BlockSpec((group_block, 1, 1, rows), lambda g, r, j: (g, r, 0, 0))
    in_specs = [of_rows(d), of_keys(d), *(of_keys(v.shape[-1]) for v in values)]
    arrays = [q, k, *values]
    if bias is not None:
        lined = jnp.maximum(bias.astype(jnp.float32) * LOG2E, MASKED)
        arrays.append(lined.reshape(groups, key_blocks, 1, keys))
        in_specs.append(pl.BlockSpec((group_block, 1, 1, keys), lambda g, r, j: (g, j, 0, 0)))
    out_dtypes = ((k.dtype,) if shared else ()) + tuple(v.dtype for v in values)
    vectors = 2 if entropy else 1
    vector = jax.ShapeDtypeStruct((groups, row_blocks, 1, rows), jnp.float32)
    total = sum(widths)
    state = key_blocks > 1
    size = jnp.dtype(q.dtype).itemsize
    passes = row_blocks if key_blocks > 1 else 1
    outs = launch(
        functools.partial(_kernel, plan),
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=[*(of_rows(w) for w in widths), *[a_row] * vectors],
        out_shape=[
            *(
                jax.ShapeDtypeStruct((groups, n, w), dtype)
                for w, dtype in zip(widths, out_dtypes, strict=True)
            ),
            *[vector] * vectors,
        ],
        scratch=[
            pltpu.VMEM((2, rows, total), jnp.float32),
            pltpu.VMEM((2, rows, 1), jnp.float32),
            pltpu.VMEM((rows, 1), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
        ]
        if state
        else (),
        semantics=("parallel", "arbitrary", "arbitrary"),
        flops=2 * groups * n * s * (d + total),
        exps=groups * n * s,
        moved=size
        * groups
        * (n * (d + total) + passes * s * (d + sum(v.shape[-1] for v in values)))
        + 4 * groups * (vectors * n + (passes * s if bias is not None else 0)),
        blocks={"rows": rows, "keys": keys},
    )(*arrays)
    vectors_out = [x.reshape(groups, -1)[:, :n] for x in outs[len(widths) :]]
    return tuple(outs[: len(widths)]), vectors_out[0], vectors_out[1] if entropy else None


def _check(q: Array, k: Array, values: Sequence[Array]) -> None:
    if not available():
        raise NotImplementedError("TPU kernels need a TPU")
    dtypes = {x.dtype for x in (q, k, *values)}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
        names = sorted(str(dtype) for dtype in dtypes)
        raise NotImplementedError(f"TPU kernels take bfloat16 or float32 throughout, got {names}")
    if min(q.shape[0], q.shape[1], k.shape[1]) == 0:
        raise NotImplementedError("TPU kernels take no empty arrays")


def _blocks(name, groups, n, s, d, widths, dtype, block_sizes) -> tuple[int, int, int]:
    """Groups, rows and keys of a grid step: wishes made to fit the shape and the VMEM."""
    shape = {"rows": n, "keys": s, "dim": d, "width": sum(widths)}
    # Rows of a block that streams past are few, its keys many: running sums are touched less.
    wish_keys = s if s <= WHOLE_KEYS else 4096
    size = jnp.dtype(dtype).itemsize
    scores = STEP_SCORES * 4 // size**2  # a float32 product takes six passes
    wish_rows = max(128, scores // _fit(s, wish_keys, 128))
    wishes = choose(
        name, shape, jnp.dtype(dtype).name, {"rows": wish_rows, "keys": wish_keys}, block_sizes
    )
    budget = int(0.8 * chips.current().vmem)

    def bytes_of(rows: int, keys: int) -> int:
        moving = 2 * size * (rows + keys) * (d + sum(widths))
        state = 2 * 4 * rows * (sum(widths) + 256) if keys < s else 0
        return moving + state + rows * keys * (4 + size)

    keys = _fit(s, wishes["keys"], 128)
    rows = _fit(n, wishes["rows"], 128)
    while bytes_of(rows, keys) > budget and rows > 256:
        rows = _fit(n, rows // 2, 128)
    while bytes_of(rows, keys) > budget and keys > 256:
        keys = _fit(s, keys // 2, 128)
    if bytes_of(rows, keys) > budget:
        raise NotImplementedError(
            f"blocks of {rows} rows and {keys} keys of {d} do not fit {budget} bytes of VMEM"
        )
    group_block = 1
    if rows == n and keys == s:
        room = min(16, scores // 8 // (n * s), budget // bytes_of(n, s))
        group_block = max(1, min(groups, room))
        group_block = next(x for x in range(group_block, 0, -1) if groups % x == 0)
    return group_block, rows, keys


def _fit(length: int, wish: int, step: int) -> int:
    """A block of about `wish`: the whole length, a divisor of it, or a multiple of `step`."""
    if wish >= length:
        return length
    for size in range(wish * 5 // 4 // 8 * 8, wish // 2, -8):
        if length % size == 0:
            return size
    # Even shares, so that the last block is not mostly padding.
    return min(length, pl.cdiv(pl.cdiv(length, pl.cdiv(length, wish)), step) * step)


def _kernel(plan: Plan, *refs: Any) -> None:
    """One grid step: `group_block` groups of `rows` rows against `keys` keys."""
    real = None
    if plan.n % plan.rows:  # rows past the end hold anything
        left = plan.n - pl.program_id(1) * plan.rows
        real = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0) < left
    values = len(plan.widths) - plan.shared
    q, k = refs[:2]
    v, rest = refs[2 : 2 + values], refs[2 + values :]
    bias, rest = (rest[0], rest[1:]) if plan.biased else (None, rest)
    vectors = 2 if plan.entropy else 1
    outs, rest = rest[: len(plan.widths)], rest[len(plan.widths) :]
    lines, state = rest[:vectors], rest[vectors:]
    if plan.key_blocks == 1:
        _whole(plan, real, q, k, v, bias, outs, lines)
    else:
        streamed(plan, real, q, k, v, bias, outs, lines, *state)


def _whole(plan, real, q, k, v, bias, outs, lines) -> None:
    """All keys are here: one softmax."""
    # A stage of all groups before the next stage of any: small groups hide each other's latency.
    here = range(plan.group_block)
    x = [_scores(plan, q[g], k[g], None if bias is None else bias[g, 0]) for g in here]
    p, totals = zip(*(_weights(scores, plan.dtype) for scores in x), strict=True)
    sums = [_averages(plan, p[g], k[g], [ref[g] for ref in v]) for g in here]
    for g in here:
        _finish(plan, q[g], sums[g], totals[g], jnp.log(totals[g]), outs, lines, g, 0, plan.rows)
    good = functools.reduce(jnp.logical_and, [_sound(real, total, total) for total in totals])
    if not slow_path_wanted():
        return

    @pl.when(jnp.logical_not(good))
    def _():
        def chunk(g: Any, start: Any, size: int) -> None:
            here = q[g, pl.ds(start, size)]
            x = _scores(plan, here, k[g], None if bias is None else bias[g, 0])
            top = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), MASKED)
            p, total = _weights(x - top, plan.dtype)
            sums = _averages(plan, p, k[g], [ref[g] for ref in v])
            sums, total, top = _emptied(sums, total, top)
            _finish(
                plan, here, sums, total, top * LN2 + jnp.log(total), outs, lines, g, start, size
            )

        def group(g: Any) -> None:
            _chunks(plan.rows, functools.partial(chunk, g))

        _loop(plan.group_block, group)


def streamed(
    plan, real, q, k, v, bias, outs, lines, sums_ref, total_ref, top_ref, careful, masses=None
) -> None:
    """A block of the keys: added to the running sums, which alternate between two places.

    Were they added to in place, a block that turns out to need the careful path could not be
    taken back. `masses`, where a caller wants more of the weights than their sums, takes the place
    of `_weights`, masks scores before their maximum is taken, and is told what to divide by.
    """
    weights = _weights if masses is None else masses.weights
    j = pl.program_id(2)
    first = j == 0
    now, before = j % 2, (j + 1) % 2
    here_bias = None if bias is None else bias[0, 0]

    @pl.when(first)
    def _():
        careful[0] = 0

    def hopeful() -> None:
        p, here = weights(_scores(plan, q[0], k[0], here_bias), plan.dtype)
        total = here + jnp.where(first, 0.0, total_ref[before])
        sums = _averages(plan, p, k[0], [ref[0] for ref in v])
        sums_ref[now] = sums + jnp.where(first, 0.0, sums_ref[before])
        total_ref[now] = total
        if slow_path_wanted():

            @pl.when(jnp.logical_not(_sound(real, here, total)))
            def _():
                careful[0] = 1
                # What was added up so far had no shift; nothing at all had the lowest one.
                top_ref[...] = jnp.full(top_ref.shape, jnp.where(first, LOWEST, 0.0))

    if slow_path_wanted():
        pl.when(careful[0] == 0)(hopeful)
    else:
        hopeful()

    if slow_path_wanted():

        @pl.when(careful[0] != 0)
        def _():
            def chunk(start: Any, size: int) -> None:
                part = pl.ds(start, size)
                x = _scores(plan, q[0, part], k[0], here_bias)
                x = x if masses is None else masses.masked(x)
                top_before = top_ref[part]
                top = jnp.maximum(top_before, jnp.max(x, axis=-1, keepdims=True))
                fade = jnp.exp2(top_before - top)
                if masses is not None:
                    masses.fade(part, fade)
                p, here = weights(x - top, plan.dtype, part)
                sums = _averages(plan, p, k[0], [ref[0] for ref in v])
                old_total = jnp.where(first, 0.0, total_ref[before, part])
                old_sums = jnp.where(first, 0.0, sums_ref[before, part])
                total_ref[now, part] = old_total * fade + here
                sums_ref[now, part] = old_sums * fade + sums
                top_ref[part] = top

            _chunks(plan.rows, chunk)

    @pl.when(j == plan.key_blocks - 1)
    def _():
        def write(total: Any, sums: Any, top: Any) -> None:
            lse = jnp.log(total) if top is None else top * LN2 + jnp.log(total)
            _finish(plan, q[0], sums, total, lse, outs, lines, 0, 0, plan.rows)
            if masses is not None:
                masses.finish(total)

        if not slow_path_wanted():
            write(total_ref[now], sums_ref[now], None)
            return
        top = jnp.where(careful[0] != 0, top_ref[...], 0.0)
        sums, total, top = _emptied(sums_ref[now], total_ref[now], top)
        write(total, sums, top)


def _scores(plan, q, k, bias):
    """`scale * log2 e * q . k + bias`, float32."""
    # Scaled once a row, not once a score; bfloat16 rows are rounded a second time by it.
    q = (q.astype(jnp.float32) * (plan.scale * LOG2E)).astype(q.dtype)
    x = jax.lax.dot_general(
        q, k, (((1,), (1,)), ((), ())),
        precision=precision(q.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
    return x if bias is None else x + bias  # [rows, keys]


def _weights(x, dtype, part=None):
    """`2^x` in the dtype of the product to come, and its sums `[rows, 1]`; `part`: of which rows.

    The sums are of the rounded weights: the outputs are then true averages, and the unrounded
    weights need not be kept.
    """
    del part  # any rows are alike here
    p = jnp.exp2(x).astype(dtype)  # [rows, keys]
    return p, jnp.sum(p.astype(jnp.float32), axis=-1, keepdims=True)


def _averages(plan, p, k, v):
    """`p @ [K | V]`: one wide product keeps a wide matmul unit full."""
    joined = [k, *v] if plan.shared else list(v)
    right = joined[0] if len(joined) == 1 else jnp.concatenate(joined, axis=-1)
    return jnp.dot(
        p, right,
        precision=precision(right.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip


def _sound(real, block, total):
    """Whether no row of this grid step left the range where a shift of 0 is exact; NaN did."""
    fine = (block <= LARGEST) & (total >= SMALLEST)  # [rows, 1]
    return jnp.all(fine if real is None else fine | ~real)


def _emptied(sums, total, top):
    """A row without keys: sums of zero over one, and a log-sum-exp of -inf."""
    # A maximum may pass over NaN, a sum does not.
    empty = (top <= MASKED / 2) & (total <= LARGEST)
    return (
        jnp.where(empty, 0.0, sums),
        jnp.where(empty, 1.0, total),
        jnp.where(empty, -jnp.inf, top),
    )


def _finish(plan, q, sums, total, lse, outs, lines, g, start, size) -> None:
    """Writes the outputs, the log-sum-exp and cL of the rows from `start`."""
    rows = pl.ds(start, size)
    over = 1 / total
    lines[0][g, 0, 0, rows] = lse[:, 0]
    at = 0
    for i, (ref, width, gain) in enumerate(zip(outs, plan.widths, plan.gains, strict=True)):
        out = (sums[:, at : at + width] * (over * gain)).astype(ref.dtype)  # [rows, width]
        ref[g, rows] = out
        at += width
        if plan.entropy and i == 0:
            product = q.astype(jnp.float32) * out.astype(jnp.float32)
            entropy = jnp.sum(product, axis=-1, keepdims=True) - lse
            if plan.biased:  # there may be no key at all
                entropy = jnp.where(lse == -jnp.inf, 0.0, entropy)
            lines[1][g, 0, 0, rows] = entropy[:, 0]


def _chunks(length: int, chunk: Any) -> None:
    """`chunk(start, size)` for all of `length` by a loop, and by itself for what is left."""
    whole = length // CAREFUL_ROWS
    if whole:
        _loop(whole, lambda i: chunk(pl.multiple_of(i * CAREFUL_ROWS, CAREFUL_ROWS), CAREFUL_ROWS))
    if length % CAREFUL_ROWS:
        chunk(whole * CAREFUL_ROWS, length % CAREFUL_ROWS)


def _loop(count: int, body: Any) -> None:
    jax.lax.fori_loop(0, count, lambda i, _: (body(i), 0)[1], 0)
