"""The mass of every pair of blocks on a TPU, in one pass over the keys.

    x[n,s]    = scale * q[n] . k[s]
    mass[p,c] = sum over n in query block p, s in key block c of 2^((x[n,s] - lse[n]) log2 e)

The weights of a query block are added up over its rows as they come, one vector of lanes below the
other, which leaves a line over the keys. A product with an indicator of the key blocks adds up the
line: over all the lines of a grid step, for whose few rows that product is cheap.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..attend.tpu_forward import LOG2E
from ..block_sizes import BlockSizes
from ..tpu.call import launch
from ..tpu.table import choose
from .walk import LANES, dot

NAME = "block_mass"


def masses(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    lse: Float[Array, "g n"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> Float[Array, "g p blocks"]:
    """`mass`; rows with an infinite `lse` have none."""
    groups, n, d = q.shape
    s = k.shape[1]
    blocks = s // block
    # Masses of a step: a whole vector of lanes, and whole tiles of query blocks.
    keys = min(s, LANES * block)
    shape = {"rows": n, "keys": s, "dim": d, "block": block}
    wishes = choose(NAME, shape, q.dtype.name, {"rows": 2048, "keys": 1024}, block_sizes)
    rows = max(1, wishes["rows"] // (8 * block)) * 8 * block
    rows = n if rows >= n else rows
    chunk = min(keys, max(1, wishes["keys"] // LANES) * LANES)
    steps = pl.cdiv(n, rows)
    lse = jnp.pad(lse * LOG2E, ((0, 0), (0, steps * rows - n)), constant_values=jnp.inf)
    # Which key of a step is in which of its blocks.
    inside = jnp.repeat(jnp.eye(keys // block, dtype=jnp.bfloat16), block, axis=0)
    pairs = groups * n * s
    return launch(
        functools.partial(_kernel, block, chunk, length, scale),
        name=NAME,
        grid=(groups, steps, pl.cdiv(s, keys)),
        in_specs=[
            pl.BlockSpec((None, rows, d), lambda g, r, j: (g, r, 0)),
            pl.BlockSpec((None, None, 1, rows), lambda g, r, j: (g, r, 0, 0)),
            pl.BlockSpec((None, keys, d), lambda g, r, j: (g, j, 0)),
            pl.BlockSpec((keys, keys // block), lambda g, r, j: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, rows // block, keys // block), lambda g, r, j: (g, r, j)),
        out_shape=jax.ShapeDtypeStruct((groups, n // block, blocks), jnp.float32),
        scratch=[
            pltpu.VMEM((rows // block, keys), jnp.float32),
            pltpu.VMEM((rows, 1), jnp.float32),
        ],
        semantics=("parallel", "parallel", "arbitrary"),
        flops=2 * pairs * d,
        exps=pairs,
        moved=q.dtype.itemsize * groups * d * (n + steps * s) + 4 * groups * n // block * blocks,
        blocks={"rows": rows, "keys": chunk},
        turns=keys // chunk,
    )(q, lse.reshape(groups, steps, 1, rows), k, inside)


def _kernel(block, chunk, length, scale, q, lse, k, inside, mass, sums, column) -> None:
    """One grid step: some query blocks, and the key blocks of one vector of lanes."""
    keys = k.shape[0]
    left = length - pl.program_id(2) * keys
    column[...] = jnp.transpose(lse[...])  # [rows, 1]
    scaled = (q[...].astype(jnp.float32) * (scale * LOG2E)).astype(q.dtype)

    def some(start: Any, size: int) -> None:
        x = dot(scaled, k[pl.ds(start, size)], 1, 1)
        p = jnp.exp2(x - column[...])  # [rows, size]
        sums[:, pl.ds(start, size)] = jnp.sum(p.reshape(-1, block, size), axis=1)

    def turn(i: Any, _: Any) -> Any:
        some(pl.multiple_of(i * chunk, chunk), chunk)
        return 0

    # Chunks without a real key are left out.
    turns = jnp.minimum(keys // chunk, jax.lax.div(left + chunk - 1, jnp.int32(chunk)))
    jax.lax.fori_loop(0, turns, turn, 0)
    if keys % chunk:
        some(keys // chunk * chunk, keys % chunk)
    # What lies past the keys may be anything, NaN included.
    real = jax.lax.broadcasted_iota(jnp.int32, (1, keys), 1) < left
    mass[...] = _by_block(jnp.where(real, sums[...], 0.0), inside[...])


def _by_block(lines: Array, inside: Array) -> Array:
    """Sums over the blocks of each line, by products in bfloat16 that lose nothing of note."""
    total = jnp.zeros((lines.shape[0], inside.shape[1]), jnp.float32)
    # Three pieces of 8 bits each make up a float32.
    for _ in range(3):
        piece = lines.astype(jnp.bfloat16)
        total += dot(piece, inside, 1, 0)
        lines = lines - piece.astype(jnp.float32)
    return total
