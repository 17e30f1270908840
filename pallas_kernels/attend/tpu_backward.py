"""The gradient of `attend` on a TPU: the scores again, and five or seven products with them.

    P     = 2^(x log2 e - lse log2 e)                       lse is known: no maximum, P <= 1
    dP    = sum_v gain_v dout_v . value_v
    dS    = P (dP - delta) ;  delta = sum_v dout_v . out_v - dlse
    dq    = scale dS K
    dk    = scale dS^T q       (+ gain P^T dout, where the first of the values is K itself)
    dval  = gain P^T dout ;  dbias = sum_rows dS

**Transposed results.** The matmul unit holds one operand and streams the other through. `dS^T q`
with dS streamed fills half of a 256-wide unit (q is 128 wide) and needs dS transposed; its
transpose `q^T dS` streams the 128 rows of q^T past dS, which fills the unit whole and wants dS as
it lies. So dk, the gradients of values and, on chips with a wide unit, dq are computed transposed,
`[d, keys]` and `[d, rows]`, and turned once at the end.
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
from ..tpu.call import available, launch
from ..tpu.table import choose

LOG2E = 1.4426950408889634

# Chips whose matmul units are 256 wide: there it pays to turn dS by the transpose unit for dq.
WIDE = ("v6e", "7x")

# Rows of scores between the first products and the last ones: as deep as a wide matmul unit.
CHUNK_ROWS = 256

# Scores of one grid step, in matmul passes (float32 takes six): a longer body compiles slowly
# and leaves the instruction memory.
STEP_SCORES = 2_700_000

# Share of the VMEM that the float32 dq of all rows and its output may take; more rows than fit
# are split over several launches.
DQ_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the body of the kernel is specialised for; sizes are those of one grid step."""

    group_block: int
    rows: int
    row_blocks: int
    keys: int
    key_blocks: int
    d: int
    widths: tuple[int, ...]  # of the values, K included where it is one
    gains: tuple[float, ...]
    scale: float
    shared: bool  # the first of the values is K itself
    biased: bool
    turn: bool  # transpose dS for dq


def backward(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    values: tuple[Float[Array, "g s _"], ...],
    outs: tuple[Float[Array, "g n _"], ...],
    lse: Float[Array, "g n"],
    douts: tuple[Float[Array, "g n _"], ...],
    dlse: Float[Array, "g n"] | None,
    *,
    scale: float,
    gains: tuple[float, ...],
    bias: Float[Array, "g s"] | None = None,
    shared: bool,
    block_sizes: BlockSizes,
) -> tuple[Array, Array, tuple[Array, ...], Float[Array, "g s"] | None]:
    """`(dq, dk, dvalues, dbias)` from the result of the forward pass and its gradient.

    With `shared`, K stands before `values` as one of them (in `outs`, `douts` and `gains` too),
    and dk holds both of its contributions. A row whose lse is not finite, or as far out as a
    masked score, has no keys: it gives zeros.

    Raises:
        NotImplementedError: for a dtype or a size that the kernel cannot serve.
    """
    _check(q, k, values)
    name = "r_step_backward" if shared else "attend_backward"
    groups, n, d = q.shape
    s = k.shape[1]
    widths = ((d,) if shared else ()) + tuple(v.shape[-1] for v in values)
    group_block, rows, keys = _blocks(name, groups, n, s, d, widths, q.dtype, block_sizes)
    row_blocks, key_blocks = pl.cdiv(n, rows), pl.cdiv(s, keys)

    dlse = jnp.zeros_like(lse) if dlse is None else dlse.astype(jnp.float32)
    # A row without keys gets a log-sum-exp above every score, which leaves it no weight.
    empty = ~(jnp.abs(lse) < -MASKED / 2) & ~jnp.isnan(lse)
    lse = jnp.where(empty, -MASKED, lse * LOG2E)
    if n % rows:
        extra = row_blocks * rows - n
        lse = jnp.pad(lse, ((0, 0), (0, extra)), constant_values=-MASKED)
        dlse = jnp.pad(dlse, ((0, 0), (0, extra)))
        q, outs, douts = jax.tree.map(lambda x: _padded(x, extra), (q, outs, douts))
    line = bias
    if s % keys:
        extra = key_blocks * keys - s
        line = jnp.zeros((groups, s), jnp.float32) if bias is None else bias
        line = jnp.pad(line.astype(jnp.float32), ((0, 0), (0, extra)), constant_values=MASKED)
        k, values = jax.tree.map(lambda x: _padded(x, extra), (k, values))
    plan = _Plan(
        group_block, rows, row_blocks, keys, key_blocks, d, widths, tuple(gains), scale, shared,
        line is not None, chips.current().name in WIDE,
    )  # fmt: skip
    lines = jnp.stack([lse, dlse], axis=1).reshape(groups, 2, row_blocks, rows)
    arrays = [q, *outs, *douts, lines.swapaxes(1, 2), k, *values]
    if line is not None:
        line = jnp.maximum(line.astype(jnp.float32) * LOG2E, MASKED)
        arrays.append(line.reshape(groups, key_blocks, 1, keys))

    parts = _parts(row_blocks, rows, d, key_blocks, q.dtype)
    results = [
        _launch_rows(plan, name, part, len(parts) > 1, arrays, (groups, s)) for part in parts
    ]
    dq, *of_keys = zip(*results, strict=True)
    dq = (dq[0] if len(dq) == 1 else jnp.concatenate(dq, axis=1))[:, :n]
    of_keys = [functools.reduce(jnp.add, pieces) for pieces in of_keys]
    dtypes = (k.dtype, *(v.dtype for v in values))
    dk, *dvalues = (x[:, :s].astype(t) for x, t in zip(of_keys, dtypes, strict=False))
    dbias = None
    if bias is not None:
        dbias = of_keys[-1].reshape(groups, -1)[:, :s].astype(bias.dtype)
    return dq, dk, tuple(dvalues), dbias


def _padded(x: Array, extra: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0)))


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
    size = jnp.dtype(dtype).itemsize
    step_scores = STEP_SCORES if size == 2 else STEP_SCORES // 6
    wish_keys = s if s * min(n, 2 * CHUNK_ROWS) <= step_scores else min(s, 1600)
    wish_rows = max(CHUNK_ROWS, step_scores // wish_keys)
    shape = {"groups": groups, "rows": n, "keys": s, "dim": d, "width": sum(widths)}
    wishes = choose(
        name, shape, jnp.dtype(dtype).name, {"rows": wish_rows, "keys": wish_keys}, block_sizes
    )
    budget = int((0.9 - DQ_SHARE) * chips.current().vmem)

    def bytes_of(rows: int, keys: int) -> int:
        width = d + sum(widths)
        moving = 2 * size * (rows * (2 * width) + 2 * keys * width)
        return moving + 4 * keys * width + 2 * (4 + size) * min(rows, CHUNK_ROWS) * keys

    keys = _fit(s, wishes["keys"])
    rows = _fit(n, wishes["rows"])
    while bytes_of(rows, keys) > budget and max(rows, keys) > 256:
        if rows >= keys:
            rows = _fit(n, rows // 2)
        else:
            keys = _fit(s, keys // 2)
    if bytes_of(rows, keys) > budget:
        raise NotImplementedError(
            f"blocks of {rows} rows and {keys} keys of {d} do not fit {budget} bytes of VMEM"
        )
    group_block = 1
    if rows == n and keys == s:
        room = min(16, step_scores // 8 // (n * s), budget // bytes_of(n, s))
        group_block = max(1, min(groups, room))
        group_block = next(x for x in range(group_block, 0, -1) if groups % x == 0)
    return group_block, rows, keys


def _fit(length: int, wish: int) -> int:
    """A block of about `wish`: the whole length, a divisor of it, or one that pads it little."""
    if wish >= length:
        return length
    wish = max(16, wish)
    for size in range(wish - wish % 8, wish // 2, -8):
        if length % size == 0:
            return size
    blocks = -(-length // wish)
    return -(-length // (16 * blocks)) * 16


def _parts(row_blocks: int, rows: int, d: int, key_blocks: int, dtype: Any) -> list[range]:
    """The row blocks of each launch: all, unless their dq must wait in VMEM and does not fit."""
    room = DQ_SHARE * chips.current().vmem
    each = rows * max(d, 128) * (4 + 2 * jnp.dtype(dtype).itemsize)
    launches = 1 if key_blocks == 1 else min(row_blocks, -(-row_blocks * each // int(room)))
    size = -(-row_blocks // launches)
    return [range(i, min(i + size, row_blocks)) for i in range(0, row_blocks, size)]


def _launch_rows(plan, name, part, partial, arrays, sizes) -> list[Array]:
    """The dq of the row blocks `part`, and their share of dk, dvalues and dbias."""
    groups, s = sizes
    plan = dataclasses.replace(plan, row_blocks=len(part))
    d, widths, values = plan.d, plan.widths, plan.widths[int(plan.shared) :]
    first = part.start

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((plan.group_block, plan.rows, width), lambda g, j, r: (g, first + r, 0))

    def of_keys(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((plan.group_block, plan.keys, width), lambda g, j, r: (g, j, 0))

    # Vectors are rows of blocks: a block must be a whole dimension or a multiple of 128 wide.
    row_line = pl.BlockSpec(
        (plan.group_block, 1, 2, plan.rows), lambda g, j, r: (g, first + r, 0, 0)
    )
    key_line = pl.BlockSpec((plan.group_block, 1, 1, plan.keys), lambda g, j, r: (g, j, 0, 0))
    rows = plan.rows * plan.row_blocks
    if plan.key_blocks == 1:
        dq_spec = pl.BlockSpec((plan.group_block, plan.rows, d), lambda g, j, r: (g, r, 0))
    else:
        dq_spec = pl.BlockSpec((1, rows, d), lambda g, j, r: (g, 0, 0))
    keys = plan.keys * plan.key_blocks
    dtype = arrays[0].dtype
    key_dtype = jnp.float32 if partial else dtype
    biased = [key_line] if plan.biased else []
    moved_keys = d + sum(values)
    scratch = [pltpu.VMEM((d, plan.keys), jnp.float32)]
    scratch += [pltpu.VMEM((w, plan.keys), jnp.float32) for w in values]
    if plan.key_blocks > 1:
        scratch.append(pltpu.VMEM((rows, d), jnp.float32))
    return launch(
        functools.partial(_kernel, plan),
        name=name,
        grid=(groups // plan.group_block, plan.key_blocks, plan.row_blocks),
        in_specs=[
            of_rows(d), *(of_rows(w) for w in widths * 2), row_line,
            of_keys(d), *(of_keys(w) for w in values), *biased,
        ],
        out_specs=[dq_spec, of_keys(d), *(of_keys(w) for w in values), *biased],
        out_shape=[
            jax.ShapeDtypeStruct((groups, rows, d), dtype),
            *(jax.ShapeDtypeStruct((groups, keys, w), key_dtype) for w in (d, *values)),
            *(
                jax.ShapeDtypeStruct((groups, plan.key_blocks, 1, plan.keys), jnp.float32)
                for _ in biased
            ),
        ],
        scratch=scratch,
        semantics=("parallel", "arbitrary", "arbitrary"),
        flops=2 * groups * rows * s * (3 * d + 2 * sum(widths)),
        exps=groups * rows * s,
        moved=dtype.itemsize * groups * (
            plan.key_blocks * rows * (d + 2 * sum(widths)) + rows * d + 2 * s * moved_keys
        ),
        blocks={"rows": plan.rows, "keys": plan.keys},
    )(*arrays)  # fmt: skip


def _kernel(plan: _Plan, *refs: Any) -> None:
    """One grid step: `group_block` groups of `rows` rows against `keys` keys."""
    refs = list(refs)
    take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
    count = len(plan.widths)
    values = count - plan.shared
    (q,), outs, douts, (lines, k) = take(1), take(count), take(count), take(2)
    v, bias = take(values), take(int(plan.biased))
    dq, dk, *dv = take(2 + values)
    dbias, sums = take(int(plan.biased)), take(1 + values)
    waiting = refs[0] if plan.key_blocks > 1 else None
    targets = [dk, *dv]
    j, step = pl.program_id(1), pl.program_id(2)

    if plan.row_blocks > 1:

        @pl.when(step == 0)
        def _():
            for ref in sums:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)
            for ref in dbias:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

    starts = range(0, plan.rows, CHUNK_ROWS)
    for g in range(plan.group_block):
        keys = [k[g], *(ref[g] for ref in v)]
        lse, dlse = (jnp.transpose(lines[g, 0, i : i + 1]) for i in (0, 1))  # [rows, 1]
        for start in starts:
            chunk = slice(start, min(start + CHUNK_ROWS, plan.rows))
            grads = _chunk(
                plan,
                q[g, chunk],
                [ref[g, chunk] for ref in outs],
                [ref[g, chunk] for ref in douts],
                lse[chunk],
                dlse[chunk],
                keys,
                bias[0][g, 0] if bias else None,
            )
            if waiting is None:
                dq[g, chunk] = grads[0].astype(dq.dtype)
            else:
                here = _rows_from(plan, step, start, chunk.stop - start)
                waiting[here] = grads[0] + jnp.where(j == 0, 0.0, waiting[here])
            fresh = plan.row_blocks == 1 and start == 0
            for ref, more in zip([*sums, *(x.at[g, 0] for x in dbias)], grads[1:], strict=True):
                ref[...] = more if fresh else ref[...] + more
        if plan.row_blocks == 1:
            for ref, sum_ in zip(targets, sums, strict=True):
                ref[g] = jnp.transpose(sum_[...]).astype(ref.dtype)

    if waiting is not None:

        @pl.when(j == plan.key_blocks - 1)
        def _():
            rows = _rows_from(plan, step, 0, plan.rows)
            dq[0, rows] = waiting[rows].astype(dq.dtype)

    if plan.row_blocks > 1:

        @pl.when(step == plan.row_blocks - 1)
        def _():
            for ref, sum_ in zip(targets, sums, strict=True):
                ref[0] = jnp.transpose(sum_[...]).astype(ref.dtype)


def _chunk(plan, q, outs, douts, lse, dlse, keys, bias) -> list[Array]:
    """Some rows of one group: dq, and their share of dk^T, dvalues^T and dbias, in float32."""
    k = keys[0]
    values = keys if plan.shared else keys[1:]
    dtype = k.dtype
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    delta = sum(
        jnp.sum(wide(out) * wide(dout), axis=-1, keepdims=True)
        for out, dout in zip(outs, douts, strict=True)
    )  # [rows, 1]
    # Rounded as the forward pass rounds it, so that the weights are the same.
    x = _dot((wide(q) * (plan.scale * LOG2E)).astype(dtype), k, 1, 1)
    x = x if bias is None else x + bias
    p = jnp.exp2(x - lse)  # [rows, keys]
    douts = [
        dout if gain == 1 else (wide(dout) * gain).astype(dtype)
        for dout, gain in zip(douts, plan.gains, strict=True)
    ]
    # Side by side, narrow values fill a wide matmul unit, where lanes need no shifting.
    joined = len(values) > 1 and all(w % 128 == 0 for w in plan.widths)
    dp = (
        _dot(jnp.concatenate(douts, axis=1), jnp.concatenate(values, axis=1), 1, 1)
        if joined
        else sum(_dot(dout, value, 1, 1) for dout, value in zip(douts, values, strict=True))
    )
    ds = p * (dp - (delta - dlse))  # [rows, keys]
    more = [] if bias is None else [jnp.sum(ds, axis=0, keepdims=True)]
    ds, p = ds.astype(dtype), p.astype(dtype)
    if plan.turn:
        dq = jnp.transpose(_dot(k, jnp.transpose(ds), 0, 0))
    else:
        dq = _dot(ds, k, 1, 0)
    scaled = (wide(q) * plan.scale).astype(dtype)
    if plan.shared and len(values) == 1 and scaled.shape[0] % 16 == 0:
        # One deep product adds up both contributions inside the matmul unit.
        both = jnp.concatenate([scaled, douts[0]]), jnp.concatenate([ds, p])
        return [plan.scale * dq, _dot(*both, 0, 0), *more]
    if joined:
        dvalues = _dot(jnp.concatenate(douts, axis=1), p, 0, 0)  # [sum(widths), keys]
        ends = [sum(plan.widths[: i + 1]) for i in range(len(values))]
        dvalues = [dvalues[e - w : e] for e, w in zip(ends, plan.widths, strict=True)]
    else:
        dvalues = [_dot(dout, p, 0, 0) for dout in douts]
    dk = _dot(scaled, ds, 0, 0)  # [d, keys]
    if plan.shared:
        dk, dvalues = dk + dvalues[0], dvalues[1:]
    return [plan.scale * dq, dk, *dvalues, *more]


def _dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    return jax.lax.dot_general(
        a, b, (((over_a,), (over_b,)), ((), ())),
        precision=precision(a.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip


def _rows_from(plan, step: Any, start: int, size: int) -> Any:
    """Rows of this grid step, counted among all rows of the launch."""
    if plan.row_blocks == 1:
        return pl.ds(start, size)
    return pl.ds(pl.multiple_of(step * plan.rows + start, 8), size)
