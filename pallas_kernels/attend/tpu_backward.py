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

# Groups in one grid step, where they are small.
MOST_GROUPS = 32

# Shares of the VMEM: of all that a kernel plans with, and of that for one grid step's blocks. The
# rest is for the float32 dq of all rows and its output, where several key blocks add to it; more
# rows than fit are split over several launches.
VMEM_SHARE = 0.9
BLOCKS_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the body of the kernel is specialised for; sizes are those of one grid step."""

    group_block: int
    pack: int  # groups that are worked on as one, under a mask
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

    @property
    def summed(self) -> bool:
        """Whether dk and dvalues add up over chunks of rows."""
        return self.row_blocks > 1 or self.rows > CHUNK_ROWS

    @property
    def pack_rows(self) -> int:
        """Rows that a pack sets aside for each of its groups: whole tiles."""
        return self.rows if self.pack == 1 else _tiled(self.rows)

    @property
    def pack_keys(self) -> int:
        """Keys that a pack sets aside for each of its groups."""
        return self.keys if self.pack == 1 else _tiled(self.keys)


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
    group_block, pack, rows, keys = _blocks(name, groups, n, s, d, widths, q.dtype, block_sizes)
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
    line = None if bias is None else bias.astype(jnp.float32) * LOG2E
    if s % keys:
        extra = key_blocks * keys - s
        line = jnp.zeros((groups, s), jnp.float32) if line is None else line
        line = jnp.pad(line, ((0, 0), (0, extra)), constant_values=MASKED)
        k, values = jax.tree.map(lambda x: _padded(x, extra), (k, values))
    plan = _Plan(
        group_block, pack, rows, row_blocks, keys, key_blocks, d, widths, tuple(gains), scale,
        shared, line is not None, pack == 1 and chips.current().name in WIDE,
    )  # fmt: skip
    lse, dlse = (_lines(x, pack, row_blocks, rows, plan.pack_rows) for x in (lse, dlse))
    arrays = [q, *outs, *douts, jnp.concatenate([lse, dlse], axis=2), k, *values]
    if line is not None:
        line = jnp.maximum(line, MASKED)
        arrays.append(_lines(line, pack, key_blocks, keys, plan.pack_keys))

    parts = _parts(row_blocks, rows, keys, key_blocks, d, widths, q.dtype)
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
        dbias = of_keys[-1].reshape(groups, key_blocks, plan.pack_keys)[..., :keys]
        dbias = dbias.reshape(groups, -1)[:, :s].astype(bias.dtype)
    return dq, dk, tuple(dvalues), dbias


def _lines(x: Array, pack: int, blocks: int, size: int, room: int) -> Array:
    """A vector of each group as one row for each block, or one for the groups of a pack."""
    x = jnp.pad(x.reshape(-1, blocks, size), ((0, 0), (0, 0), (0, room - size)))
    return x.reshape(-1, blocks, 1, pack * room)


def _tiled(length: int) -> int:
    """Rounded up to whole tiles of 16 rows."""
    return -(-length // 16) * 16


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


def _blocks(name, groups, n, s, d, widths, dtype, block_sizes) -> tuple[int, int, int, int]:
    """Groups, groups in a pack, rows and keys of a grid step: wishes made to fit."""
    size = jnp.dtype(dtype).itemsize
    step_scores = STEP_SCORES if size == 2 else STEP_SCORES // 6
    wish_keys = s if s * min(n, 2 * CHUNK_ROWS) <= step_scores else min(s, 1600)
    wish_rows = max(CHUNK_ROWS, step_scores // wish_keys)
    shape = {"rows": n, "keys": s, "dim": d, "width": sum(widths)}
    wishes = choose(
        name, shape, jnp.dtype(dtype).name, {"rows": wish_rows, "keys": wish_keys}, block_sizes
    )
    budget = int(BLOCKS_SHARE * chips.current().vmem)
    bytes_of = functools.partial(_bytes_of, d=d, widths=widths, size=size)
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
    group_block = pack = 1
    if rows == n and keys == s:
        room = min(MOST_GROUPS, step_scores // 8 // (n * s), budget // bytes_of(n, s))
        # A pack costs what its product of rows and keys costs: no more than one chunk's width.
        pack = _divisor(groups, CHUNK_ROWS // _tiled(max(n, s)))
        group_block = pack * _divisor(groups // pack, max(1, room // pack))
    return group_block, pack, rows, keys


def _bytes_of(rows: int, keys: int, *, d: int, widths: tuple[int, ...], size: int) -> int:
    """VMEM of one grid step's blocks (two of each), sums and scores."""
    width = d + sum(widths)
    moving = 2 * size * (rows * (2 * width) + 2 * keys * width)
    return moving + 4 * keys * width + 2 * (4 + size) * min(rows, CHUNK_ROWS) * keys


def _divisor(length: int, most: int) -> int:
    """The largest divisor of `length` up to `most`, at least 1."""
    return next((x for x in range(min(most, length), 1, -1) if length % x == 0), 1)


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


def _parts(row_blocks, rows, keys, key_blocks, d, widths, dtype) -> list[range]:
    """The row blocks of each launch: all, unless their dq must wait in VMEM and does not fit."""
    size = jnp.dtype(dtype).itemsize
    room = VMEM_SHARE * chips.current().vmem - _bytes_of(rows, keys, d=d, widths=widths, size=size)
    # Of dq: the float32 sums and two output buffers, in lanes of 128.
    fit = max(1, int(room) // (rows * -(-d // 128) * 128 * (4 + 2 * size)))
    launches = 1 if key_blocks == 1 else -(-row_blocks // fit)
    each = -(-row_blocks // launches)
    return [range(i, min(i + each, row_blocks)) for i in range(0, row_blocks, each)]


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
    packs = plan.group_block // plan.pack
    line_rows, line_keys = plan.pack * plan.pack_rows, plan.pack * plan.pack_keys
    row_line = pl.BlockSpec((packs, 1, 2, line_rows), lambda g, j, r: (g, first + r, 0, 0))
    key_line = pl.BlockSpec((packs, 1, 1, line_keys), lambda g, j, r: (g, j, 0, 0))
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
    scratch = []
    if plan.summed:
        scratch += [pltpu.VMEM((w, plan.keys), jnp.float32) for w in (d, *values)]
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
                jax.ShapeDtypeStruct(
                    (groups // plan.pack, plan.key_blocks, 1, line_keys), jnp.float32
                )
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
    left = iter(refs)
    take = lambda count: [next(left) for _ in range(count)]  # noqa: E731
    count = len(plan.widths)
    values = count - plan.shared
    (q,), outs, douts, (lines,) = take(1), take(count), take(count), take(1)
    keys, bias = take(1 + values), take(int(plan.biased))
    (dq,), targets, dbias = take(1), take(1 + values), take(int(plan.biased))
    sums = take((1 + values) * plan.summed)
    waiting = next(left) if plan.key_blocks > 1 else None
    j, step = pl.program_id(1), pl.program_id(2)

    if plan.row_blocks > 1:

        @pl.when(step == 0)
        def _():
            for ref in (*sums, *dbias):
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

    apart = [_apart(plan)] if plan.pack > 1 else []
    for pack in range(plan.group_block // plan.pack):
        g = pack * plan.pack
        here = [_packed(ref, g, plan.pack, plan.pack_keys) for ref in keys]
        masks = [ref[pack, 0] for ref in bias] + apart
        columns = jnp.transpose(lines[pack, 0])  # [rows, 2]
        lse, dlse = columns[:, :1], columns[:, 1:]
        grads = []
        for start in range(0, plan.rows, CHUNK_ROWS):
            chunk = slice(start, min(start + CHUNK_ROWS, plan.rows))
            of_rows = functools.partial(
                _packed, g=g, pack=plan.pack, room=plan.pack_rows, rows=chunk
            )
            part = chunk if plan.pack == 1 else slice(None)
            dq_chunk, *grads, line = _chunk(
                plan,
                of_rows(q),
                [of_rows(ref) for ref in outs],
                [of_rows(ref) for ref in douts],
                lse[part],
                dlse[part],
                here,
                masks,
            )
            if waiting is None:
                _unpack(dq, g, plan.pack, dq_chunk, chunk)
            else:
                at = _rows_from(plan, step, start, chunk.stop - start)
                waiting[at] = dq_chunk + jnp.where(j == 0, 0.0, waiting[at])
            fresh = plan.row_blocks == 1 and start == 0
            totals = [*zip(sums, grads, strict=False), *((x.at[pack, 0], line) for x in dbias)]
            for ref, more in totals:
                ref[...] = more if fresh else ref[...] + more
        if plan.row_blocks == 1:
            grads = [ref[...] for ref in sums] if plan.summed else grads
            for ref, grad in zip(targets, grads, strict=True):
                _unpack(ref, g, plan.pack, jnp.transpose(grad), slice(0, plan.keys))

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


def _apart(plan) -> Array:
    """What keeps the groups of a pack apart, added to the scores: [rows, keys] of a pack."""
    shape = plan.pack * plan.pack_rows, plan.pack * plan.pack_keys
    row, key = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1))
    first = jax.lax.div(row, jnp.int32(plan.pack_rows)) * plan.pack_keys
    return jnp.where((key >= first) & (key < first + plan.keys), 0.0, MASKED)


def _packed(ref, g: int, pack: int, room: int, rows: slice = slice(None)) -> Array:
    """Some rows of one group, or the groups of a pack below each other, with zeros between."""
    if pack == 1:
        return ref[g, rows]
    empty = jnp.zeros((room - ref.shape[1], ref.shape[2]), ref.dtype)
    pieces = [[ref[i], empty] if empty.size else [ref[i]] for i in range(g, g + pack)]
    return jnp.concatenate([x for piece in pieces for x in piece])


def _unpack(ref, g: int, pack: int, x: Array, rows: slice) -> None:
    """Writes some rows of one group, or those of all groups in a pack."""
    if pack == 1:
        ref[g, rows] = x.astype(ref.dtype)
        return
    room = x.shape[0] // pack
    for i in range(pack):
        ref[g + i] = x[i * room : i * room + ref.shape[1]].astype(ref.dtype)


def _chunk(plan, q, outs, douts, lse, dlse, keys, masks) -> list[Any]:
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
    x = sum(masks, x)
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
    line = jnp.sum(ds, axis=0, keepdims=True) if plan.biased else None
    ds, p = ds.astype(dtype), p.astype(dtype)
    if plan.turn:
        dq = jnp.transpose(_dot(k, jnp.transpose(ds), 0, 0))
    else:
        dq = _dot(ds, k, 1, 0)
    scaled = (wide(q) * plan.scale).astype(dtype)
    if plan.shared and len(values) == 1 and scaled.shape[0] % 16 == 0:
        # One deep product adds up both contributions inside the matmul unit.
        both = jnp.concatenate([scaled, douts[0]]), jnp.concatenate([ds, p])
        return [plan.scale * dq, _dot(*both, 0, 0), line]
    if joined:
        dvalues = _dot(jnp.concatenate(douts, axis=1), p, 0, 0)  # [sum(widths), keys]
        ends = [sum(plan.widths[: i + 1]) for i in range(len(values))]
        dvalues = [dvalues[e - w : e] for e, w in zip(ends, plan.widths, strict=True)]
    else:
        dvalues = [_dot(dout, p, 0, 0) for dout in douts]
    dk = _dot(scaled, ds, 0, 0)  # [d, keys]
    if plan.shared:
        dk, dvalues = dk + dvalues[0], dvalues[1:]
    return [plan.scale * dq, dk, *dvalues, line]


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
