"""The backward kernel of fused tiled Monarch attention: everything of a pair computed again.

For one step of F key tiles and each query tile, with P = exp(F - lse) and delta = out.dout - dlse:

    dF[l,(f,k)] = P (dout[l] . Y[f,k] - delta[l])
    with the entropy's gradient:  dlse[f,k] = sum_l dF  and  dF[k,(f,k)] -= dlse[f,k]
    dq[l] += sum dF aL ;  daL[f,k] = sum_l dF q[l] ;  dY[f,k] = sum_l P dout[l]
    dR[j,i] = scale daL[j] . K[i] + dY[j] . V[i] ;  dx = R (dR - sum_i R dR + dlse)
    dq[k] += scale dx K ;  dK = scale (R^T daL + dx^T q) ;  dV = R^T dY

The three parts (R step; L step and its gradient by position; R step's gradient) talk through one
scratch buffer by position, where `[aL | Y]` is overwritten by its gradient. dK and dV add up over
the query tiles in VMEM; dq adds up over the steps of key tiles, one launch each, in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..numerics import MASKED, precision
from ..tpu.call import launch
from ..varying import varying
from . import plan as planning
from .plan import Plan, up
from .positions import at_position, by_position, clear_padding, gather, lane_tiles, scatter, words
from .staggered import staggered
from .tpu_forward import LOG2E, diagonal, dot, dot_t, key_masks, own_blocks

KERNEL = "tiled_backward"
LAG_ROWS, LAG_POSITIONS, LAG_GRADIENTS = 2, 4, 2


def backward(
    q: Float[Array, "g a m b d"],
    k: Float[Array, "g f m b d"],
    v: Float[Array, "g f m b e"],
    keys: Bool[Array, "g f m b"] | None,
    out: Float[Array, "g a m b e"],
    lse: Float[Array, "g a m b"],
    dout: Float[Array, "g a m b e"],
    dlse: Float[Array, "g a m b"],
    *,
    scale: float,
    entropy_gradient: bool,
    block_sizes: BlockSizes,
) -> tuple[Array, Array, Array]:
    """Gradients of q, K and V, in their dtypes.

    Raises:
        NotImplementedError: for a dtype or a shape that the kernel cannot serve.
    """
    plan = planning.fit(q, k, v, block_sizes, kernel=KERNEL, lanes=128, vmem=_vmem)
    groups, wide = q.shape[0], jnp.float32
    delta = jnp.sum(out.astype(wide) * dout.astype(wide), axis=-1) - dlse
    # A row without keys, like a padded one, gets a log-sum-exp above every score.
    lse = jnp.where(jnp.isneginf(lse), -MASKED, lse * LOG2E)
    fixed = [
        planning.query_rows(plan, q),
        _paired_positions(plan, q, dout.astype(q.dtype)),
        _query_lines(plan, lse, -MASKED),
        _query_lines(plan, jnp.where(jnp.isfinite(delta) | jnp.isnan(delta), delta, 0.0), 0.0),
    ]

    def steps(x: Any) -> Any:
        x = x.reshape(groups, plan.key_steps, -1, *x.shape[2:])
        return x.swapaxes(0, 1)

    moving = [
        steps(planning.keys_and_values(plan, k, v, keys)),
        steps(planning.blocks_there(plan, groups, keys)),
    ]
    if keys is not None:
        moving.append(steps(planning.key_lines(plan, keys)))
    run = _launcher(plan, groups, scale, entropy_gradient, keys is not None)
    rows = jnp.zeros(fixed[0].shape, wide)
    positions = jnp.zeros((groups, plan.query_steps, plan.rows, _half(plan), plan.depth), wide)

    def one_step(carry: Any, some: Any) -> Any:
        rows, positions, dkv = run(*fixed, *some, *carry)
        return (rows, positions), dkv.astype(q.dtype)

    start = varying((rows, positions), fixed, moving)
    (rows, positions), dkv = lax.scan(one_step, start, tuple(moving))
    dq = planning.from_rows(plan, rows)
    dq += planning.from_positions(plan, positions[..., : plan.m, : plan.d])
    dkv = dkv.swapaxes(0, 1).reshape(groups, -1, *dkv.shape[3:])[:, : plan.f, : plan.m, : plan.b]
    first = plan.d if plan.joint else plan.depth
    return dq.astype(q.dtype), dkv[..., : plan.d], dkv[..., first : first + plan.e]


def _half(plan: Plan) -> int:
    """Rows of q, and of dout below them, at a position: whole tiles of sublanes."""
    return up(plan.m, 8 * plan.words)


def _paired_positions(plan: Plan, q: Any, dout: Any) -> Any:
    """`[[q, 0], [0, dout]]` of each position, `[g, query steps, A*b, 2 half, width]`."""
    half = _half(plan)
    first = plan.d if plan.joint else plan.depth
    q = planning.pad(q, {2: half, 4: plan.width})
    dout = jnp.pad(dout, ((0, 0),) * 4 + ((first, 0),))
    both = jnp.concatenate([q, planning.pad(dout, {2: half, 4: plan.width})], axis=2)
    both = planning.pad(both, {1: plan.query_steps * plan.queries})
    both = both.swapaxes(2, 3)
    return both.reshape(-1, plan.query_steps, plan.rows, 2 * half, plan.width)


def _query_lines(plan: Plan, x: Float[Array, "g a m b"], filler: float) -> Array:
    tiles = plan.query_steps * plan.queries
    widths = ((0, 0), (0, tiles - plan.a), (0, _half(plan) - plan.m), (0, 0))
    return jnp.pad(x.astype(jnp.float32), widths, constant_values=filler)


def _vmem(plan: Plan) -> int:
    """Bytes of VMEM, blocks twice for their pipeline."""
    size, lanes = jnp.dtype(plan.dtype).itemsize, up(plan.pairs, 128)
    rows = up(plan.rows, 8 * plan.words)
    q_rows = plan.packs * rows * plan.pack * plan.depth
    pairs = plan.rows * 2 * _half(plan) * plan.width
    kv = plan.keys * plan.blocks * plan.columns * plan.width
    positions = plan.rows * _half(plan) * plan.depth
    blocks = size * (q_rows + pairs + kv) + 4 * (2 * q_rows + 2 * positions + kv)
    scratch = plan.rows * up(plan.pairs // plan.words, 8) * plan.width * 4
    scratch += plan.keys * plan.packs * rows * up(plan.pack * plan.columns, 128) * size
    return 2 * blocks + scratch + 4 * rows * lanes * 4 + 2**21


def _launcher(plan: Plan, groups: int, scale: float, entropy_gradient: bool, masked: bool) -> Any:
    half, wide, size = _half(plan), jnp.float32, jnp.dtype(plan.dtype).itemsize
    q_rows = (1, 1, plan.packs, plan.rows, plan.pack * plan.depth)
    paired = (1, 1, plan.rows, 2 * half, plan.width)
    lines = (1, plan.queries, half, plan.b)
    positions = (1, 1, plan.rows, half, plan.depth)
    kv = (1, plan.keys, plan.blocks, plan.columns, plan.width)
    there = (1, 1, 1, plan.pairs)

    def of_query(shape: tuple[int, ...]) -> Any:
        return pl.BlockSpec(shape, lambda g, a: (g, a) + (0,) * (len(shape) - 2))

    def of_group(shape: tuple[int, ...]) -> Any:
        return pl.BlockSpec(shape, lambda g, a: (g,) + (0,) * (len(shape) - 1))

    key_lines = (1, plan.keys, plan.packs, 1, plan.pack * plan.columns)
    in_specs = [of_query(q_rows), of_query(paired), of_query(lines), of_query(lines)]
    in_specs += [of_group(kv), of_group(there)] + [of_group(key_lines)] * masked
    in_specs += [of_query(q_rows), of_query(positions)]
    carried = len(in_specs) - 2

    def whole(shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct((groups, plan.query_steps, *shape[2:]), wide)

    word = jnp.uint32 if plan.narrow else wide
    sums = pltpu.VMEM((plan.rows, plan.pairs), wide)
    scratch = [
        # [aL/scale | Y] by position, then the gradients of [scale aL | Y].
        pltpu.VMEM(by_position(plan), word),
        pltpu.VMEM((plan.keys * plan.packs, plan.rows, plan.pack * plan.columns), plan.dtype),  # R
        sums,  # l, then log2 of sum_i 2^x
        sums,  # largest x of each row
        sums,  # scale dlse
    ]
    pairs = groups * plan.a * plan.keys
    row, position = plan.m * plan.b * plan.b, plan.b * plan.m * plan.m
    both = plan.d + plan.e
    query_bytes = size * (_count(q_rows) + _count(paired))
    query_bytes += 4 * 2 * (_count(q_rows) + _count(positions) + _count(lines))
    return launch(
        functools.partial(
            _body, plan=plan, scale=scale, entropy_gradient=entropy_gradient, masked=masked
        ),
        name=KERNEL,
        grid=(groups, plan.query_steps),
        semantics=("parallel", "arbitrary"),
        in_specs=in_specs,
        out_specs=[of_query(q_rows), of_query(positions), of_group(kv)],
        out_shape=[
            whole(q_rows),
            whole(positions),
            jax.ShapeDtypeStruct((groups, *kv[1:]), wide),
        ],
        scratch=scratch,
        flops=2 * pairs * (row * (3 * both + 3 * plan.d) + position * (2 * both + both + plan.d)),
        exps=pairs * (row + position),
        moved=groups * (plan.query_steps * query_bytes + (size + 4) * _count(kv)),
        blocks={"tiles": plan.queries, "keys": plan.keys * plan.m * plan.b},
        input_output_aliases={carried: 0, carried + 1: 1},
    )


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _body(*refs: Any, plan: Plan, scale: float, entropy_gradient: bool, masked: bool) -> None:
    q_rows, paired, lse, delta, kv, there, *refs = refs  # pyright: ignore[reportAssignmentType]
    lines, refs = (refs[0], refs[1:]) if masked else (None, refs)
    rows_in, positions_in, rows_out, positions_out, dkv, *refs = refs  # pyright: ignore[reportAssignmentType]
    averages, weights, sums, tops, entropies = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        dkv[...] = jnp.zeros(dkv.shape, dkv.dtype)

    # The lanes and rows that pad `pairs` are multiplied, by zero.
    if plan.pairs > plan.keys * plan.blocks:
        clear_padding(plan, averages)
        sums[...] = jnp.zeros(sums.shape, sums.dtype)
        tops[...] = jnp.zeros(tops.shape, tops.dtype)

    _r_steps(plan, scale, q_rows, kv, lines, averages, weights, sums, tops)
    some = there[0, 0] > 0  # [1, pairs]
    sums[...] = jnp.where(some, jnp.log2(sums[...]) + tops[...], MASKED)
    _l_steps(
        plan, scale, entropy_gradient,
        paired, lse, delta, averages, sums, entropies, positions_in, positions_out,
    )  # fmt: skip
    _r_gradients(
        plan, scale, entropy_gradient,
        q_rows, kv, averages, weights, entropies, rows_in, rows_out, dkv,
    )  # fmt: skip


def _items(plan: Plan) -> list[tuple[int, int]]:
    return [(f, c) for f in range(plan.keys) for c in range(plan.packs)]


def _pack(plan: Plan, kv: Any, item: tuple[int, int]) -> Any:
    f, c = item
    return kv[0, f, c * plan.pack : (c + 1) * plan.pack]  # [pack, columns, width]


def _first_lane(plan: Plan, item: tuple[int, int]) -> int:
    """Column of F of the first block of a pack."""
    return item[0] * plan.blocks + item[1] * plan.pack


def _r_steps(
    plan: Plan,
    scale: float,
    q_rows: Any,
    kv: Any,
    lines: Any,
    averages: Any,
    weights: Any,
    sums: Any,
    tops: Any,
) -> None:
    """Writes R, `[aL/scale | Y]` by position, and both parts of R's log-sum-exp."""
    plain = key_masks(plan, None)

    def scores(item: tuple[int, int], _: Any) -> Any:
        x = dot_t(q_rows[0, 0, item[1]], diagonal(_pack(plan, kv, item), plan.pack, plan.depth))
        return x * (scale * LOG2E)  # [rows, pack*columns]

    def softmax(item: tuple[int, int], x: Any) -> Any:
        f, c = item
        masks = plain if lines is None else key_masks(plan, lines[0, f, c])
        found, whole = [], jnp.zeros((), jnp.float32)
        for r, mask in enumerate(masks):
            lane = _first_lane(plan, item) + r
            top = (x if mask is None else jnp.where(mask, x, MASKED)).max(-1, keepdims=True)
            p = jnp.exp2(x - top)
            p = p if mask is None else jnp.where(mask, p, 0.0)
            l = p.sum(-1, keepdims=True)
            tops[:, lane : lane + 1] = top
            sums[:, lane : lane + 1] = l
            p = p * (1.0 / jnp.maximum(l, 0.5))  # l is at least 1, or 0 without keys
            whole = whole + p
            found.append(p.astype(plan.dtype))
        weights[f * plan.packs + c] = whole.astype(plan.dtype)
        return found

    waiting: list[tuple[int, Any]] = []

    def products(item: tuple[int, int], found: list[Any]) -> None:
        some = _pack(plan, kv, item).reshape(plan.pack * plan.columns, plan.width)
        for r, p in enumerate(found):
            waiting.append((_first_lane(plan, item) + r, dot(p, some)))  # [rows, width]
        while len(waiting) >= plan.words:
            ready = [waiting.pop(0) for _ in range(plan.words)]
            tile = words(ready[0][1], ready[1][1]) if plan.narrow else ready[0][1]
            scatter(plan, averages, ready[0][0], tile)

    staggered(_items(plan), (scores, softmax, products), LAG_ROWS)


def _l_steps(
    plan: Plan,
    scale: float,
    entropy_gradient: bool,
    paired: Any,
    lse: Any,
    delta: Any,
    averages: Any,
    sums: Any,
    entropies: Any,
    positions_in: Any,
    positions_out: Any,
) -> None:
    """The L step and its gradient, by position; `averages` becomes its own gradient."""
    half = _half(plan)
    own = own_blocks(plan, half)

    def products(r: int, _: Any) -> Any:
        return dot_t(paired[0, 0, r], at_position(plan, averages, r))  # [2 half, pairs]

    def gradients(r: int, both: Any) -> Any:
        a, j = r // plan.b, slice(r % plan.b, r % plan.b + 1)
        x, along = both[:half], both[half:]  # q . aL/scale, dout . Y
        tangent = jnp.where(own, x, 0.0).sum(0, keepdims=True)
        f = (x - tangent) * (scale * LOG2E) + sums[r : r + 1]
        p = jnp.exp2(f - lse[0, a, :, j])  # [half, pairs]
        df = p * (along - delta[0, a, :, j]) * scale
        if entropy_gradient:
            column = df.sum(0, keepdims=True)
            entropies[r : r + 1] = column
            df = df - jnp.where(own, column, 0.0)
        return jnp.concatenate([df, p], axis=0).astype(plan.dtype)

    def outputs(r: int, dfp: Any) -> None:
        dq = dot(dfp[:half], at_position(plan, averages, r, 0, plan.depth))
        positions_out[0, 0, r] = positions_in[0, 0, r] + dq
        new = _t_dot(dfp, paired[0, 0, r])  # [pairs, width]
        if plan.narrow:
            new = pltpu.bitcast(new.astype(plan.dtype), jnp.uint32)
        for lane, tile in enumerate(lane_tiles(new)):
            averages[lane, r * plan.stride : (r + 1) * plan.stride, :] = tile

    staggered(range(plan.rows), (products, gradients, outputs), LAG_POSITIONS)


def _t_dot(x: Any, y: Any) -> Any:
    """`x^T y` with float32 sums."""
    return lax.dot_general(
        x, y, (((0,), (0,)), ((), ())),
        precision=precision(x.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip


def _r_gradients(
    plan: Plan,
    scale: float,
    entropy_gradient: bool,
    q_rows: Any,
    kv: Any,
    averages: Any,
    weights: Any,
    entropies: Any,
    rows_in: Any,
    rows_out: Any,
    dkv: Any,
) -> None:
    """Adds the R step's gradients to dq, dK and dV."""
    columns, depth = plan.columns, plan.depth
    lane = lax.broadcasted_iota(jnp.int32, (1, plan.pack * columns), 1)

    def gradient_of(block: int) -> Any:
        tile = gather(plan, averages, block)  # [rows, width]
        if not plan.narrow:
            return tile
        tile = tile & jnp.uint32(0xFFFF0000) if block % 2 else tile << 16
        return lax.bitcast_convert_type(tile, jnp.float32).astype(plan.dtype)

    def products(item: tuple[int, int], _: Any) -> Any:
        found = [gradient_of(_first_lane(plan, item) + r) for r in range(plan.pack)]
        side = found[0] if plan.pack == 1 else jnp.concatenate(found, axis=1)
        return found, dot_t(side, diagonal(_pack(plan, kv, item), plan.pack, plan.width))

    def scores(item: tuple[int, int], state: Any) -> Any:
        found, dr = state  # dr: [rows, pack*columns]
        r = weights[item[0] * plan.packs + item[1]].astype(jnp.float32)
        both = r * dr
        shift = None
        for block in range(plan.pack):
            mine = (lane >= block * columns) & (lane < (block + 1) * columns)
            total = (both if plan.pack == 1 else jnp.where(mine, both, 0.0)).sum(-1, keepdims=True)
            if entropy_gradient:
                column = _first_lane(plan, item) + block
                total = total - entropies[:, column : column + 1] * (1.0 / scale)
            shift = total if shift is None else jnp.where(mine, total, shift)
        dx = (both - r * shift) * scale
        return found, r.astype(plan.dtype), dx.astype(plan.dtype)

    def outputs(item: tuple[int, int], state: Any) -> None:
        found, r, dx = state
        f, c = item
        old = rows_in if f == 0 else rows_out
        keys = diagonal(_pack(plan, kv, item), plan.pack, depth)
        rows_out[0, 0, c] = old[0, 0, c] + dot(dx, keys)  # [rows, pack*depth]
        for block in range(plan.pack):
            here = slice(block * columns, (block + 1) * columns)
            k = c * plan.pack + block
            own_q = q_rows[0, 0, c, :, block * depth : (block + 1) * depth]
            dkv[0, f, k] += _t_dot(r[:, here], found[block])  # [columns, width]
            dkv[0, f, k, :, :depth] += _t_dot(dx[:, here], own_q)

    staggered(_items(plan), (products, scores, outputs), LAG_GRADIENTS)
