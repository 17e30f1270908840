"""The backward pass of the L step on a TPU: up to 128 frames, in packed products.

With `x = scale q . k - shift` and `P = exp(x - lse)`, for a position and its cotangents,

    last:    dP[l,k]  = sum_v gain_v dout_v[l] . value_v[k]
             dS       = P (dP - sum_k P dP + dlse[l])
             dq[l]    = scale sum_k dS k[k] ;  dk[k] = scale sum_l dS q[l]
             dshift[k] = -sum_l dS ;  dvalue_v[k] = gain_v sum_l P dout_v[l]

    middle:  L = softmax_k x ;  w[k] = max(sum_l L, floor) ;  G[l,k] = q[l] . dqt[k]
             dL       = G / w[k] - (sum_l L G / w[k]^2 where sum_l L > floor)
             dS       = L (dL - sum_k L dL)
             dq[l]    = sum_k dS aL[k] + L / w[k] dqt[k] ;  daL[k] = sum_l dS q[l]
             dcL[k]   = -sum_l dS

Every sum over rows or keys is at hand, so neither `out` nor `qt` is read again: `sum_k P dP`
is `dout . out`, and `sum_l L G` is `w qt . dqt`.

`last` has its keys as the rows of a product, which leaves one transpose (of dS, for dq); `middle`
has its queries, for the same reason.
"""

import dataclasses
import functools
from collections.abc import Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..numerics import MASKED, TINY_MASS, precision
from ..tpu import chips
from ..tpu.call import available, launch, slow_path_wanted
from ..tpu.table import choose
from .packing import LANES, STEP, Packing, from_lines, load, packing, store, to_lines

LOG2E = 1.4426950408889634

# Sums of 2^x between which no shift is needed, as in the forward pass.
LARGEST = 2.0**60
SMALLEST = 2.0**-60

# A log-sum-exp so large that nothing is left of the row.
NOTHING = -MASKED

# Rows of a packed array that a strided load steps over: an odd number of tiles, or the loads of
# 8 frames meet in one bank of the memory and are made one by one.
TILE = 16


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a body is specialised for; `block` positions make a grid step, `n` the whole."""

    packing: Packing
    n: int
    block: int
    scale: float = 1.0
    gains: tuple[float, ...] = ()
    floor: float = 0.0
    weighed: bool = False  # some rows weigh nothing
    want_shift: bool = True

    @property
    def products(self) -> int:
        return self.block // self.packing.positions

    @property
    def steps(self) -> int:
        return pl.cdiv(self.n, self.block)


def last_backward(
    q: Float[Array, "g m n d"],
    k: Float[Array, "g M n d"],
    shift: Float[Array, "g M n"] | None,
    values: tuple[Float[Array, "g M n _"], ...],
    outs: Any,
    lse: Float[Array, "g m n"],
    douts: tuple[Float[Array, "g m n _"], ...],
    dlse: Float[Array, "g m n"] | None,
    *,
    scale: float = 1.0,
    gains: tuple[float, ...] | None = None,
    key_blocks: Bool[Array, "g M"] | Bool[Array, "g M n"] | None = None,
    block_sizes: BlockSizes,
) -> tuple[Array, Array, Array | None, tuple[Array, ...]]:
    """`(dq, dk, dshift, dvalues)` of softmax attention of each position over its key blocks.

    `dshift` is float32, and `None` if `shift` is; the others have the dtypes of what they are
    gradients of. A row whose `lse` is -inf (no key block) gets and gives nothing.

    Raises:
        NotImplementedError: if a position has more than 128 rows or key blocks.
    """
    del outs  # sum_k P dP is as good
    m, n, keys = q.shape[1], q.shape[2], k.shape[1]
    widths = tuple(v.shape[-1] for v in values)
    bias = _bias(shift, key_blocks, (q.shape[0], keys, n))
    lse = jnp.where(lse == -jnp.inf, NOTHING, lse)
    offset = jnp.zeros_like(lse) if dlse is None else -dlse
    douts = tuple(x.astype(q.dtype) for x in douts)
    q, k, bias, lse, offset, *rest = _fitted(
        q.dtype, m, keys, q, k, bias, lse, offset, *values, *douts
    )
    values, douts = rest[: len(widths)], rest[len(widths) :]  # pyright: ignore[reportAssignmentType]
    lse = lse.at[:, m:].set(NOTHING).at[:, :, n:].set(NOTHING)
    bias = bias.at[:, keys:].set(MASKED)
    plan = _plan("l_step_last_backward", q, k, widths, block_sizes)
    plan = dataclasses.replace(
        plan,
        scale=scale,
        gains=gains or (1.0,) * len(widths),
        want_shift=shift is not None,
    )
    lines = [_lines(plan, bias * LOG2E, MASKED), _lines(plan, lse * LOG2E, NOTHING)]
    if dlse is not None:
        lines.append(_lines(plan, offset, 0.0))
    g, rows, n_padded, d = q.shape
    results = [q, k, *values]
    out_specs = [_positions(plan, x) for x in results]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
    if shift is not None:
        out_specs.append(_line_spec(plan))
        out_shape.append(jax.ShapeDtypeStruct(lines[0].shape, jnp.float32))
    size = jnp.dtype(q.dtype).itemsize
    arrays = [q, k, *values, *douts]
    moved = sum(x.size for x in arrays) + sum(x.size for x in results)
    dq, dk, *rest = launch(
        functools.partial(_last_kernel, plan),
        name="l_step_last_backward",
        grid=(g, plan.steps),
        in_specs=[_positions(plan, x) for x in arrays] + [_line_spec(plan)] * len(lines),
        out_specs=out_specs,
        out_shape=out_shape,
        semantics=("parallel", "parallel"),
        flops=2 * g * rows * k.shape[1] * n_padded * (3 * d + 2 * sum(widths)),
        exps=g * rows * k.shape[1] * n_padded,
        moved=size * moved + 4 * (2 + plan.want_shift) * g * n_padded * rows,
        blocks={"positions": plan.block},
    )(*arrays, *lines)
    dshift = None
    if shift is not None:
        dshift = -from_lines(plan.packing, rest.pop(), k.shape[1], n_padded)[:, :keys, :n]
    dk, *dvalues = (x[:, :keys, :n] for x in (dk, *rest))
    return dq[:, :m, :n], dk, dshift, tuple(dvalues)


def middle_backward(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    qt: Any,
    dqt: Float[Array, "g M n d"],
    *,
    floor: float,
    queries: Bool[Array, "g m n"] | None = None,
    key_blocks: Bool[Array, "g M"] | None = None,
    want_dcl: bool = True,
    block_sizes: BlockSizes,
) -> tuple[Array, Array, Array | None]:
    """`(dq, dal, dcl)` of the mean queries; `dcl` is float32, or `None` where it is not wanted.

    Raises:
        NotImplementedError: if a position has more than 128 rows or key blocks.
    """
    del qt  # sum_l L G is as good
    m, n, keys = q.shape[1], q.shape[2], al.shape[1]
    bias = _bias(cl, key_blocks, cl.shape)
    if queries is None and m < STEP < keys:
        queries = jnp.ones(q.shape[:3], bool)
    dqt = dqt.astype(q.dtype)
    weights = None if queries is None else queries.astype(jnp.float32)
    q, al, bias, dqt, *rest = _fitted(
        q.dtype, m, keys, q, al, bias, dqt, *([] if weights is None else [weights])
    )
    bias = bias.at[:, keys:].set(MASKED)
    plan = _plan("l_step_middle_backward", q, al, (), block_sizes)
    plan = dataclasses.replace(
        plan, floor=max(floor, TINY_MASS), weighed=bool(rest), want_shift=want_dcl
    )
    lines = [_lines(plan, bias * LOG2E, MASKED)]
    if rest:
        lines.append(_lines(plan, rest[0], 0.0))
    g, rows, n_padded, d = q.shape
    arrays = [q, al, dqt]
    out_specs = [_positions(plan, q), _positions(plan, al)]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, al)]
    if want_dcl:
        out_specs.append(_line_spec(plan))
        out_shape.append(jax.ShapeDtypeStruct(lines[0].shape, jnp.float32))
    size = jnp.dtype(q.dtype).itemsize
    dq, dal, *rest = launch(
        functools.partial(_middle_kernel, plan),
        name="l_step_middle_backward",
        grid=(g, plan.steps),
        in_specs=[_positions(plan, x) for x in arrays] + [_line_spec(plan)] * len(lines),
        out_specs=out_specs,
        out_shape=out_shape,
        semantics=("parallel", "parallel"),
        flops=10 * g * rows * al.shape[1] * n_padded * d,
        exps=g * rows * al.shape[1] * n_padded,
        moved=g * n_padded * (size * d * (2 * rows + 3 * al.shape[1]) + 8 * al.shape[1]),
        blocks={"positions": plan.block},
    )(*arrays, *lines)
    dcl = None
    if want_dcl:
        dcl = -from_lines(plan.packing, rest[0], al.shape[1], n_padded)[:, :keys, :n]
    return dq[:, :m, :n], dal[:, :keys, :n], dcl


def _bias(shift: Array | None, key_blocks: Array | None, shape: tuple[int, ...]) -> Array:
    """What is added to the scores: `-shift`, or MASKED for a key block that is left out."""
    bias = jnp.zeros(shape, jnp.float32) if shift is None else -shift.astype(jnp.float32)
    if key_blocks is None:
        return bias
    kept = key_blocks if key_blocks.ndim == 3 else key_blocks[..., None]
    return jnp.where(kept, bias, MASKED)


def _fitted(dtype: Any, m: int, keys: int, *arrays: Array) -> list[Array]:
    """Arrays whose positions fill products, and at least one step of 8 frames where needed.

    Only odd sizes are copied: a grid of 21x30x52, say, is left as it is.
    """
    if not available():
        raise NotImplementedError("the kernels of the L step need a TPU")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the kernels of the L step take no {jnp.dtype(dtype).name}")
    n = arrays[0].shape[2]
    unit = packing(m, keys, dtype).group
    unit = max(unit, TILE) if n < TILE else unit
    more_n = -n % unit
    fewest = STEP if max(m, keys) > STEP else 0

    def fitted(x: Array) -> Array:
        more = max(0, fewest - x.shape[1])
        if more_n == more == 0:
            return x
        return jnp.pad(x, ((0, 0), (0, more), (0, more_n)) + ((0, 0),) * (x.ndim - 3))

    return [fitted(x) for x in arrays]


def _plan(name: str, q: Array, k: Array, widths: tuple[int, ...], block_sizes: Any) -> _Plan:
    """The packing, and positions in a grid step: blocks of about equal size that fit VMEM."""
    _, rows, n, d = q.shape
    keys = k.shape[1]
    pack = packing(rows, keys, q.dtype)
    dtype = jnp.dtype(q.dtype)
    shape = {"rows": rows, "keys": keys, "positions": n, "dim": d, "width": sum(widths)}
    wish = choose(name, shape, dtype.name, _defaults(pack), block_sizes)["positions"]
    lanes = [pl.cdiv(w, LANES) * LANES for w in (d, *widths)]
    if widths:  # q and dq, k and dk, values and theirs, and the cotangents
        width = 2 * (rows + keys) * lanes[0] + (rows + 2 * keys) * sum(lanes[1:])
    else:
        width = (2 * rows + 3 * keys) * lanes[0]
    unit = max(TILE, pack.group)
    most = int(0.8 * chips.current().vmem) // (2 * dtype.itemsize * width) // unit
    if most < 1:
        raise NotImplementedError(f"{unit} positions of {rows} + {keys} frames do not fit VMEM")
    units = min(pl.cdiv(wish, unit), most, pl.cdiv(n, unit))
    units = pl.cdiv(pl.cdiv(n, unit), pl.cdiv(pl.cdiv(n, unit), units))
    if units % 2 == 0:
        units += 1 if units < most else -1
    return _Plan(pack, n, units * unit)


def _defaults(pack: Packing) -> dict[str, int]:
    """Positions of a grid step: a body of about 28 products."""
    return {"positions": min(112, max(TILE, 28 * pack.positions))}


def _positions(plan: _Plan, x: Any) -> pl.BlockSpec:
    _, frames, _, d = x.shape
    return pl.BlockSpec((1, frames, plan.block, d), lambda g, s: (g, 0, s, 0))


def _line_spec(plan: _Plan) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, plan.products, LANES), lambda g, s: (g, s, 0, 0))


def _lines(plan: _Plan, x: Array, repeated: float) -> Array:
    lines = to_lines(plan.packing, x, plan.steps, plan.block, repeated)
    return jnp.clip(lines, MASKED, NOTHING)


def _dot(x: Any, y: Any, contracted: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())),
        precision=precision(x.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip


def _last_kernel(plan: _Plan, q_ref: Any, k_ref: Any, *refs: Any) -> None:
    """One grid step of `last`: keys are the rows of a product, queries its columns."""
    pack = plan.packing
    count = len(plan.gains)
    value_refs, dout_refs, refs = refs[:count], refs[count : 2 * count], refs[2 * count :]
    lines, refs = (
        refs[: len(refs) - 2 - count - plan.want_shift],
        refs[-2 - count - plan.want_shift :],
    )
    bias_ref, lse_ref, *offset_ref = lines
    dq_ref, dk_ref, *refs = refs  # pyright: ignore[reportAssignmentType]
    dvalue_refs, dshift_ref = refs[:count], refs[count:]
    tall, wide = pack.height(pack.keys), pack.height(pack.rows)
    columns = _columns(bias_ref[0, 0])  # [LANES, products]

    def product(q, k, values, douts, index):
        line = pl.ds(index, 1)
        x = _dot(k, q, ((1,), (1,))) * (plan.scale * LOG2E)
        yield
        dp = sum(
            _scaled(_dot(v, do, ((1,), (1,))), gain)
            for v, do, gain in zip(values, douts, plan.gains, strict=True)
        )
        yield
        lse = _per_position(pack, pack.keys, lse_ref[0, 0, line, :wide], NOTHING)
        p = jnp.exp2(x + columns[:tall, index : index + 1] - lse)  # [tall, wide]
        offset = jnp.sum(p * dp, axis=0, keepdims=True)  # [1, wide]
        if offset_ref:
            offset = offset + offset_ref[0][0, 0, line, :wide]
        ds = p * (dp - offset)
        yield
        across = jnp.transpose(ds)  # [wide, tall]
        p = p.astype(q.dtype)
        dvalues = [
            _scaled(_dot(p, do, ((1,), (0,))), gain)
            for do, gain in zip(douts, plan.gains, strict=True)
        ]
        yield
        if dshift_ref:
            dshift_ref[0][0, 0, line, :tall] = jnp.sum(across, axis=0, keepdims=True)
        dq = _scaled(_dot(across.astype(k.dtype), k, ((1,), (0,))), plan.scale)
        dk = _scaled(_dot(ds.astype(q.dtype), q, ((1,), (0,))), plan.scale)
        yield
        return dq, dk, *dvalues

    def group(index):
        qs = load(pack, q_ref, index, pack.rows)
        ks = load(pack, k_ref, index, pack.keys)
        values = [load(pack, ref, index, pack.keys) for ref in value_refs]
        douts = [load(pack, ref, index, pack.rows) for ref in dout_refs]
        results = yield from _together(
            product(
                qs[half],
                ks[half],
                [v[half] for v in values],
                [do[half] for do in douts],
                index * pack.halves + half,
            )
            for half in range(pack.halves)
        )
        frames = (pack.rows, *(pack.keys,) * (1 + count))
        refs = (dq_ref, dk_ref, *dvalue_refs)
        for ref, n, halves in zip(refs, frames, zip(*results, strict=True), strict=True):
            store(pack, ref, index, n, list(halves))

    _staggered(group(index) for index in range(plan.products // pack.halves))


def _middle_kernel(plan: _Plan, q_ref: Any, al_ref: Any, dqt_ref: Any, *refs: Any) -> None:
    """One grid step of `middle`: queries are the rows of a product, keys its columns."""
    pack = plan.packing
    bias_ref, *refs = refs  # pyright: ignore[reportAssignmentType]
    weight_ref, refs = refs[: plan.weighed], refs[plan.weighed :]
    dq_ref, dal_ref, *dcl_ref = refs
    tall, wide = pack.height(pack.rows), pack.height(pack.keys)
    if weight_ref:
        columns = _columns(weight_ref[0][0, 0])  # [LANES, products]
    once = _once(pack, pack.rows)

    def product(q, al, dqt, index, careful):
        line = pl.ds(index, 1)
        x = _dot(q, al, ((1,), (1,))) * LOG2E
        yield
        g = _dot(q, dqt, ((1,), (1,)))  # [tall, wide]
        yield
        x = x + _per_position(pack, pack.rows, bias_ref[0, 0, line, :wide], MASKED)
        if careful:
            top = jnp.max(x, axis=1, keepdims=True)
            p = jnp.where(x <= MASKED / 2, 0.0, jnp.exp2(x - top))
        else:
            p = jnp.exp2(x)
        yield
        total = jnp.sum(p, axis=1, keepdims=True)  # [tall, 1]
        yield
        over = 1 / (jnp.where(total == 0, 1.0, total) if careful else total)
        if weight_ref:
            over = over * _column(columns, index, tall)
        elif once is not None:
            over = over * once
        p = p * over
        mass = jnp.sum(p, axis=0, keepdims=True)  # [1, wide]
        pull = jnp.sum(p * g, axis=0, keepdims=True)
        yield
        over = 1 / jnp.maximum(mass, plan.floor)
        dmass = jnp.where(mass > plan.floor, -pull * over * over, 0.0)
        dp = g * over + dmass
        yield
        mean = jnp.sum(p * dp, axis=1, keepdims=True)
        yield
        ds = p * (dp - mean)
        if dcl_ref:
            dcl_ref[0][0, 0, line, :wide] = jnp.sum(ds, axis=0, keepdims=True)
        across = jnp.transpose(ds)
        yield
        sides = _in_lanes(ds.astype(q.dtype)), _in_lanes((p * over).astype(q.dtype))
        others = jnp.concatenate([_in_lanes(al, 0), _in_lanes(dqt, 0)])  # [2 * LANES, d]
        dq = _dot(jnp.concatenate(sides, axis=1), others, ((1,), (0,)))
        yield
        dal = _dot(across.astype(q.dtype), q, ((1,), (0,)))
        yield
        return dq, dal, total

    def group(index, careful):
        qs = load(pack, q_ref, index, pack.rows)
        als = load(pack, al_ref, index, pack.keys)
        dqts = load(pack, dqt_ref, index, pack.keys)
        results = yield from _together(
            product(q, al, dqt, index * pack.halves + half, careful)
            for half, (q, al, dqt) in enumerate(zip(qs, als, dqts, strict=True))
        )
        dqs, dals, totals = zip(*results, strict=True)
        store(pack, dq_ref, index, pack.rows, list(dqs))
        store(pack, dal_ref, index, pack.keys, list(dals))
        return totals

    groups = plan.products // pack.halves
    left = plan.n - pl.program_id(1) * plan.block
    least = most = jnp.ones((tall, 1), jnp.float32)
    for index, totals in enumerate(
        _staggered(group(index, careful=False) for index in range(groups))
    ):
        for total in totals:
            if plan.n % plan.block:  # positions past the end hold anything
                total = jnp.where(index * pack.group < left, total, 1.0)
            least, most = jnp.minimum(least, total), jnp.maximum(most, total)
    if not slow_path_wanted():
        return
    fine = (least >= SMALLEST) & (most <= LARGEST)

    @pl.when(jnp.logical_not(jnp.all(fine)))
    def _():
        def one(index, _):
            _staggered([group(index, careful=True)])
            return 0

        jax.lax.fori_loop(0, groups, one, 0)


def _staggered(tasks: Iterable[Generator[None, None, Any]]) -> list[Any]:
    """What the tasks return, each a stage behind the one before it.

    The compiler keeps about to the order of the source. Stages of several products side by side
    let one wait for the matrix unit while others compute.
    """
    live: dict[int, Generator[None, None, Any]] = {}
    results = {}
    waiting = enumerate(tasks)
    more = True
    while more or live:
        index, task = next(waiting, (-1, None))
        more = task is not None
        if task is not None:
            live[index] = task
        for index in sorted(live, reverse=True):  # loads before stores
            try:
                next(live[index])
            except StopIteration as end:
                results[index] = end.value
                del live[index]
    return [results[index] for index in sorted(results)]


def _together(tasks: Iterable[Generator[None, None, Any]]) -> Generator[None, None, list[Any]]:
    """What the tasks return, stage by stage at the same time."""
    tasks = list(tasks)
    while True:
        results = []
        for task in tasks:
            try:
                next(task)
            except StopIteration as end:
                results.append(end.value)
        if results:
            return results
        yield


def _in_lanes(x: Any, axis: int = 1) -> Any:
    """`x` with zeros up to 128, where another one may begin."""
    shape = list(x.shape)
    shape[axis] = LANES - x.shape[axis]
    return jnp.concatenate([x, jnp.zeros(shape, x.dtype)], axis) if shape[axis] else x


def _scaled(x: Any, factor: float) -> Any:
    return x if factor == 1 else x * factor


def _columns(lines: Any) -> Any:
    """`[products, 128]` across: column i holds the numbers of product i."""
    more = -lines.shape[0] % LANES
    if more:
        lines = jnp.concatenate([lines, jnp.zeros((more, LANES), lines.dtype)])
    return jnp.transpose(lines)


def _column(columns: Any, index: Any, tall: int) -> Any:
    """`[tall, 1]`: column `index`, which may be traced."""
    if isinstance(index, int):
        return columns[:tall, index : index + 1]
    lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    return jnp.sum(jnp.where(lane == index, columns, 0.0), axis=1, keepdims=True)[:tall]


def _per_position(pack: Packing, frames: int, line: Any, other: float) -> Any:
    """`line`, `[1, columns]`, for each of the product's rows; `other` where positions differ.

    The rows of a load repeat after 8, or after the sides of a slab: one such tile is made, and
    stands for all of them.
    """
    if pack.positions == 1:
        return line
    wide = line.shape[1]
    tile = max(STEP, pack.side)
    other_frames = wide // pack.positions
    shape = (tile, wide)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    same_side = row % pack.side == column % pack.side
    column_load = jax.lax.div(column, jnp.int32(other_frames * pack.side))
    tiles = []
    for i in range(pack.loads):
        one = jnp.where(same_side & (column_load == i), line, other)
        tiles += [one] * (pack.padded(frames) * pack.side // tile)
    return jnp.concatenate(tiles) if len(tiles) > 1 else tiles[0]


def _once(pack: Packing, frames: int) -> Any:
    """`[rows, 1]`: 0 for rows that stand for a frame seen already; `None` where there are none."""
    places = pack.twice(frames)
    if not places:
        return None
    row = jax.lax.broadcasted_iota(jnp.int32, (pack.height(frames), 1), 0)
    frame = jax.lax.div(row, jnp.int32(pack.side)) % pack.padded(frames)
    return jnp.where((frame >= places.start) & (frame < places.stop), 0.0, 1.0)
