"""The forward kernel of fused tiled Monarch attention.

A grid step takes A query tiles and F key tiles. For each block k of each key tile, one product
gives the R step's scores of all positions; `[aL | Y]`, not yet divided by the softmax's sum l, goes
to scratch by position (a strided store is all the transposition there is). Then for each position j
one product gives F of all (f, k) at once:

    x[l,(f,k)] = q[l] . (l aL)[f,k] ;  F = log2e scale (x - x[k,(f,k)]) / l[f,k] + log2 l[f,k]

because `cL = q[k] . aL[k] - lse[k]` is the diagonal of x itself: the entropy costs no product.
`2^F Y = 2^(F - log2 l) (l Y)`, so nothing is ever normalised before the end.

The fast kernel shifts no softmax by a maximum. It writes NaN log-sum-exps where that was not safe,
and then the safe kernel, which does, runs as well.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..numerics import MASKED, precision
from ..tpu.call import launch, slow_path_wanted
from . import plan as planning
from .plan import Plan, up
from .positions import at_position, by_position, clear_padding, scatter, words
from .staggered import staggered

KERNEL = "tiled"
LOG2E = math.log2(math.e)
LN2 = math.log(2)

# Sums of unshifted exponentials that are trusted: what underflowed in one is below 2^-126, in the
# other's units 2^-46 of the smallest sum.
LEAST_SUM, MOST_SUM = 2.0**-40, 2.0**40

# Products between the first and the next use of a result: enough to cover a matmul's latency.
LAG_ROWS, LAG_POSITIONS = 1, 2


def forward(
    q: Float[Array, "g a m b d"],
    k: Float[Array, "g f m b d"],
    v: Float[Array, "g f m b e"],
    keys: Bool[Array, "g f m b"] | None,
    *,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g a m b e"], Float[Array, "g a m b"]]:
    """`(out, lse)`, out in the dtype of V.

    Raises:
        NotImplementedError: for a dtype or a shape that the kernel cannot serve.
    """
    plan = planning.fit(q, k, v, block_sizes, kernel=KERNEL)
    out, lse = _run(plan, q, k, v, keys, scale=scale, safe=False)
    if not slow_path_wanted():
        return out, lse
    careful = planning.fit(q, k, v, block_sizes, kernel=KERNEL, keys=1)

    def again() -> Any:
        return _run(careful, q, k, v, keys, scale=scale, safe=True)

    return lax.cond(jnp.isnan(lse).any(), again, lambda: (out, lse))


def _run(plan: Plan, q: Any, k: Any, v: Any, keys: Any, *, scale: float, safe: bool) -> Any:
    groups, dtype = q.shape[0], q.dtype
    arrays = [
        planning.query_rows(plan, q),
        planning.positions(plan, q, plan.depth),
        planning.keys_and_values(plan, k, v, keys),
        planning.blocks_there(plan, groups, keys),
    ]
    specs = query_specs(plan) + key_specs(plan)
    if keys is not None:
        arrays.append(planning.key_lines(plan, keys))
        shape = (1, plan.keys, plan.packs, 1, plan.pack * plan.columns)
        specs.append(pl.BlockSpec(shape, lambda g, a, f: (g, f, 0, 0, 0)))
    tiles = plan.query_steps * plan.queries
    rows, m, lanes = plan.rows, plan.m, up(plan.b, 128)
    word = jnp.uint32 if plan.narrow else jnp.float32
    per_pair = plan.m * plan.b * plan.b, plan.b * plan.m * plan.m
    pairs = groups * plan.a * plan.f
    d, e = plan.d, plan.e
    moved = sum(x.size * x.dtype.itemsize for x in arrays[:2])
    moved += plan.query_steps * sum(x.size * x.dtype.itemsize for x in arrays[2:])
    moved += groups * plan.query_steps * rows * m * (plan.out_width * dtype.itemsize + 4)
    wide = jnp.float32
    scratch = [
        pltpu.VMEM(by_position(plan), word),  # l [aL | Y] by position
        pltpu.VMEM((rows, plan.pairs), wide),  # l
        pltpu.VMEM((rows, plan.pairs), wide),  # log2e scale / l
        pltpu.VMEM((rows, m, plan.out_width), wide),  # out, not divided
        pltpu.VMEM((plan.queries, m, lanes), wide),  # sum of 2^F
        pltpu.VMEM((plan.queries, m, lanes), wide),  # of this step
        pltpu.VMEM((1, plan.pairs), wide),  # 1 where a sum was out of range
    ]
    if safe:
        scratch += [
            pltpu.VMEM((rows, plan.pairs), wide),  # shift of the R step
            pltpu.VMEM((plan.queries, m, lanes), wide),  # shift of the L step
        ]
    out, lse = launch(
        functools.partial(_body, plan=plan, scale=scale, safe=safe, masked=keys is not None),
        name=f"{KERNEL}_safe" if safe else KERNEL,
        grid=(groups, plan.query_steps, plan.key_steps),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((1, 1, rows, m, plan.out_width), lambda g, a, f: (g, a, 0, 0, 0)),
            pl.BlockSpec((1, plan.queries, m, plan.b), lambda g, a, f: (g, a, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((groups, plan.query_steps, rows, m, plan.out_width), dtype),
            jax.ShapeDtypeStruct((groups, tiles, m, plan.b), wide),
        ],
        scratch=scratch,
        flops=2 * pairs * (per_pair[0] * (2 * d + e) + per_pair[1] * (d + e)),
        exps=pairs * sum(per_pair),
        moved=moved,
        blocks={"tiles": plan.queries, "keys": plan.keys * plan.m * plan.b},
    )(*arrays)
    at = plan.d if plan.joint else 0
    out = planning.from_positions(plan, out)[..., at : at + plan.e]
    return out, lse[:, : plan.a]


def query_specs(plan: Plan) -> list[Any]:
    """Blocks of `query_rows` and `positions`, for a grid of groups, query steps and key steps."""
    rows = (1, 1, plan.packs, plan.rows, plan.pack * plan.depth)
    positions = (1, 1, plan.rows, plan.m, plan.depth)
    return [pl.BlockSpec(shape, lambda g, a, f: (g, a, 0, 0, 0)) for shape in (rows, positions)]


def key_specs(plan: Plan) -> list[Any]:
    """Blocks of `keys_and_values` and `blocks_there`."""
    kv = (1, plan.keys, plan.blocks, plan.columns, plan.width)
    return [
        pl.BlockSpec(kv, lambda g, a, f: (g, f, 0, 0, 0)),
        pl.BlockSpec((1, 1, 1, plan.pairs), lambda g, a, f: (g, f, 0, 0)),
    ]


def dot(x: Any, y: Any) -> Any:
    """`x y` with float32 sums."""
    return jnp.dot(x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def dot_t(x: Any, y: Any) -> Any:
    """`x y^T` with float32 sums."""
    return lax.dot_general(
        x, y, (((1,), (1,)), ((), ())),
        precision=precision(x.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip


def diagonal(kv: Any, pack: int, depth: int) -> Any:
    """`depth` lanes of a pack's blocks on the diagonal of a `[pack*columns, pack*depth]` matrix."""
    if pack == 1:
        return kv[0, :, :depth]
    zeros = jnp.zeros((kv.shape[1], depth), kv.dtype)
    lines = [
        jnp.concatenate([kv[r, :, :depth] if r == s else zeros for s in range(pack)], axis=1)
        for r in range(pack)
    ]
    return jnp.concatenate(lines, axis=0)  # [pack*columns, pack*depth]


def key_masks(plan: Plan, line: Any) -> list[Any]:
    """For each block of a pack, where its keys stand in the lanes; `None`: everywhere."""
    if plan.pack == 1 and plan.b == plan.columns and line is None:
        return [None]
    lane = lax.broadcasted_iota(jnp.int32, (1, plan.pack * plan.columns), 1)
    masks = []
    for r in range(plan.pack):
        mask = (lane >= r * plan.columns) & (lane < r * plan.columns + plan.b)
        masks.append(mask if line is None else mask & (line > 0))
    return masks


def own_blocks(plan: Plan, rows: int) -> Any:
    """Where block l of the queries meets block l of a key tile, in `[rows, pairs]`."""
    row = lax.broadcasted_iota(jnp.int32, (rows, plan.pairs), 0)
    lane = lax.broadcasted_iota(jnp.int32, (rows, plan.pairs), 1)
    own = lane == row
    for tile in range(1, plan.keys):
        own = own | (lane == row + tile * plan.blocks)
    return own & (row < plan.m)


def _body(*refs: Any, plan: Plan, scale: float, safe: bool, masked: bool) -> None:
    q_rows, q_positions, kv, there, *refs = refs  # pyright: ignore[reportAssignmentType]
    lines, refs = (refs[0], refs[1:]) if masked else (None, refs)
    out, lse, averages, sums, gains, acc, total, part, bad, *shifts = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        def clear(i, _):
            acc[i] = jnp.zeros(acc.shape[1:], acc.dtype)
            return 0

        lax.fori_loop(0, plan.rows, clear, 0)
        clear_padding(plan, averages)
        for ref in (total, part, bad, sums):
            ref[...] = jnp.zeros(ref.shape, ref.dtype)
        if safe:
            shifts[0][...] = jnp.zeros(shifts[0].shape, jnp.float32)
            shifts[1][...] = jnp.full(shifts[1].shape, MASKED)

    _r_steps(plan, scale, q_rows, kv, lines, averages, sums, shifts[0] if safe else None)

    some = there[0, 0] > 0  # [1, pairs]
    l = sums[...]  # [rows, pairs]
    if not safe:
        wrong = some & ~((l >= LEAST_SUM) & (l <= MOST_SUM))
        bad[...] = jnp.maximum(bad[...], jnp.where(wrong, 1.0, 0.0).max(0, keepdims=True))
    sums[...] = jnp.where(some, l, 0.0)
    gains[...] = jnp.where(some, scale * LOG2E / l, 0.0)

    if safe:
        _l_steps_safely(plan, q_positions, averages, sums, gains, some, acc, total, shifts)
    else:
        _l_steps(plan, q_positions, averages, sums, gains, acc, part)
        total[...] += part[...]

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        _finish(plan, out, lse, acc, total, bad, shifts[1] if safe else None)


def _r_steps(
    plan: Plan, scale: float, q_rows: Any, kv: Any, lines: Any, averages: Any, sums: Any, tops: Any
) -> None:
    """Writes `l [aL | Y]` of every block by position, and l; in `tops`, what was subtracted."""
    plain = key_masks(plan, None)

    def masks(f: int, c: int) -> list[Any]:
        return plain if lines is None else key_masks(plan, lines[0, f, c])

    def blocks(f: int, c: int) -> Any:
        return kv[0, f, c * plan.pack : (c + 1) * plan.pack]  # [pack, columns, width]

    def scores(item: tuple[int, int], _: Any) -> Any:
        x = dot_t(q_rows[0, 0, item[1]], diagonal(blocks(*item), plan.pack, plan.depth))
        return x * (scale * LOG2E)  # [rows, pack*columns]

    def exponentials(item: tuple[int, int], x: Any) -> Any:
        f, c = item
        shared: Any = jnp.exp2(x) if tops is None else None
        found = []
        for r, mask in enumerate(masks(f, c)):
            lane = f * plan.blocks + c * plan.pack + r
            p = shared
            if tops is not None:
                top = (x if mask is None else jnp.where(mask, x, MASKED)).max(-1, keepdims=True)
                tops[:, lane : lane + 1] = top
                p = jnp.exp2(x - top)
            p = p if mask is None else jnp.where(mask, p, 0.0)
            sums[:, lane : lane + 1] = p.sum(-1, keepdims=True)
            found.append(p.astype(plan.dtype))
        return found

    waiting: list[tuple[int, Any]] = []

    def products(item: tuple[int, int], found: list[Any]) -> None:
        f, c = item
        some = blocks(f, c).reshape(plan.pack * plan.columns, plan.width)
        for r, p in enumerate(found):
            waiting.append((f * plan.blocks + c * plan.pack + r, dot(p, some)))  # [rows, width]
        while len(waiting) >= plan.words:
            ready = [waiting.pop(0) for _ in range(plan.words)]
            tile = words(ready[0][1], ready[1][1]) if plan.narrow else ready[0][1]
            scatter(plan, averages, ready[0][0], tile)

    items = [(f, c) for f in range(plan.keys) for c in range(plan.packs)]
    staggered(items, (scores, exponentials, products), LAG_ROWS)


def _l_steps(
    plan: Plan, q_positions: Any, averages: Any, sums: Any, gains: Any, acc: Any, part: Any
) -> None:
    """Adds this step's key tiles to `acc`, and writes its sums of `2^F` to `part`."""
    own = own_blocks(plan, plan.m)

    def products(r: int, _: Any) -> Any:
        return dot_t(q_positions[0, 0, r], at_position(plan, averages, r, 0, plan.depth))

    def exponentials(r: int, x: Any) -> Any:
        tangent = jnp.where(own, x, 0.0).sum(0, keepdims=True)  # [1, pairs]
        p = jnp.exp2((x - tangent) * gains[r : r + 1])  # [m, pairs]
        a, j = r // plan.b, r % plan.b
        part[a, :, j : j + 1] = (p * sums[r : r + 1]).sum(-1, keepdims=True)
        return p.astype(plan.dtype)

    def outputs(r: int, p: Any) -> None:
        acc[r] += dot(p, at_position(plan, averages, r, plan.value_at))  # [m, out_width]

    staggered(range(plan.rows), (products, exponentials, outputs), LAG_POSITIONS)


def _l_steps_safely(
    plan: Plan,
    q_positions: Any,
    averages: Any,
    sums: Any,
    gains: Any,
    some: Any,
    acc: Any,
    total: Any,
    shifts: Any,
) -> None:
    """The same with running maxima, for the rare call that needs them."""
    r_tops, tops = shifts
    own = own_blocks(plan, plan.m)
    for r in range(plan.rows):
        a, column = r // plan.b, slice(r % plan.b, r % plan.b + 1)
        x = dot_t(q_positions[0, 0, r], at_position(plan, averages, r, 0, plan.depth))
        tangent = jnp.where(own, x, 0.0).sum(0, keepdims=True)
        x = (x - tangent) * gains[r : r + 1] + r_tops[r : r + 1]  # F - log2 l
        x = jnp.where(some, x, MASKED)
        old = tops[a, :, column]  # [m, 1]
        top = jnp.maximum(old, x.max(-1, keepdims=True))
        p = jnp.where(some, jnp.exp2(x - top), 0.0)
        fade = jnp.exp2(old - top)
        tops[a, :, column] = top
        total[a, :, column] = total[a, :, column] * fade + (p * sums[r : r + 1]).sum(
            -1, keepdims=True
        )
        values = at_position(plan, averages, r, plan.value_at)
        acc[r] = acc[r] * fade + dot(p.astype(plan.dtype), values)


def _finish(plan: Plan, out: Any, lse: Any, acc: Any, total: Any, bad: Any, tops: Any) -> None:
    """Divides, and writes lse: NaN in all of it where a sum was out of range."""
    group = max(n for n in range(1, 9) if plan.b % n == 0)
    lanes = total.shape[-1]
    for a in range(plan.queries):
        sums = total[a]  # [m, lanes]
        here = sums[:, : plan.b]
        if tops is None:
            fine = (here >= LEAST_SUM) & (here <= MOST_SUM)
            wrong = jnp.maximum(jnp.where(fine, 0.0, 1.0).max(), bad[...].max())
            lse[0, a] = LN2 * jnp.log2(here) + jnp.where(wrong > 0, jnp.nan, 0.0)
            inverse = 1.0 / sums
        else:
            found = LN2 * (jnp.log2(here) + tops[a, :, : plan.b])
            lse[0, a] = jnp.where(here == 0, -jnp.inf, found)
            inverse = 1.0 / jnp.where(sums == 0, 1.0, sums)

        def divide(i: Any, inverse: Any, a: int = a) -> Any:
            for t in range(group):
                r = a * plan.b + i * group + t
                out[0, 0, r] = (acc[r] * inverse[:, t : t + 1]).astype(out.dtype)
            return pltpu.roll(inverse, lanes - group, 1)

        lax.fori_loop(0, plan.b // group, divide, inverse)
