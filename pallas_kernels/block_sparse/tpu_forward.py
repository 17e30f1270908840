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
from ..numerics import MASKED
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
            pltpu.VMEM((plan.tokens, 1), jnp.float32),
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

    def units(here: list[Unit]) -> None:
        # A stage of all units before the next stage of any: they hide each other's latency.
        x = [_scores(plan, unit, scaled, k) for unit in here]
        weights = [jnp.exp2(x).astype(v.dtype) for x in x]
        more = [dot(p, unit.gather(plan, v), 1, 0) for unit, p in zip(here, weights, strict=True)]
        for unit, p, sum_ in zip(here, weights, more, strict=True):
            at = unit.target(plan)
            sums[at] += sum_
            totals[at] += _by_lane(p)

    walk.for_units(plan, kept, units)
    total = _finish(plan, kept, sums, totals, None, out, lse)
    if not slow_path_wanted():
        return

    # NaN fails too: it is not <= anything.
    @pl.when(jnp.logical_not(jnp.all((total <= LARGEST) & (total >= SMALLEST))))
    def _():
        def again(row: Any, _: Any) -> Any:
            _careful(plan, kept, row, scaled, k, v, sums, totals, tops)
            return 0

        jax.lax.fori_loop(0, plan.rows, again, 0)
        _finish(plan, kept, sums, totals, tops, out, lse)


def _finish(plan: Plan, kept, sums, totals, tops, out, lse) -> Array:
    """Writes the outputs and log-sum-exps; returns the totals, 1 for a row without keys."""
    total = jnp.sum(totals[: plan.tokens], axis=-1, keepdims=True)  # [rows, 1]
    if tops is None:
        some = [
            jnp.full((plan.block, 1), walk.count_of(kept, row) > 0, jnp.float32)
            for row in range(plan.rows)
        ]
        empty, top = jnp.concatenate(some) == 0, 0.0
    else:
        # A maximum may pass over NaN, a sum does not.
        empty, top = (tops[...] <= MASKED / 2) & (total <= LARGEST), tops[...]
    total = jnp.where(empty, 1.0, total)
    out[...] = jnp.where(empty, 0.0, sums[: plan.tokens] * (1 / total)).astype(out.dtype)
    lse[0] = jnp.where(empty, -jnp.inf, top * LN2 + jnp.log(total))[:, 0]
    return total


def _scores(plan: Plan, unit: Unit, scaled: Any, k: Any) -> Array:
    """`scale * log2 e * q . k`, very low where there is no key: `[block, lanes]`."""
    return dot(scaled[unit.source(plan)], unit.gather(plan, k), 1, 1) + unit.bias(plan)


def _by_lane(p: Array) -> Array:
    """Sums of each row's weights, apart for each lane of a vector: `[rows, LANES]`.

    Of the rounded weights: the outputs are then true averages.
    """
    wide = p.astype(jnp.float32)
    return sum(wide[:, i : i + LANES] for i in range(0, p.shape[1], LANES))  # pyright: ignore


def _careful(plan: Plan, kept, row: Any, scaled, k, v, sums, totals, tops) -> None:
    """The walk of one query block with the running maximum of each of its rows."""
    turns = jax.lax.div(walk.count_of(kept, row) + plan.width - 1, jnp.int32(plan.width))

    def turn(i: Any, carry: Any) -> Any:
        top, total, sum_ = carry
        unit = walk.unit(plan, kept, row, i * plan.width)
        x = _scores(plan, unit, scaled, k)
        new = jnp.maximum(top, jnp.max(x, axis=-1, keepdims=True))
        fade = jnp.exp2(top - new)
        p = jnp.exp2(x - new).astype(v.dtype)
        return new, total * fade + _by_lane(p), sum_ * fade + dot(p, unit.gather(plan, v), 1, 0)

    start = [
        jnp.full((plan.block, w), x) for w, x in ((1, LOWEST), (LANES, 0.0), (v.shape[1], 0.0))
    ]
    at = pl.ds(pl.multiple_of(row * plan.block, plan.block), plan.block)
    tops[at], totals[at], sums[at] = jax.lax.fori_loop(0, turns, turn, tuple(start))
