"""Block-sparse attention on a TPU: query blocks walk over the key blocks that they keep.

    x[n,s] = scale * q[n] . k[s]                       s in the kept blocks of n's block
    p[n,s] = 2^(x log2 e - m)                          (rounded to the dtype of the values)
    l[n]   = sum_s p ;  lse[n] = m ln 2 + log l ;  out[n] = sum_s p v[s] / l

A head's K and V lie in VMEM whole, so a kept block costs no copy from HBM: a unit of the walk
gathers some of them by dynamic slices into one wide operand. As in `attend` the softmax is
optimistic: `m = 0`, which is exact as long as `l` stays far from overflow and underflow. That is
checked, and a grid step of which some row leaves `[SMALLEST, LARGEST]` is done again with the
running maximum of each row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..attend.tpu_forward import LARGEST, LN2, LOG2E, LOWEST, SMALLEST
from ..block_sizes import BlockSizes
from ..tpu.call import launch, slow_path_wanted
from . import walk
from .walk import LANES, Plan, Unit, dot

NAME = "block_sparse"


def forward(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    indices: Int[Array, "g p c"],
    counts: Int[Array, "g p"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"]]:
    """`(out, lse)`; keys that do not fit into VMEM are taken in parts, merged by log-sum-exp."""
    parts = walk.parts(k.shape[1] // block, block, (k.shape[2], v.shape[2]), k.dtype)
    found = [
        _of_part(q, k, v, indices, counts, parts, i, block, length, scale, block_sizes)
        for i in range(len(parts))
    ]
    if len(found) == 1:
        return found[0]
    lse = functools.reduce(jnp.logaddexp, [lse for _, lse in found])
    known = jnp.where(jnp.isneginf(lse), 0.0, lse)
    out = sum(jnp.exp(x - known)[..., None] * out for out, x in found)
    return jnp.asarray(out).astype(v.dtype), lse


def _of_part(
    q, k, v, indices, counts, parts, number, block, length, scale, block_sizes
) -> tuple[Array, Array]:
    """Attention on the kept blocks that lie in one part of the keys."""
    groups, n, d = q.shape
    s, e = v.shape[1:]
    part, share = parts[number], len(parts[0])
    if len(parts) > 1:
        indices, counts = walk.of_part(part, indices, counts)
    kept = indices.shape[2]
    plan = walk.make_plan(
        NAME, {"rows": n, "keys": s, "dim": d, "width": e}, q.dtype,
        block=block, row_blocks=n // block, budget=kept, kept=kept,
        length=length - part.start * block, block_sizes=block_sizes,
    )  # fmt: skip
    steps = pl.cdiv(n, plan.tokens)
    pairs = groups * n * kept * block
    size = q.dtype.itemsize

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, plan.tokens, width), lambda g, r: (g, r, 0))

    room = plan.tokens + block
    out, lse = launch(
        functools.partial(_kernel, plan, scale),
        name=NAME,
        grid=(groups, steps),
        in_specs=[
            walk.list_spec(plan), of_rows(d), *walk.whole(number, share, block, (d, e), q.dtype)
        ],
        out_specs=[
            of_rows(e), pl.BlockSpec((None, None, 1, plan.tokens), lambda g, r: (g, r, 0, 0))
        ],
        out_shape=[
            jax.ShapeDtypeStruct((groups, n, e), v.dtype if len(parts) == 1 else jnp.float32),
            jax.ShapeDtypeStruct((groups, steps, 1, plan.tokens), jnp.float32),
        ],
        scratch=[
            pltpu.VMEM((plan.tokens, d), q.dtype),
            pltpu.VMEM((room, e), jnp.float32),
            pltpu.VMEM((room, LANES), jnp.float32),
            pltpu.VMEM((room, LANES), jnp.float32),
        ],
        semantics=("parallel", "arbitrary"),
        flops=2 * pairs * (d + e),
        exps=pairs,
        moved=size * groups * (n + len(part) * block) * (d + e) + 4 * groups * n,
        blocks={"rows": plan.tokens, "keys": plan.lanes},
        turns=plan.turns,
    )(walk.listed(plan, indices, counts, len(part)), q, k, v)  # fmt: skip
    return out, lse.reshape(groups, -1)[:, :n]


def _kernel(plan, scale, kept, q, k, v, out, lse, scaled, sums, totals, tops) -> None:
    """One grid step: `plan.rows` query blocks."""
    # Scaled once a row, not once a score; bfloat16 rows are rounded a second time by it.
    scaled[...] = (q[...].astype(jnp.float32) * (scale * LOG2E)).astype(q.dtype)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    totals[...] = jnp.zeros(totals.shape, jnp.float32)

    def turn(here: list[Unit]) -> None:
        # A stage of all units before the next stage of any: they hide each other's latency. Stores
        # come last, since a load from a place that is not known would wait for them.
        x = [_scores(plan, unit, scaled, k) for unit in here]
        weights = [jnp.exp2(x).astype(v.dtype) for x in x]
        more = [dot(p, unit.gather(plan, v), 1, 0) for unit, p in zip(here, weights, strict=True)]
        for unit, p, sum_ in zip(here, weights, more, strict=True):
            sums[unit.target(plan)] += sum_
            totals[unit.target(plan)] += _by_lane(p)

    walk.in_turns(plan, kept, turn)
    sound = _finish(plan, kept, sums, totals, None, out, lse)
    if not slow_path_wanted():
        return

    @pl.when(jnp.logical_not(sound))
    def _():
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        totals[...] = jnp.zeros(totals.shape, jnp.float32)
        tops[...] = jnp.full(tops.shape, LOWEST)

        def one(number: Any, _: Any) -> Any:
            _careful(plan, walk.unit(plan, kept, number), scaled, k, v, sums, totals, tops)
            return 0

        jax.lax.fori_loop(0, walk.turns_of(kept) * plan.units, one, 0)
        _finish(plan, kept, sums, totals, tops, out, lse)


def _finish(plan: Plan, kept, sums, totals, tops, out, lse) -> Array:
    """Writes the outputs and log-sum-exps; whether a shift of `tops` (none: 0) was right."""
    here = totals[: plan.tokens]  # [rows, LANES]
    total = jnp.sum(here, axis=-1, keepdims=True)
    out[...] = (sums[: plan.tokens] / jnp.where(total == 0, 1.0, total)).astype(out.dtype)
    # As a line, the other way round, the rest is a few vectors.
    total = jnp.sum(jnp.transpose(here), axis=0, keepdims=True)  # [1, rows]
    row = jax.lax.broadcasted_iota(jnp.int32, (1, plan.tokens), 1)
    some = jnp.zeros((1, plan.tokens), jnp.int32)
    for i in range(plan.rows):
        some = jnp.where(row >= i * plan.block, walk.tokens_of(plan, kept, i), some)
    top = 0.0 if tops is None else LN2 * jnp.transpose(tops[: plan.tokens])[:1]
    lse[...] = jnp.where(some > 0, top + jnp.log(total), -jnp.inf)
    # NaN fails: it is not <= anything.
    return jnp.all((some == 0) | ((total <= LARGEST) & (total >= SMALLEST)))


def _scores(plan: Plan, unit: Unit, scaled: Any, k: Any) -> Array:
    """`scale * log2 e * q . k`, very low where there is no key: `[block, lanes]`."""
    return dot(scaled[unit.source(plan)], unit.gather(plan, k), 1, 1) + unit.bias(plan)


def _by_lane(p: Array) -> Array:
    """Sums of each row's weights, apart for each lane of a vector: `[rows, LANES]`.

    Of the rounded weights: the outputs are then true averages.
    """
    wide = p.astype(jnp.float32)
    return sum(wide[:, i : i + LANES] for i in range(0, p.shape[1], LANES))  # pyright: ignore


def _careful(plan: Plan, unit: Unit, scaled, k, v, sums, totals, tops) -> None:
    """Adds a unit with the running maximum of each of its rows."""
    at = unit.target(plan)
    x = _scores(plan, unit, scaled, k)
    top = jnp.maximum(tops[at, :1], jnp.max(x, axis=-1, keepdims=True))
    fade = jnp.exp2(tops[at, :1] - top)
    p = jnp.exp2(x - top).astype(v.dtype)
    totals[at] = totals[at] * fade + _by_lane(p)
    sums[at] = sums[at] * fade + dot(p, unit.gather(plan, v), 1, 0)
    tops[at] = jnp.broadcast_to(top, (plan.block, LANES))
