"""Scratch by position: written a block at a time, read a position at a time, and the reverse.

`[lane tiles, A*b * stride, 128]` of 32-bit words: row `r * stride + n` holds (key tile, block) n at
position r; in bfloat16 two blocks share a word, 2n in its low half and 2n + 1 in its high half,
which is how the chip stores two rows of bfloat16. A strided access is then one instruction a
register, and the whole transposition between the R and the L step. (Indexing a three-dimensional
scratch in its middle costs sixteen.)
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tpu.call import interpreting
from .plan import LANES, Plan


def by_position(plan: Plan) -> tuple[int, int, int]:
    """The shape of the scratch."""
    return plan.width // LANES, plan.rows * plan.stride, LANES


def lane_tiles(x: Any) -> list[Any]:
    """An array cut every 128 lanes."""
    return [x[:, at : at + LANES] for at in range(0, x.shape[-1], LANES)]


def words(x: Any, y: Any) -> Any:
    """Two float32 tiles as bfloat16, x in the low and y in the high half of each word."""
    if not interpreting():
        return pltpu.pack_elementwise([x, y], packed_dtype=jnp.bfloat16)
    low, high = (
        lax.bitcast_convert_type(t.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        for t in (x, y)
    )
    return low | (high << 16)


def scatter(plan: Plan, ref: Any, block: int, tile: Any) -> None:
    """Writes words `[rows, width]` of (key tile, block) `block` to every position."""
    rows = pl.ds(block // plan.words, plan.rows, stride=plan.stride)
    for lane, part in enumerate(lane_tiles(tile)):
        ref[pl.ds(lane, 1), rows, :] = part[None]


def gather(plan: Plan, ref: Any, block: int) -> Any:
    """What `scatter` wrote, `[rows, width]`."""
    rows = pl.ds(block // plan.words, plan.rows, stride=plan.stride)
    parts = [ref[pl.ds(lane, 1), rows, :][0] for lane in range(plan.width // LANES)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def at_position(plan: Plan, ref: Any, r: int, first: int = 0, last: int | None = None) -> Any:
    """Lanes `first:last` of position r, `[pairs, lanes]` in the arrays' dtype."""
    rows = slice(r * plan.stride, (r + 1) * plan.stride)
    lanes = range(first // LANES, (last or plan.width) // LANES)
    parts = [ref[lane, rows, :] for lane in lanes]
    if plan.narrow:
        parts = [pltpu.bitcast(part, plan.dtype) for part in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def clear_padding(plan: Plan, ref: Any) -> None:
    """Zeros where no block is ever written: products read those rows too."""
    written = plan.keys * plan.blocks // plan.words
    for n in range(written, plan.stride):
        zeros = jnp.zeros((plan.rows, plan.width), ref.dtype)
        scatter(plan, ref, n * plan.words, zeros)
