"""The gradient of block-sparse attention on a TPU: two walks, which compute the scores again.

    P  = 2^(x log2 e - lse log2 e)                     lse is known: no maximum, P <= 1
    dP = dout . v ;  dS = P (dP - delta) ;  delta = dout . out - dlse
    dq = scale sum_s dS k[s]                           query blocks walk over their key blocks
    dk = scale sum_n dS q[n] ;  dv = sum_n P dout[n]   key blocks over the query blocks that keep
                                                       them

The second walk is over the transposed lists, and its scores are transposed too, `[keys, rows]`: its
products are as deep as a unit is wide. Were dk and dv added up on the first walk instead, its
products would be as deep as a block, a quarter of a wide matmul unit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..attend.tpu_forward import LN2, LOG2E
from ..block_sizes import BlockSizes
from ..numerics import MASKED
from ..tpu.call import launch
from . import walk
from .walk import Plan, Unit, dot

DQ, DKV = "block_sparse_dq", "block_sparse_dkv"


def backward(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    indices: Int[Array, "g p c"],
    counts: Int[Array, "g p"],
    out: Float[Array, "g n e"],
    lse: Float[Array, "g n"],
    dout: Float[Array, "g n e"],
    dlse: Float[Array, "g n"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n d"], Float[Array, "g s d"], Float[Array, "g s e"]]:
    """`(dq, dk, dv)` from the result of the forward pass and its gradient."""
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    # A row without keys gets a log-sum-exp above every score, which leaves it no weight.
    empty = jnp.isneginf(lse)
    delta = (wide(dout) * wide(out)).sum(-1) - jnp.where(empty, 0.0, dlse)
    lse = jnp.where(empty, -MASKED, lse * LOG2E)
    # Rounded as the forward pass rounds it, so that the weights are the same.
    scaled = (wide(q) * (scale * LOG2E)).astype(q.dtype)
    dout = dout.astype(q.dtype)
    arrays = scaled, k, v, dout, lse, delta
    more: dict[str, Any] = {"block": block, "length": length, "block_sizes": block_sizes}
    widths = k.shape[2], v.shape[2]
    parts = walk.parts(k.shape[1] // block, block, widths, k.dtype)
    dqs = [
        _of_queries(*arrays, indices, counts, parts, i, scale, **more) for i in range(len(parts))
    ]
    parts = walk.parts(q.shape[1] // block, block, widths, k.dtype)
    pairs = [_of_keys(*arrays, indices, counts, parts, i, **more) for i in range(len(parts))]
    dks, dvs = zip(*pairs, strict=True)
    dq, dk, dv = (functools.reduce(jnp.add, x) for x in (dqs, dks, dvs))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _of_queries(
    q, k, v, dout, lse, delta, indices, counts, parts, number, scale, *, block, length, block_sizes
) -> Array:
    """The share of dq that comes from one part of the keys."""
    groups, n, d = q.shape
    e = v.shape[2]
    part, share = parts[number], len(parts[0])
    if len(parts) > 1:
        indices, counts = walk.of_part(part, indices, counts)
    kept = indices.shape[2]
    plan = walk.make_plan(
        DQ, {"rows": n, "keys": k.shape[1], "dim": d, "width": e}, q.dtype,
        block=block, row_blocks=n // block, budget=kept, kept=kept,
        length=length - part.start * block, block_sizes=block_sizes,
    )  # fmt: skip
    steps = pl.cdiv(n, plan.tokens)
    room = ((0, 0), (0, 0), (0, steps * plan.tokens - n))
    lines = jnp.pad(jnp.stack([lse, delta], 1), room)
    lines = lines.reshape(groups, 2, steps, plan.tokens).swapaxes(1, 2)

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, plan.tokens, width), lambda g, r: (g, r, 0))

    pairs = groups * n * kept * block
    return launch(
        functools.partial(_queries_kernel, plan, scale),
        name=DQ,
        grid=(groups, steps),
        in_specs=[
            walk.list_spec(plan), of_rows(d), of_rows(e),
            pl.BlockSpec((None, None, 2, plan.tokens), lambda g, r: (g, r, 0, 0)),
            *walk.whole(number, share, block, (d, e), q.dtype),
        ],
        out_specs=of_rows(d),
        out_shape=jax.ShapeDtypeStruct((groups, n, d), q.dtype if len(parts) == 1 else jnp.float32),
        scratch=[
            pltpu.VMEM((plan.tokens, 2), jnp.float32),
            pltpu.VMEM((plan.tokens + block, d), jnp.float32),
        ],
        semantics=("parallel", "arbitrary"),
        flops=2 * pairs * (2 * d + e),
        exps=pairs,
        moved=q.dtype.itemsize * groups * (n * (2 * d + e) + len(part) * block * (d + e)),
        blocks={"rows": plan.tokens, "keys": plan.lanes},
        turns=plan.turns,
    )(walk.listed(plan, indices, counts, len(part)), q, dout, lines, k, v)  # fmt: skip


def _queries_kernel(plan: Plan, scale, kept, q, dout, lines, k, v, dq, columns, sums) -> None:
    """One grid step of the first walk."""
    columns[...] = jnp.transpose(lines[...])  # [rows, 2]
    sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def units(here: list[Unit]) -> None:
        keys = [unit.gather(plan, k) for unit in here]
        at = [unit.source(plan) for unit in here]
        x = [dot(q[i], keys, 1, 1) for i, keys in zip(at, keys, strict=True)]
        dp = [dot(dout[i], unit.gather(plan, v), 1, 1) for i, unit in zip(at, here, strict=True)]
        ds = []
        for i, unit, x_, dp_ in zip(at, here, x, dp, strict=True):
            p = jnp.exp2(x_ + unit.bias(plan) - columns[i, :1])
            ds.append((p * (dp_ - columns[i, 1:])).astype(k.dtype))
        more = [dot(ds, keys, 1, 0) for ds, keys in zip(ds, keys, strict=True)]
        for unit, more_ in zip(here, more, strict=True):
            sums[unit.target(plan)] += more_

    walk.in_turns(plan, kept, units)
    dq[...] = (scale * sums[: plan.tokens]).astype(dq.dtype)


def _of_keys(
    q, k, v, dout, lse, delta, indices, counts, parts, number, *, block, length, block_sizes
) -> tuple[Array, Array]:
    """The shares of dk and dv that come from one part of the queries."""
    groups, s, d = k.shape
    e = v.shape[2]
    part, share = parts[number], len(parts[0])
    pairs = len(part) * indices.shape[2]
    indices, counts = walk.turned(part, indices, counts, s // block)
    plan = walk.make_plan(
        DKV, {"rows": s, "keys": q.shape[1], "dim": d, "width": e}, q.dtype,
        block=block, row_blocks=s // block, budget=len(part), kept=pairs / (s // block),
        length=len(part) * block, block_sizes=block_sizes,
    )  # fmt: skip
    pairs *= groups * block**2
    width = max(block, walk.LANES)

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, plan.tokens, width), lambda g, r: (g, r, 0))

    line = pl.BlockSpec((None, share, width), lambda g, r: (g, number, 0))
    dtype = q.dtype if len(parts) == 1 else jnp.float32
    return launch(
        functools.partial(_keys_kernel, plan, length),
        name=DKV,
        grid=(groups, pl.cdiv(s, plan.tokens)),
        in_specs=[
            walk.list_spec(plan), of_rows(d), of_rows(e), line, line,
            *walk.whole(number, share, block, (d, e), q.dtype),
        ],
        out_specs=[of_rows(d), of_rows(e)],
        out_shape=[jax.ShapeDtypeStruct((groups, s, w), dtype) for w in (d, e)],
        scratch=[pltpu.VMEM((plan.tokens + block, w), jnp.float32) for w in (d, e)],
        semantics=("parallel", "arbitrary"),
        flops=4 * pairs * (d + e),
        exps=pairs,
        moved=q.dtype.itemsize * groups * (2 * s + len(part) * block) * (d + e),
        blocks={"rows": plan.tokens, "keys": plan.lanes},
        turns=plan.turns,
    )(
        walk.listed(plan, indices, counts, len(part)), k, v,
        walk.lines(lse, block), walk.lines(delta, block), q, dout,
    )  # fmt: skip


def _keys_kernel(plan, length, kept, k, v, lse, delta, q, dout, dk, dv, dk_sums, dv_sums) -> None:
    """One grid step of the second walk: scores are `[keys, rows]`."""
    dk_sums[...] = jnp.zeros(dk_sums.shape, jnp.float32)
    dv_sums[...] = jnp.zeros(dv_sums.shape, jnp.float32)

    def units(here: list[Unit]) -> None:
        at = [unit.source(plan) for unit in here]
        queries = [unit.gather(plan, q) for unit in here]
        douts = [unit.gather(plan, dout) for unit in here]
        x = [dot(k[i], queries, 1, 1) for i, queries in zip(at, queries, strict=True)]
        dp = [dot(v[i], douts, 1, 1) for i, douts in zip(at, douts, strict=True)]
        # A log-sum-exp above every score leaves no weight to what is not real.
        p = [jnp.exp2(x - unit.line(plan, lse, -MASKED)) for x, unit in zip(x, here, strict=True)]
        ds = [
            (p * (dp - unit.line(plan, delta, 0.0))).astype(q.dtype)
            for p, dp, unit in zip(p, dp, here, strict=True)
        ]
        more_dv = [dot(p.astype(q.dtype), dout, 1, 0) for p, dout in zip(p, douts, strict=True)]
        more_dk = [dot(ds, query, 1, 0) for ds, query in zip(ds, queries, strict=True)]
        for unit, of_k, of_v in zip(here, more_dk, more_dv, strict=True):
            dk_sums[unit.target(plan)] += of_k
            dv_sums[unit.target(plan)] += of_v

    walk.in_turns(plan, kept, units)
    left = length - pl.program_id(1) * plan.tokens
    real = jax.lax.broadcasted_iota(jnp.int32, (plan.tokens, 1), 0) < left
    # The queries came scaled by scale * log2 e, and dk wants them scaled by scale.
    dk[...] = jnp.where(real, LN2 * dk_sums[: plan.tokens], 0.0).astype(dk.dtype)
    dv[...] = jnp.where(real, dv_sums[: plan.tokens], 0.0).astype(dv.dtype)
