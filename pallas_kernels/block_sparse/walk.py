"""The walk over kept blocks that the block-sparse TPU kernels share.

A grid step holds some row blocks (query blocks, or key blocks where dk and dv are computed), and
the other side lies in VMEM whole. The work is cut into *units*: one row block against `width` of
the blocks that it keeps, gathered side by side into one wide operand. A loop takes several units at
a time, whichever row they belong to: rows may keep different numbers of blocks without waiting for
each other, and one unit's products hide the latency of another's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from ..block_sizes import BlockSizes
from ..numerics import MASKED, precision
from ..tpu import chips
from ..tpu.call import available
from ..tpu.table import choose

LANES = 128

# Scores of the units that one turn of the loop works on, how many times fewer they are in float32,
# whose products take six passes, and most units: their addresses are scalar work.
TURN_SCORES = 2**20
FLOAT32_SHARE = 8
TURN_UNITS = 32

# Indices of a grid step in SMEM, which holds 2^18 words and two steps' indices.
STEP_INDICES = 2**15

# The share of the VMEM that kernels plan with, and how much of it is for all but the side that
# lies there whole.
VMEM_SHARE = 0.9
OTHER_BYTES = 6 * chips.MIB


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a body is specialised for.

    Args:
        block: tokens of a block.
        rows: row blocks of a grid step.
        width: kept blocks of a unit.
        units: units of a turn of the loop.
        budget: kept blocks that a row has room for, a multiple of `width`.
        length: tokens of the side that is walked over; those after it are masked.
        turns: turns of the loop, if every row keeps as many blocks as the average one.
    """

    block: int
    rows: int
    width: int
    units: int
    budget: int
    length: int
    turns: int

    @property
    def tokens(self) -> int:
        """Tokens of a grid step's rows."""
        return self.rows * self.block

    @property
    def most_units(self) -> int:
        """Units that there is room for, those included that a last turn has too many."""
        units = max(1, self.rows * (self.budget // self.width))
        return -(-units // self.units) * self.units

    @property
    def lanes(self) -> int:
        """Tokens of a unit's kept blocks."""
        return self.width * self.block


class Unit(NamedTuple):
    """Some kept blocks of one row block.

    Args:
        row: the row block, counted in the grid step; `plan.rows` for a unit that is for nothing.
        starts: the first token of each kept block.
        left: real tokens from the first of these blocks on; the blocks after them are padding.
    """

    row: Any
    starts: list[Any]
    left: Any

    def target(self, plan: Plan) -> Any:
        """The rows that results are added to, in a buffer with one block more than the step."""
        return pl.ds(pl.multiple_of(self.row * plan.block, plan.block), plan.block)

    def source(self, plan: Plan) -> Any:
        """The rows of the grid step to read."""
        row = jnp.minimum(self.row, plan.rows - 1)
        return pl.ds(pl.multiple_of(row * plan.block, plan.block), plan.block)

    def gather(self, plan: Plan, ref: Any) -> Array:
        """The kept blocks one below the other: `[lanes, dim]`."""
        starts = [pl.multiple_of(start, plan.block) for start in self.starts]
        return jnp.concatenate([ref[pl.ds(start, plan.block)] for start in starts])

    def real(self, plan: Plan) -> Bool[Array, "1 lanes"]:
        """Which tokens are real."""
        return jax.lax.broadcasted_iota(jnp.int32, (1, plan.lanes), 1) < self.left

    def bias(self, plan: Plan) -> Float[Array, "1 lanes"]:
        """0 for each real token, very low for the others."""
        return jnp.where(self.real(plan), 0.0, MASKED)

    def line(self, plan: Plan, ref: Any, other: float) -> Float[Array, "1 lanes"]:
        """The kept blocks of a vector laid out by `lines`, `other` for what is not real."""
        rows = [jax.lax.div(start, jnp.int32(plan.block)) for start in self.starts]
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        pieces = []
        for first in range(0, plan.lanes, LANES):
            here = rows[first // plan.block : -(-(first + LANES) // plan.block)]
            at = first % plan.block
            found = ref[pl.ds(here[0], 1), at : at + LANES]
            for j, row in enumerate(here[1:], 1):
                value = ref[pl.ds(row, 1), at : at + LANES]
                found = jnp.where(lane >= j * plan.block, value, found)
            pieces.append(found)
        return jnp.where(self.real(plan), jnp.concatenate(pieces, axis=1), other)


def make_plan(
    name: str,
    shape: dict[str, int],
    dtype: Any,
    *,
    block: int,
    row_blocks: int,
    budget: int,
    kept: float,
    length: int,
    block_sizes: BlockSizes,
) -> Plan:
    """Sizes of a kernel's steps: wishes for "rows" and "keys", in tokens, made to fit.

    `kept` is how many blocks an average row keeps, at most `budget`.
    """
    shape = shape | {"block": block, "kept": round(kept * block)}
    wishes = choose(name, shape, jnp.dtype(dtype).name, {"rows": 2048, "keys": 512}, block_sizes)
    least = max(1, LANES // block)  # blocks that fill a vector of lanes
    width = max(1, round(min(wishes["keys"], budget * block) / (least * block))) * least
    budget = -(-budget // width) * width
    rows = max(1, min(row_blocks, wishes["rows"] // block, STEP_INDICES // budget))
    scores = TURN_SCORES // (1 if jnp.dtype(dtype).itemsize == 2 else FLOAT32_SHARE)
    row_units = -(-kept // width)
    most = min(scores // (block * block * width), rows * row_units, TURN_UNITS)
    units = int(max(1, most))
    return Plan(block, rows, width, units, budget, length, int(-(-rows * row_units // units)))


def check(block: int, *arrays: Array) -> None:
    """Raises NotImplementedError for what the kernels cannot serve."""
    if not available():
        raise NotImplementedError("TPU kernels need a TPU")
    dtypes = {x.dtype for x in arrays}
    if len(dtypes) > 1 or arrays[0].dtype not in (jnp.bfloat16, jnp.float32):
        names = sorted(str(dtype) for dtype in dtypes)
        raise NotImplementedError(f"TPU kernels take bfloat16 or float32 throughout, got {names}")
    if any(0 in x.shape for x in arrays):
        raise NotImplementedError("TPU kernels take no empty arrays")
    least = 32 // arrays[0].dtype.itemsize
    if block < least or (LANES % block and block % LANES):
        raise NotImplementedError(
            f"TPU kernels take blocks of a multiple of {LANES} tokens, or of a power of two from "
            f"{least} on in {arrays[0].dtype.name}, got {block}"
        )


def listed(
    plan: Plan, indices: Int[Array, "g p c"], counts: Int[Array, "g p"], blocks: int
) -> Int[Array, "g steps 1 _"]:
    """What a grid step reads from SMEM: its turns, its units, real tokens and kept blocks by row.

    A unit is given by its row, where its first block stands among the kept blocks, and the real
    tokens from there on. Found beforehand, they need no chain of scalar steps in the kernel. Blocks
    are given by their first token. The units that a last turn has too many are for row `plan.rows`.
    """
    groups, p, budget = indices.shape
    counts = jnp.clip(counts.astype(jnp.int32), 0, budget)
    # What lies past a count is read and masked: it has to be a block that exists.
    indices = jnp.clip(indices.astype(jnp.int32), 0, blocks - 1)
    tokens = counts * plan.block
    if plan.length % plan.block and plan.length < blocks * plan.block:
        indices, short = _short_last(indices, counts, plan.length // plan.block)
        tokens -= jnp.where(short, plan.block - plan.length % plan.block, 0)
    steps = pl.cdiv(p, plan.rows)
    more = steps * plan.rows - p
    tokens = jnp.pad(tokens, ((0, 0), (0, more))).reshape(groups, steps, -1)
    room = ((0, 0), (0, more), (0, plan.budget - budget))
    starts = jnp.pad(indices * plan.block, room).reshape(groups, steps, -1)
    units = -(-tokens // plan.lanes)
    ends = jnp.cumsum(units, axis=-1)
    turns = jnp.maximum(1, -(-ends[..., -1:] // plan.units))
    number = jnp.arange(plan.most_units)
    row = (number[:, None] >= ends[..., None, :]).sum(-1)  # [g, steps, units]
    # By comparison, row by row, which XLA fuses: gathers are slow on a TPU.
    own = row[..., None] == jnp.arange(plan.rows)

    def of_row(x: Array) -> Array:
        return jnp.where(own, x[..., None, :], 0).sum(-1)

    before = (number - of_row(ends - units)) * (row < plan.rows)
    place = of_row(jnp.arange(plan.rows) * plan.budget) + before * plan.width
    left = of_row(tokens) - before * plan.lanes
    listed = jnp.stack([row, place, left], -1).reshape(groups, steps, -1).astype(jnp.int32)
    return jnp.concatenate([turns, listed, tokens, starts], axis=-1)[:, :, None]


def _short_last(
    indices: Int[Array, "g p c"], counts: Int[Array, "g p"], short: int
) -> tuple[Int[Array, "g p c"], Bool[Array, "g p"]]:
    """The block that is not full changes places with the last one of its row, where it is kept.

    What is masked then lies at the end of each row.
    """
    place = jnp.arange(indices.shape[-1])
    last = place == counts[..., None] - 1
    found = (indices == short) & (place < counts[..., None])
    any_ = found.any(-1)
    value = jnp.where(last, indices, 0).sum(-1)[..., None]
    indices = jnp.where(found, value, jnp.where(last & any_[..., None], short, indices))
    return indices, any_


def list_spec(plan: Plan) -> pl.BlockSpec:
    """A grid step's share of `listed`."""
    words = 1 + 3 * plan.most_units + plan.rows * (1 + plan.budget)
    return pl.BlockSpec((None, None, 1, words), lambda g, r: (g, r, 0, 0), memory_space=pltpu.SMEM)


def turns_of(kept: Any) -> Any:
    """Turns that a grid step's walk takes, at least one."""
    return kept[0, 0]


def tokens_of(plan: Plan, kept: Any, row: Any) -> Any:
    """Real tokens that a row of the grid step keeps."""
    return kept[0, 1 + 3 * plan.most_units + row]


def unit(plan: Plan, kept: Any, number: Any) -> Unit:
    """A unit by its number in the grid step."""
    row, place, left = (kept[0, 1 + 3 * number + i] for i in range(3))
    first = 1 + 3 * plan.most_units + plan.rows + place
    return Unit(row, [kept[0, first + j] for j in range(plan.width)], left)


def turn_of(plan: Plan, kept: Any, turn: Any) -> list[Unit]:
    """The units of a turn."""
    return [unit(plan, kept, turn * plan.units + i) for i in range(plan.units)]


def in_turns(plan: Plan, kept: Any, body: Callable[[list[Unit]], None]) -> None:
    """Calls `body` with the units of each turn."""

    def turn(i: Any, _: Any) -> Any:
        body(turn_of(plan, kept, i))
        return 0

    jax.lax.fori_loop(0, turns_of(kept), turn, 0)


def lines(x: Float[Array, "g n"], block: int) -> Float[Array, "g p lanes"]:
    """A vector as a row for each block, repeated until it fills a vector of lanes."""
    x = x.reshape(x.shape[0], -1, block)
    return jnp.tile(x, (1, 1, max(1, LANES // block)))


def parts(blocks: int, block: int, widths: Sequence[int], dtype: Any) -> list[range]:
    """The blocks that lie in VMEM at a time: all of them, or equal shares and what is left."""
    room = VMEM_SHARE * chips.current().vmem - OTHER_BYTES
    most = max(1, int(room) // (block * _token_bytes(widths, dtype)))
    share = pl.cdiv(blocks, pl.cdiv(blocks, most))
    return [range(i, min(i + share, blocks)) for i in range(0, blocks, share)]


def whole(
    number: int, share: int, block: int, widths: Sequence[int], dtype: Any
) -> list[pl.BlockSpec]:
    """Specs of the part of that number in VMEM, twice where the next head's fits beside it."""
    bytes_ = share * block * _token_bytes(widths, dtype)
    twice = 2 * bytes_ + OTHER_BYTES <= VMEM_SHARE * chips.current().vmem
    more: dict[str, Any] = {} if twice else {"pipeline_mode": pl.Buffered(1)}
    shapes = [(None, share * block, w) for w in widths]
    return [pl.BlockSpec(shape, lambda g, r: (g, number, 0), **more) for shape in shapes]


def _token_bytes(widths: Sequence[int], dtype: Any) -> int:
    """VMEM of a token: lanes are taken by the vector."""
    return jnp.dtype(dtype).itemsize * sum(pl.cdiv(w, LANES) * LANES for w in widths)


def of_part(
    part: range, indices: Int[Array, "g p c"], counts: Int[Array, "g p"]
) -> tuple[Int[Array, "g p _"], Int[Array, "g p"]]:
    """The kept blocks that lie in a part, counted from its first one."""
    used = jnp.arange(indices.shape[-1]) < counts[..., None]
    here = used & (indices >= part.start) & (indices < part.stop)
    # Those of other parts are sorted to the end.
    indices = jnp.sort(jnp.where(here, indices - part.start, len(part)), axis=-1)
    return indices[..., : len(part)], here.sum(-1, dtype=jnp.int32)


def turned(
    part: range, indices: Int[Array, "g p c"], counts: Int[Array, "g p"], blocks: int
) -> tuple[Int[Array, "g blocks _"], Int[Array, "g blocks"]]:
    """For each key block the query blocks of a part that keep it, counted from the first one."""
    indices, counts = (x[:, part.start : part.stop] for x in (indices, counts))
    used = jnp.arange(indices.shape[-1]) < counts[..., None]
    # Compared one by one, which XLA fuses into a reduction: scatters are slow on a TPU.
    same = indices[..., None, :] == jnp.arange(blocks)[:, None]  # [g, p, blocks, c]
    keep = (same & used[..., None, :]).any(-1).swapaxes(1, 2)
    number = jnp.where(keep, jnp.arange(len(part), dtype=jnp.int32), len(part))
    return jnp.sort(number, axis=-1), keep.sum(-1, dtype=jnp.int32)


def dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    """A product in float32."""
    return jax.lax.dot_general(
        a, b, (((over_a,), (over_b,)), ((), ())),
        precision=precision(a.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
