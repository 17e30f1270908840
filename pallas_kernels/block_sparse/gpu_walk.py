"""The walk over kept blocks that the block-sparse GPU kernels share.

A block of threads has 128 rows: two warpgroups that compute, with 64 rows each, and a third that
copies the blocks of the other side ahead of them, at the places that a list in memory names.

- Blocks of 128 rows: both warpgroups walk over the list of their block.
- Blocks of 64: each warpgroup has the list of its own block. What only one list names is copied for
  one of them, what both name is copied once for both. Neighbouring blocks of a video keep many of
  the same keys. Without sharing, K and V would be 1 byte for every 64 FLOPs, where an H100's L2
  cache has 1 byte for every 180 FLOPs at the peak of its matrix units.

Order means nothing to a sum of weights, so the order of copies is made to suit: first one block for
each list, which is masked (there the block that is not full goes), then what both lists name, then
in turns what only one does. A warpgroup passes by what is not its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int

from ..gpu import mode
from ..gpu.call import ROWS

# Warpgroups that compute; one more copies.
WORKERS = 2
TILE = WORKERS * ROWS

# Blocks that are served.
BLOCKS = (ROWS, TILE)

# Registers of a thread of either kind: (2 * 240 + 24) * 128 of 65,536.
WORKER_REGISTERS = 240
COPIER_REGISTERS = 24

# Most blocks that are there or on their way.
MOST_STAGES = 8

# Shared memory for barriers, lines and what the compiler puts between.
OTHER_MEMORY = 4096


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a body is specialised for.

    Args:
        block: tokens of a block.
        stages: blocks of the other side that are there or on their way.
    """

    block: int
    stages: int

    @property
    def lists(self) -> int:
        """Lists of a block of threads."""
        return TILE // self.block

    def slot(self, copy: Any) -> Any:
        """Where a copy lies in shared memory."""
        return lax.rem(copy, self.stages)


class Schedule(NamedTuple):
    """What blocks of threads read from memory.

    Args:
        order: the first token of each copied block, in the order of the copies.
        numbers: copies, blocks in both lists, in the first and in the second alone, and how many
            tokens of each list's first block count (0: the list is empty).
    """

    order: Int[Array, "g tiles room"]
    numbers: Int[Array, "g tiles 6"]


def plan(block: int, bytes_of_block: int, held: int) -> Plan:
    """As many stages as shared memory has room for beside the `held` bytes."""
    room = (mode.SHARED_MEMORY - OTHER_MEMORY - held) // bytes_of_block
    return Plan(block, min(room, MOST_STAGES))


def keep_map(
    indices: Int[Array, "g p c"], counts: Int[Array, "g p"], blocks: int
) -> Bool[Array, "g p blocks"]:
    """Which pairs of blocks the lists name."""
    g, p, budget = indices.shape
    used = jnp.arange(budget) < counts[..., None]
    columns = jnp.where(used, indices, blocks)  # beyond the end: dropped
    places = jnp.arange(g)[:, None, None], jnp.arange(p)[:, None], columns
    return jnp.zeros((g, p, blocks), bool).at[places].set(True, mode="drop")


def schedule(keep: Bool[Array, "g rows columns"], block: int, length: int) -> Schedule:
    """The order of copies for each tile of 128 rows; tokens from `length` on do not count."""
    g, _, columns = keep.shape
    number = jnp.arange(columns)
    keep = keep & (number * block < length)
    first = jnp.argmax(keep, axis=-1)
    limit = jnp.where(keep.any(-1), block, 0)
    if short := length % block:
        last = length // block
        first = jnp.where(keep[..., last], last, first)
        limit = jnp.where(keep[..., last], short, limit)
    rest = keep & (number != first[..., None])
    lists = TILE // block
    if lists == 1:
        room = columns + 1
        place = 1 + jnp.cumsum(rest, axis=-1) - 1
        place = jnp.where(rest, place, room)
        firsts = first[..., None]
        copies = 1 + rest.sum(-1)
        zeros = jnp.zeros_like(copies)
        numbers = (copies, copies - 1, zeros, zeros, limit, limit)
    else:
        if keep.shape[1] % 2:
            rest = jnp.pad(rest, ((0, 0), (0, 1), (0, 0)))
            first, limit = (jnp.pad(x, ((0, 0), (0, 1))) for x in (first, limit))
        a, b = rest[:, 0::2], rest[:, 1::2]
        both, a, b = a & b, a & ~b, b & ~a
        shared, own_a, own_b = (x.sum(-1) for x in (both, a, b))
        room = columns + 2
        ranks = [jnp.cumsum(x, axis=-1) - 1 for x in (both, a, b)]
        apart = 2 + shared[..., None]
        place = jnp.where(both, 2 + ranks[0], room)
        place = jnp.where(a, apart + ranks[1] + jnp.minimum(ranks[1], own_b[..., None]), place)
        place = jnp.where(b, apart + ranks[2] + jnp.minimum(ranks[2] + 1, own_a[..., None]), place)
        firsts = jnp.stack([first[:, 0::2], first[:, 1::2]], -1)
        copies = 2 + shared + own_a + own_b
        numbers = (copies, shared, own_a, own_b, limit[:, 0::2], limit[:, 1::2])
    tiles = firsts.shape[1]
    order = jnp.zeros((g, tiles, room), jnp.int32).at[..., :lists].set(firsts * block)
    places = jnp.arange(g)[:, None, None], jnp.arange(tiles)[:, None], place
    order = order.at[places].set(jnp.broadcast_to(number * block, place.shape), mode="drop")
    return Schedule(order, jnp.stack(numbers, -1).astype(jnp.int32))


def run(
    plan: Plan,
    rows: int,
    order: Any,
    numbers: Any,
    compute: Callable[[Any, Any, Any], None],
    copy: Callable[[Any, Any, Any], None],
    released: Any,
) -> None:
    """The body of a kernel: what its three warpgroups do.

    Args:
        plan: of the kernel.
        rows: of a group.
        order: of the schedule, in memory.
        numbers: of the schedule, in memory.
        compute: `(worker, index of its rows, numbers of its tile)`.
        copy: `(group, slot, first token)`, starts the copies of a block of the other side.
        released: the barrier of each slot.
    """
    worker = lax.axis_index("warpgroup")
    at, tiles = lax.axis_index("blocks"), -(-rows // TILE)
    group, tile = lax.div(at, tiles), lax.rem(at, tiles)

    @pl.when(worker < WORKERS)
    def _():
        plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
        index = (group, pl.ds(tile * TILE + worker * ROWS, ROWS))
        compute(worker, index, numbers.at[group, tile])

    @pl.when(worker == WORKERS)
    def _():
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
        copies = numbers[group, tile, 0]

        @pl.loop(0, jnp.minimum(copies, plan.stages))
        def _(step):
            copy(group, step, order[group, tile, step])

        @pl.loop(plan.stages, copies)
        def _(step):
            start = order[group, tile, step]  # under way while the slot is waited for
            slot = plan.slot(step)
            plgpu.barrier_wait(released.at[slot])
            copy(group, slot, start)

        @pl.loop(jnp.maximum(copies - plan.stages, 0), copies)
        def _(step):  # nobody leaves with a signal unheard
            plgpu.barrier_wait(released.at[plan.slot(step)])


class Walk:
    """A computing warpgroup's way through the copies of its block of threads."""

    def __init__(self, plan: Plan, numbers: Any, worker: Any, loaded: Any, released: Any) -> None:
        """`numbers`: of the schedule, in memory; the barriers have `plan.stages` slots."""
        self._plan, self._loaded, self._released = plan, loaded, released
        self._copies, self._shared, own_a, own_b, limit_a, limit_b = (numbers[i] for i in range(6))
        self._worker = worker if plan.lists > 1 else 0
        second = worker == 1
        self._other = jnp.where(second, own_a, own_b)
        self.limit = jnp.where(second, limit_b, limit_a)
        self.rest = self._shared + jnp.where(second, own_b, own_a)

    def run(
        self,
        first: Callable[[Any, Callable[[], None]], Any],
        more: Callable[[list[Any], Any, Callable[[], None]], Any],
        at_once: int = 1,
    ) -> Any:
        """What a warpgroup carries away from its list.

        Args:
            first: `(slot, then)`, makes what is carried from the list's first block, of which the
                first `limit` tokens count.
            more: `(slots, carry, then)`, adds some more blocks to it.
            at_once: blocks that `more` is given, except that an odd one comes alone.

        Both call `then` when their last products are under way.
        """
        start = self._place(-1)
        self._pass(0, start)
        self._wait(start)
        carry = first(self._plan.slot(start), lambda: self._go_to(0))
        self._release(start)
        odd = lax.rem(self.rest, at_once) if at_once > 1 else 0

        def visit(i: Any, carry: Any, count: int) -> Any:
            for j in range(1, count):
                self._go_to(i + j)
            places = [self._place(i + j) for j in range(count)]
            slots = [self._plan.slot(place) for place in places]
            carry = more(slots, carry, lambda: self._go_to(i + count))
            for place in places:
                self._release(place)
            return carry

        if at_once > 1:
            carry = lax.fori_loop(0, odd, lambda i, carry: visit(i, carry, 1), carry)
        turns = lax.div(self.rest, at_once)
        carry = lax.fori_loop(
            0, turns, lambda i, carry: visit(odd + i * at_once, carry, at_once), carry
        )
        self._pass(self._place(self.rest - 1) + 1, self._copies)
        return carry

    def run_in_pieces(self, add: Callable[..., Any], start: Any) -> Any:
        """`run` with 64 tokens at a time: `add(slot, first token, limit, carry, then)`.

        `limit` is `None` for all but the first block, and is counted from the first token there.
        """
        pieces = range(0, self._plan.block, ROWS)

        def block(slot: Any, limit: Any, carry: Any, then: Callable[[], None]) -> Any:
            for piece in pieces:
                left = None if limit is None else limit - piece
                carry = add(slot, piece, left, carry, then if piece == pieces[-1] else _nothing)
            return carry

        return self.run(
            lambda slot, then: block(slot, self.limit, start, then),
            lambda slots, carry, then: block(slots[0], None, carry, then),
        )

    def _place(self, i: Any) -> Any:
        """The number of the copy with the list's block `i`; -1 is its first."""
        lists = self._plan.lists
        first = self._worker
        if lists == 1:
            return i + 1
        alone = i - self._shared
        apart = lists + i + jnp.minimum(alone + self._worker, self._other)
        return jnp.where(i < 0, first, jnp.where(alone < 0, lists + i, apart))

    def _go_to(self, i: Any) -> None:
        """Waits for the list's block `i`, if there is one."""

        @pl.when(i < self.rest)
        def _():
            place = self._place(i)
            self._pass(self._place(i - 1) + 1, place)
            self._wait(place)

    def _pass(self, start: Any, stop: Any) -> None:
        """Past blocks that only the other list names."""
        if self._plan.lists == 1:
            return

        @pl.loop(start, stop)
        def _(copy):
            self._wait(copy)
            self._release(copy)

    def _wait(self, copy: Any) -> None:
        plgpu.barrier_wait(self._loaded.at[self._plan.slot(copy)])

    def _release(self, copy: Any) -> None:
        plgpu.barrier_arrive(self._released.at[self._plan.slot(copy)])


def _nothing() -> None:
    pass
