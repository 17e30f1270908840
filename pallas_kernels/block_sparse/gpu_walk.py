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

# A grid's second axis counts groups in 16 bits.
MOST_GROUPS = 65_535

# Registers of a thread of either kind: (2 * 240 + 24) * 128 of 65,536.
WORKER_REGISTERS = 240
COPIER_REGISTERS = 24

# Most blocks that are there or on their way.
MOST_STAGES = 8

# Shared memory for barriers and lines; what is allocated begins at a multiple of 1024 bytes.
OTHER_MEMORY = 3072


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a body is specialised for.

    Args:
        lists: of a block of threads.
        stages: copies that are there or on their way.
    """

    lists: int
    stages: int

    def slot(self, copy: Any) -> Any:
        """Where a copy lies in shared memory."""
        return lax.rem(copy, self.stages)


class Schedule(NamedTuple):
    """What blocks of threads read from memory.

    Args:
        order: the first token of each copy.
        numbers: copies, those in both lists, in the first and in the second alone, and how many
            tokens of each list's first copy count (0: the list is empty).
    """

    order: Int[Array, "g tiles room"]
    numbers: Int[Array, "g tiles 6"]


def plan(block: int, bytes_of_copy: int, held: int) -> Plan:
    """As many stages as shared memory has room for beside the `held` bytes."""
    room = (mode.SHARED_MEMORY - OTHER_MEMORY - held) // bytes_of_copy
    return Plan(TILE // block, min(room, MOST_STAGES))


def keep_map(
    indices: Int[Array, "g p c"], counts: Int[Array, "g p"], blocks: int
) -> Bool[Array, "g p blocks"]:
    """Which pairs of blocks the lists name."""
    g, p, budget = indices.shape
    used = jnp.arange(budget) < counts[..., None]
    columns = jnp.where(used, indices, blocks)  # beyond the end: dropped
    places = jnp.arange(g)[:, None, None], jnp.arange(p)[:, None], columns
    return jnp.zeros((g, p, blocks), bool).at[places].set(True, mode="drop")


def schedule(keep: Bool[Array, "g rows columns"], block: int, length: int, size: int) -> Schedule:
    """The order of copies for each tile of 128 rows.

    Args:
        keep: which blocks of columns each block of rows keeps.
        block: tokens of a block, of either side.
        length: tokens of the columns' side; those after it do not count.
        size: tokens of a copy, which divide a block.
    """
    keep = jnp.repeat(keep, block // size, axis=-1)
    g, _, columns = keep.shape
    number = jnp.arange(columns)
    keep = keep & (number * size < length)
    first = jnp.argmax(keep, axis=-1)
    limit = jnp.where(keep.any(-1), size, 0)
    if short := length % size:
        last = length // size
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
    order = jnp.zeros((g, tiles, room), jnp.int32).at[..., :lists].set(firsts * size)
    places = jnp.arange(g)[:, None, None], jnp.arange(tiles)[:, None], place
    order = order.at[places].set(jnp.broadcast_to(number * size, place.shape), mode="drop")
    return Schedule(order, jnp.stack(numbers, -1).astype(jnp.int32))


def grid_of(groups: int, rows: int) -> dict[str, Any]:
    """The grid of a kernel: tiles of a group run side by side, and read the same keys."""
    return {"grid": (-(-rows // TILE), groups), "grid_names": ("tiles", "groups")}


def run(
    plan: Plan,
    order: Any,
    numbers: Any,
    compute: Callable[[Any, Any, Any], None],
    copy: Callable[[Any, Any, Any], None],
    released: Any,
) -> None:
    """The body of a kernel: what its three warpgroups do.

    Args:
        plan: of the kernel, whose grid is `grid_of`.
        order: of the schedule, in memory.
        numbers: of the schedule, in memory.
        compute: `(worker, index of its rows, numbers of its tile)`.
        copy: `(group, slot, first token)`, starts a copy from the other side.
        released: the barrier of each slot.
    """
    worker = lax.axis_index("warpgroup")
    group, tile = lax.axis_index("groups"), lax.axis_index("tiles")

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
        self._copies, self._shared, self.limit = numbers[0], numbers[1], numbers[4]
        self._worker, self._other, self.rest = 0, 0, self._shared
        if plan.lists > 1:
            own, other = numbers[2 + worker], numbers[3 - worker]
            self._worker, self._other, self.rest = worker, other, self._shared + own
            self.limit = numbers[4 + worker]

    def run(
        self,
        more: Callable[[list[Any], Any, Callable[[], None]], Any],
        *,
        first: Callable[[Any, Callable[[], None]], Any] | None = None,
        start: Any = None,
        at_once: int = 1,
    ) -> Any:
        """What a warpgroup carries away from its list.

        Both functions call `then` when their last products are under way. What is held then and
        what is waited for span `2 * at_once + 1` copies, so there must be as many stages: neither
        warpgroup can wait for a copy whose slot it holds itself.

        Args:
            more: `(slots, carry, then)`, adds some more copies to what is carried.
            first: `(slot, then)`, makes it from the list's first copy, of which the first `limit`
                tokens count. `None`: that is for `more` too, from `start` on.
            start: what is carried before the first copy.
            at_once: copies that `more` is given, except that an odd one comes alone.
        """
        begin = self._place(-1)
        self._pass(0, begin)
        self._wait(begin)

        def visit(i: Any, carry: Any, count: int) -> Any:
            for j in range(1, count):
                self._go_to(i + j)
            places = [self._place(i + j) for j in range(count)]
            slots = [self._plan.slot(place) for place in places]
            carry = more(slots, carry, lambda: self._go_to(i + count))
            for place in places:
                self._release(place)
            return carry

        def single(i: Any, carry: Any) -> Any:
            return visit(i, carry, 1)

        if first is None:
            carry = lax.fori_loop(-1, self.rest, single, start)
        else:
            carry = first(self._plan.slot(begin), lambda: self._go_to(0))
            self._release(begin)
            odd = lax.rem(self.rest, at_once) if at_once > 1 else 0
            if at_once > 1:
                carry = lax.fori_loop(0, odd, single, carry)
            turns = lax.div(self.rest, at_once)
            carry = lax.fori_loop(
                0, turns, lambda i, carry: visit(odd + i * at_once, carry, at_once), carry
            )
        self._pass(self._place(self.rest - 1) + 1, self._copies)
        return carry

    def _place(self, i: Any) -> Any:
        """The number of the copy that is `i` of the list's; -1 is its first."""
        lists = self._plan.lists
        first = self._worker
        if lists == 1:
            return i + 1
        alone = i - self._shared
        apart = lists + i + jnp.minimum(alone + self._worker, self._other)
        return jnp.where(i < 0, first, jnp.where(alone < 0, lists + i, apart))

    def _go_to(self, i: Any) -> None:
        """Waits for the list's copy `i`, if there is one."""

        @pl.when(i < self.rest)
        def _():
            place = self._place(i)
            self._pass(self._place(i - 1) + 1, place)
            self._wait(place)

    def _pass(self, start: Any, stop: Any) -> None:
        """Past copies that only the other list names."""
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
