"""The L step of up to 128 frames on a TPU: packed products, all of a position's scores at once.

    x[l,k] = (scale q[l] . k[k] + shift[k]) log2 e                 (masked keys left out)
    last:    l[l] = sum_k 2^x ;  out[l] = gain / l[l] * sum_k 2^x values[k] ;  lse = ln l
    middle:  Z[l] = sum_k 2^x ;  L = 2^x / Z ;  qt[k] = sum_l L q[l] / max(sum_l L, floor)

`last` has its queries as the rows of a product. `middle` has its keys as the rows: then the sum
over `l` is an ordinary product, and Z is a sum over rows, which needs no lanes to be moved.

The softmax is optimistic: no row maximum is taken while the sums stay far from overflow and
underflow, which is checked; else the grid step is done again with the maxima.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..numerics import MASKED, precision
from ..tpu import chips
from ..tpu.call import launch, slow_path_wanted
from ..tpu.mode import interpreting
from ..tpu.table import choose
from .packing import (
    LANES,
    STEP,
    Packing,
    from_lines,
    load,
    once,
    packing,
    same_position,
    store,
    to_lines,
)

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# Sums of 2^x between which no shift is needed: terms lost to underflow (2^-126 each) are below
# 2^-66 of the sum, and 2^60 values of any sensible size still add up in float32.
LARGEST = 2.0**60
SMALLEST = 2.0**-60

# Products whose stages are traced side by side: one alone waits for its own results
# most of the time, many keep too much alive.
LAST_WIDTH = 8
MIDDLE_WIDTH = 6

# Positions of a grid step where nothing is known better.
POSITIONS = 112


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a body is specialised for; `block` positions make a grid step, `n` the whole."""

    packing: Packing
    n: int
    block: int
    scale: float
    gains: tuple[float, ...] = ()
    shared: bool = False  # the first of the values is K itself
    floor: float = 0.0
    weighed: bool = False  # some rows weigh nothing

    @property
    def products(self) -> int:
        return self.block // self.packing.positions


def last(
    q: Float[Array, "g m n d"],
    k: Float[Array, "g M n d"],
    values: tuple[Float[Array, "g M n _"], ...],
    shift: Float[Array, "g M n"],
    *,
    scale: float,
    gains: tuple[float, ...],
    shared: bool,
    block_sizes: BlockSizes,
) -> tuple[tuple[Array, ...], Float[Array, "g m n"]]:
    """`(outs, lse)`; with `shared`, K stands before `values` as one of them and is read once.

    `shift` is MASKED for keys that are left out; a row without keys gives zeros and -inf.

    Raises:
        NotImplementedError: if the frames are too many for a product.
    """
    m, n = q.shape[1], q.shape[2]
    q, k, shift, *values = _fitted(q, k, shift, *values)  # pyright: ignore[reportAssignmentType]
    widths = ((k.shape[-1],) if shared else ()) + tuple(v.shape[-1] for v in values)
    plan, steps = _plan("l_step_last", q, k, sum(widths), block_sizes)
    plan = dataclasses.replace(plan, scale=scale, gains=gains, shared=shared)
    g, rows, padded_n, d = q.shape
    keys = k.shape[1]
    lines = to_lines(plan.packing, shift * LOG2E, steps, plan.block, MASKED)
    lines = jnp.maximum(lines, MASKED)
    size = jnp.dtype(q.dtype).itemsize
    read = rows * d + keys * (d + sum(v.shape[-1] for v in values))
    *outs, sums = launch(
        functools.partial(_last_kernel, plan),
        name="l_step_last",
        grid=(g, steps),
        in_specs=[
            _positions(plan, q),
            *(_positions(plan, x) for x in (k, *values)),
            _lines(plan),
        ],
        out_specs=[
            *(
                _positions(plan, jax.ShapeDtypeStruct((g, rows, padded_n, w), q.dtype))
                for w in widths
            ),
            _lines(plan),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct((g, rows, padded_n, w), q.dtype) for w in widths),
            jax.ShapeDtypeStruct(lines.shape, jnp.float32),
        ],
        semantics=("parallel", "parallel"),
        flops=2 * g * rows * keys * padded_n * (d + sum(widths)),
        exps=g * rows * keys * padded_n,
        moved=g * padded_n * (size * (read + rows * sum(widths)) + 4 * (rows + keys)),
        blocks={"positions": plan.block},
    )(q, k, *values, lines)
    lse = from_lines(plan.packing, sums, rows, padded_n)
    return tuple(out[:, :m, :n] for out in outs), lse[:, :m, :n]


def middle(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    shift: Float[Array, "g M n"],
    queries: Bool[Array, "g m n"] | None,
    *,
    floor: float,
    block_sizes: BlockSizes,
) -> Float[Array, "g M n d"]:
    """The mean queries; `shift` is `-cL`, MASKED for key blocks that are left out.

    Raises:
        NotImplementedError: if the frames are too many for a product.
    """
    m, n = q.shape[1], q.shape[2]
    if queries is None and m < STEP < al.shape[1]:
        queries = jnp.ones(q.shape[:3], bool)
    q, al, shift, weights = _fitted(q, al, shift, queries)
    plan, steps = _plan("l_step_middle", q, al, al.shape[-1], block_sizes)
    plan = dataclasses.replace(plan, floor=floor, weighed=queries is not None)
    g, rows, padded_n, d = q.shape
    keys = al.shape[1]
    lines = to_lines(plan.packing, shift * LOG2E, steps, plan.block, MASKED)
    arrays = [q, al, jnp.maximum(lines, MASKED)]
    specs = [_positions(plan, q), _positions(plan, al), _lines(plan)]
    if weights is not None:
        real = to_lines(plan.packing, weights.astype(jnp.float32), steps, plan.block, 0.0)
        arrays.append(real)
        specs.append(_lines(plan))
    size = jnp.dtype(q.dtype).itemsize
    qt = launch(
        functools.partial(_middle_kernel, plan),
        name="l_step_middle",
        grid=(g, steps),
        in_specs=specs,
        out_specs=_positions(plan, al),
        out_shape=jax.ShapeDtypeStruct(al.shape, q.dtype),
        scratch=[pltpu.VMEM((plan.products, LANES), jnp.float32)],
        semantics=("parallel", "parallel"),
        flops=4 * g * rows * keys * padded_n * d,
        exps=g * rows * keys * padded_n,
        moved=g * padded_n * (size * d * (rows + 2 * keys) + 4 * keys),
        blocks={"positions": plan.block},
    )(*arrays)
    return qt[:, :, :n]


def _fitted(q: Array, *others: Array | None) -> list[Any]:
    """Arrays whose positions fill products, and at least one step of 8 frames where needed.

    Only odd sizes are copied: a grid of 21x30x52, say, is left as it is.
    """
    m, n = q.shape[1], q.shape[2]
    keys = others[0].shape[1]  # pyright: ignore[reportOptionalMemberAccess]
    unit = packing(m, keys, q.dtype).group
    unit = max(unit, 16) if n < 16 else unit
    more_n = -n % unit
    more_m = max(0, STEP - m) if keys > STEP else 0

    def fitted(x: Array | None) -> Array | None:
        if x is None or more_n == more_m == 0:
            return x
        more = more_m if x.shape[1] == m and x.shape[1] < keys else 0
        tail = ((0, 0),) * (x.ndim - 3)
        return jnp.pad(x, ((0, 0), (0, more), (0, more_n), *tail))

    return [fitted(x) for x in (q, *others)]


def _plan(name, q, k, width, block_sizes) -> tuple[_Plan, int]:
    """The packing and the number of grid steps: blocks of positions of about equal size."""
    _, rows, n, d = q.shape
    keys = k.shape[1]
    pack = packing(rows, keys, q.dtype)
    shape = {"rows": rows, "keys": keys, "positions": n, "dim": d, "width": width}
    wish = choose(name, shape, jnp.dtype(q.dtype).name, {"positions": POSITIONS}, block_sizes)[
        "positions"
    ]
    unit = max(16, pack.group)
    bytes_each = 2 * jnp.dtype(q.dtype).itemsize * (rows + keys) * (max(d, LANES) + width)
    most = int(0.8 * chips.current().vmem) // bytes_each
    wish = min(wish, most, n)
    steps = pl.cdiv(n, max(wish, 1))
    block = pl.cdiv(pl.cdiv(n, steps), unit) * unit
    if block > max(most, unit):
        block = max(block - unit, unit)
    if block > most:
        raise NotImplementedError(f"{unit} positions of {rows} + {keys} frames do not fit VMEM")
    return _Plan(pack, n, block, 1.0), pl.cdiv(n, block)


def _positions(plan: _Plan, x: Any) -> pl.BlockSpec:
    _, frames, _, d = x.shape
    return pl.BlockSpec((1, frames, plan.block, d), lambda g, s: (g, 0, s, 0))


def _lines(plan: _Plan) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, plan.products, LANES), lambda g, s: (g, s, 0, 0))


def _dot(x, y, contracted):
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())),
        precision=precision(x.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip


def _last_kernel(plan: _Plan, q_ref: Any, k_ref: Any, *refs: Any) -> None:
    """One grid step: `block` positions, a group of them at a time."""
    pack = plan.packing
    count = len(plan.gains)
    v_refs, refs = refs[: count - plan.shared], refs[count - plan.shared :]
    shift_ref, *out_refs, line_ref = refs
    tall, wide = pack.height(pack.rows), pack.height(pack.keys)
    same = same_position(pack, pack.rows, pack.keys)

    def group(index: Any, careful: bool) -> Iterator[None]:
        qs = load(pack, q_ref, index, pack.rows)
        ks = load(pack, k_ref, index, pack.keys)
        vs = [load(pack, ref, index, pack.keys) for ref in v_refs]
        lines = [pl.ds(index * pack.halves + half, 1) for half in range(pack.halves)]
        xs = [_dot(q, k, ((1,), (1,))) for q, k in zip(qs, ks, strict=True)]
        yield
        outs = [[] for _ in out_refs]
        for half, (x, line) in enumerate(zip(xs, lines, strict=True)):
            x = x * (plan.scale * LOG2E) + shift_ref[0, 0, line, :wide]  # [tall, wide]
            if same is not None:
                x = jnp.where(same, x, MASKED)
            top = None
            if careful:
                top = jnp.max(x, axis=1, keepdims=True)
                # Every key of a row may be masked: no weight then.
                p = jnp.where(x <= MASKED / 2, 0.0, jnp.exp2(x - top))
            else:
                p = jnp.exp2(x)
            total = jnp.sum(p, axis=1, keepdims=True)  # [tall, 1]
            over = 1 / (jnp.where(total == 0, 1.0, total) if careful else total)
            values = ([ks[half]] if plan.shared else []) + [v[half] for v in vs]
            for out, v, gain in zip(outs, values, plan.gains, strict=True):
                y = _dot(p.astype(v.dtype), v, ((1,), (0,)))
                out.append((y, over * gain if gain != 1 else over))
            row = _as_row(total)  # [1, LANES]
            if careful:
                row = _as_row(top) + jnp.log2(row)
            line_ref[0, 0, line, :] = row
        yield
        for ref, out in zip(out_refs, outs, strict=True):
            store(pack, ref, index, pack.rows, [y * over for y, over in out])

    groups = plan.products // pack.halves
    _all(groups, functools.partial(group, careful=False), LAST_WIDTH // pack.halves)
    sums = line_ref[0, 0]  # [products, LANES]
    line_ref[0, 0] = jnp.log2(sums) * LN2
    if not slow_path_wanted():
        return

    @pl.when(_unsound(plan, sums, tall))
    def _():
        _loop(groups, functools.partial(group, careful=True))
        line_ref[0, 0] = line_ref[0, 0] * LN2


def _middle_kernel(plan: _Plan, q_ref: Any, al_ref: Any, shift_ref: Any, *refs: Any) -> None:
    """One grid step: `block` positions, a group of them at a time, keys as rows."""
    pack = plan.packing
    *weight_ref, qt_ref, sum_ref = refs
    tall, wide = pack.height(pack.keys), pack.height(pack.rows)
    same = same_position(pack, pack.keys, pack.rows)
    weight = once(pack, pack.rows)[:, :wide] if pack.twice(pack.rows) else None
    columns = jnp.transpose(_square(shift_ref[0, 0]))  # [LANES, LANES or more]

    def means_and_masses(p: Any, q: Any) -> tuple[Any, Any]:
        """`p @ q` and the sums of the rows of `p`, `[tall, d]` and `[tall, 1 or d]`."""
        rounded = p.astype(q.dtype)
        if q.shape[1] != LANES or q.dtype != jnp.bfloat16:
            return _dot(rounded, q, ((1,), (0,))), jnp.sum(p, axis=1, keepdims=True)
        # A column of ones for each lane: the matrix unit has time left, the one for lanes has not.
        both = _dot(rounded, jnp.concatenate([q, jnp.ones_like(q)], axis=1), ((1,), (0,)))
        return both[:, :LANES], both[:, LANES:]

    def shift_of(product: Any) -> Any:
        """The shift of each row of a product, `[tall, wide]`."""
        if isinstance(product, int):
            column = columns[:tall, product : product + 1]
        else:
            lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
            chosen = jnp.where(lane == product, columns, 0.0)
            column = jnp.sum(chosen, axis=1, keepdims=True)[:tall]
        return jnp.broadcast_to(column, (tall, wide))

    def group(index: Any, careful: bool) -> Iterator[None]:
        qs = load(pack, q_ref, index, pack.rows)
        als = load(pack, al_ref, index, pack.keys)
        products = [index * pack.halves + half for half in range(pack.halves)]
        xs = [_dot(al, q, ((1,), (1,))) for q, al in zip(qs, als, strict=True)]
        shifts = [shift_of(product) for product in products]
        yield
        ps = []
        for x, shift, product in zip(xs, shifts, products, strict=True):
            line = pl.ds(product, 1)
            x = x * LOG2E + shift  # [tall, wide]
            if same is not None:
                x = jnp.where(same, x, MASKED)
            if careful:
                top = jnp.max(x, axis=0, keepdims=True)
                p = jnp.where(x <= MASKED / 2, 0.0, jnp.exp2(x - top))
            else:
                p = jnp.exp2(x)
            total = jnp.sum(p, axis=0, keepdims=True)  # [1, wide]
            if not careful:
                sum_ref[line, :wide] = total
            over = 1 / (jnp.where(total == 0, 1.0, total) if careful else total)
            if weight_ref:
                over = over * weight_ref[0][0, 0, line, :wide]
            elif weight is not None:
                over = over * weight
            ps.append(p * over)
        yield
        pairs = [means_and_masses(p, q) for p, q in zip(ps, qs, strict=True)]
        overs = [1 / jnp.maximum(mass, plan.floor) for _, mass in pairs]
        yield
        means = [mean * over for (mean, _), over in zip(pairs, overs, strict=True)]
        store(pack, qt_ref, index, pack.keys, means)

    groups = plan.products // pack.halves
    _all(groups, functools.partial(group, careful=False), MIDDLE_WIDTH // pack.halves)
    if not slow_path_wanted():
        return

    @pl.when(_unsound(plan, sum_ref[...], wide))
    def _():
        _loop(groups, functools.partial(group, careful=True))


def _as_row(column: Any) -> Any:
    """`[rows, 1]` as `[1, 128]`, 0 past the rows: the diagonal of its broadcast."""
    shape = (column.shape[0], LANES)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.sum(jnp.where(row == lane, column, 0.0), axis=0, keepdims=True)


def _square(x: Any) -> Any:
    """`[rows, 128]` with its rows made up to a multiple of 128, for a transpose."""
    more = -x.shape[0] % LANES
    return jnp.concatenate([x, jnp.zeros((more, LANES), x.dtype)]) if more else x


def _unsound(plan: _Plan, sums: Any, lanes: int) -> Any:
    """Whether a sum of a real position left the range where no shift is needed; NaN did."""
    fine = (sums >= SMALLEST) & (sums <= LARGEST)  # [products, LANES]
    lane = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    fine |= lane >= lanes
    if plan.n % plan.block:  # positions past the end hold anything
        left = plan.n - pl.program_id(1) * plan.block
        first = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0) * plan.packing.positions
        fine |= first >= left
    return jnp.logical_not(jnp.all(fine))


def _all(count: int, body: Callable[[Any], Iterator[None]], width: int) -> None:
    """Traces `body(0)` to `body(count - 1)`, the stages of `width` of them side by side."""
    if interpreting():  # a loop is compiled in a fraction of the time
        _loop(count, body)
        return
    waiting, running = [body(index) for index in range(count)], []
    while waiting or running:
        running += waiting[:width]
        waiting = waiting[width:]
        running = [body for body in running if next(body, _DONE) is not _DONE]


_DONE = object()


def _loop(count: int, body: Callable[[Any], Iterator[None]]) -> None:
    """Runs `body(0)` to `body(count - 1)` one after the other, in little code."""

    def one(index: Any, _: None) -> None:
        for _ in body(index):
            pass

    jax.lax.fori_loop(0, count, one, None)
