"""Dense attention and the mass of every pair of blocks on a TPU, in one pass over the keys.

    p[n,s]    = 2^(scale log2 e q[n] . k[s] - m)
    lse[n], out[n]: as `attend`
    mass[c',c] = sum over n in query block c', s in key block c of p[n,s] / l[n]

A softmax needs the sum of a row's weights anyway. It is had by adding up vectors of lanes, and
which keys meet in a lane is for us to choose, since attention does not ask in which order its keys
come. So the keys of a grid step are laid out *across* their blocks: the first tokens of all blocks,
the second tokens, and so on. Keys that meet in a lane are then of one block, and the sum of each
block is there before the lanes are added up: the masses cost no product and no addition of their
own. They stay in VMEM, `[rows, key blocks]`, until the sum of the whole row is known.

Nor does a mask cost any for each score: what is padded is zero, in K and in V, adds nothing to the
output, and is left out of the sums a lane at a time.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..attend import tpu_forward as dense
from ..block_sizes import BlockSizes
from ..chunks import map_chunks
from ..numerics import MASKED
from ..tpu import chips
from ..tpu.call import launch
from ..tpu.table import choose
from .walk import LANES

NAME = "attend_mass"

# Rows and keys of a grid step in bfloat16: what has as many columns as blocks of 64 have tokens.
ROWS = 512
KEYS = 8192

# The share of the VMEM that a plan counts with; the compiler wants some for itself.
VMEM_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the keys of a grid step lie: `columns` vectors of `lanes` keys.

    Key `i` of block `b` lies at `i blocks + b`; a block has `spread` lanes of each column.

    Args:
        block: tokens of a block.
        blocks: key blocks of a grid step, a power of two.
        length: keys that are there in all.
        steps: grid steps over all keys.
    """

    block: int
    blocks: int
    length: int
    steps: int

    @property
    def lanes(self) -> int:
        """Lanes of a column."""
        return max(LANES, self.blocks)

    @property
    def spread(self) -> int:
        """Lanes that a block has in a column."""
        return self.lanes // self.blocks

    @property
    def columns(self) -> int:
        """Columns of a grid step."""
        return self.block // self.spread

    @property
    def keys(self) -> int:
        """Keys of a grid step."""
        return self.blocks * self.block

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Columns whose padded keys stand in the same lanes, from and to."""
        short = self.length % self.block
        whole = short // self.spread
        cuts = [0, whole, whole + (short % self.spread > 0), self.columns]
        return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]

    def arrange(self, x: Float[Array, "g s d"]) -> Float[Array, "g keys d"]:
        """Keys, or their values, in this order; what is not there is zero."""
        groups, s, d = x.shape
        x = jnp.where(jnp.arange(s)[:, None] < self.length, x, 0)[:, : self.steps * self.keys]
        x = jnp.pad(x, ((0, 0), (0, self.steps * self.keys - x.shape[1]), (0, 0)))
        x = x.reshape(groups, self.steps, self.blocks, self.block, d)
        return x.swapaxes(2, 3).reshape(groups, -1, d)

    def gather(self, mass: Array, rows: int, blocks: int) -> Float[Array, "g rows blocks"]:
        """The masses of each block from those of its lanes."""
        groups = mass.shape[0]
        mass = mass.reshape(groups, -1, self.steps, self.spread, self.blocks).sum(3)
        mass = mass.reshape(groups, mass.shape[1], -1)[:, :rows, :blocks]
        return jnp.pad(mass, ((0, 0), (0, 0), (0, blocks - mass.shape[2])))


def attend_masses(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    *,
    block: int,
    rows: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"], Float[Array, "g p blocks"]]:
    """`(out, lse, mass)`; only the first `rows` queries have any mass.

    Of many heads a few at a time, since K and V are copied into another order.

    Raises:
        NotImplementedError: if the masses of a grid step's rows do not fit in VMEM.
    """
    (n, d), (s, e) = q.shape[1:], v.shape[1:]
    step_rows, layout = _sizes(n, s, d, e, q.dtype, block, length, block_sizes)

    def some(_: Any, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        return _masses(layout, step_rows, rows, scale, q, k, v)

    at_once = block_sizes.bytes() * k.shape[0] // max(k.nbytes, v.nbytes)
    return map_chunks(some, at_once, q, k, v)


def _masses(layout, step_rows, rows, scale, q, k, v) -> tuple[Array, Array, Array]:
    """Launches the kernel."""
    groups, n, d = q.shape
    s, e = v.shape[1:]
    block = layout.block
    k, v = layout.arrange(k), layout.arrange(v)
    row_steps = pl.cdiv(n, step_rows)
    plan = dense.Plan(
        groups, 1, n, step_rows, layout.steps, layout.keys, (e,), (1.0,), scale,
        shared=False, entropy=False, biased=False, dtype=q.dtype,
    )  # fmt: skip
    here, lanes = step_rows // block, layout.steps * layout.lanes
    pairs = groups * n * layout.steps * layout.keys
    size = q.dtype.itemsize
    out, lse, mass = launch(
        functools.partial(_kernel, plan, layout, rows),
        name=NAME,
        grid=(groups, row_steps, layout.steps),
        in_specs=[
            pl.BlockSpec((1, step_rows, d), lambda g, r, j: (g, r, 0)),
            pl.BlockSpec((1, layout.keys, d), lambda g, r, j: (g, j, 0)),
            pl.BlockSpec((1, layout.keys, e), lambda g, r, j: (g, j, 0)),
        ],
        out_specs=[
            pl.BlockSpec((1, step_rows, e), lambda g, r, j: (g, r, 0)),
            pl.BlockSpec((1, 1, 1, step_rows), lambda g, r, j: (g, r, 0, 0)),
            pl.BlockSpec((None, None, here, lanes), lambda g, r, j: (g, r, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((groups, n, e), v.dtype),
            jax.ShapeDtypeStruct((groups, row_steps, 1, step_rows), jnp.float32),
            jax.ShapeDtypeStruct((groups, row_steps, here, lanes), jnp.float32),
        ],
        scratch=[
            pltpu.VMEM((2, step_rows, e), jnp.float32),
            pltpu.VMEM((2, step_rows, 1), jnp.float32),
            pltpu.VMEM((step_rows, 1), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((layout.steps, step_rows, layout.lanes), jnp.float32),
        ],
        semantics=("parallel", "arbitrary", "arbitrary"),
        flops=2 * pairs * (d + e),
        exps=pairs,
        moved=size * groups * (n * (d + e) + row_steps * layout.steps * layout.keys * (d + e))
        + 4 * groups * (n + row_steps * here * lanes),
        blocks={"rows": step_rows, "keys": layout.keys},
    )(q, k, v)
    return out, lse.reshape(groups, -1)[:, :n], layout.gather(mass, n // block, s // block)


def _sizes(n, s, d, e, dtype, block, length, block_sizes) -> tuple[int, _Layout]:
    """Rows and keys of a grid step: wishes made to fit the blocks and the VMEM."""
    size = jnp.dtype(dtype).itemsize
    # A float32 product takes six passes, and a body is only so long.
    defaults = {"rows": ROWS * 2 // size, "keys": KEYS * 2 // size}
    shape = {"rows": n, "keys": s, "dim": d, "width": e, "block": block}
    wishes = choose(NAME, shape, jnp.dtype(dtype).name, defaults, block_sizes)
    budget = int(VMEM_SHARE * chips.current().vmem)
    blocks = pl.cdiv(length, block)
    least = max(1, LANES // block)  # keys that fill a vector of lanes
    # Powers of two: each block of a step has as many lanes as any other.
    here = max(least, 1 << (min(wishes["keys"] // block, blocks) - 1).bit_length())
    row_blocks = min(max(1, wishes["rows"] // block), n // block)

    def bytes_of(rows: int, layout: _Layout) -> int:
        width = pl.cdiv(d, LANES) * LANES + pl.cdiv(e, LANES) * LANES
        moving = 2 * size * (rows + layout.keys) * width
        running = 4 * rows * (2 * width + 3 * LANES + layout.steps * layout.lanes)
        masses = 2 * 4 * pl.cdiv(rows, 8 * block) * 8 * layout.steps * layout.lanes
        return moving + running + masses + rows * layout.keys * (4 + size)

    while True:
        layout = _Layout(block, here, length, pl.cdiv(blocks, here))
        rows = row_blocks * block
        if bytes_of(rows, layout) <= budget:
            return rows, layout
        if row_blocks > 1:
            row_blocks //= 2
        elif here > least:
            here //= 2
        else:
            raise NotImplementedError(
                f"masses of {rows} rows in {blocks} key blocks do not fit {budget} bytes of VMEM"
            )


def _kernel(plan, layout, rows, q, k, v, out, lse, mass, *state) -> None:
    """One grid step: some rows against the keys of some blocks."""
    *running, sums = state
    first = pl.program_id(1) * plan.rows
    row = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0)
    inside = row < plan.n - first if plan.n % plan.rows else None
    masses = _Masses(layout, pl.program_id(2), row < rows - first, sums, mass)
    dense.streamed(plan, inside, q, k, (v,), None, (out,), (lse,), *running, masses=masses)


@dataclasses.dataclass(frozen=True)
class _Masses:
    """The weights of some rows, added up by key block: `sums` `[steps, rows, lanes]`."""

    layout: _Layout
    step: Any  # over the keys
    real: Any  # which rows have masses
    sums: Any
    mass: Any

    def weights(self, x, dtype, part=slice(None)):
        """`2^x`, its sums by key block, which are kept, and its sums `[rows, 1]`."""
        layout = self.layout
        p = jnp.exp2(x).astype(dtype)  # [rows, keys]
        key = self._keys(layout.lanes)
        total = jnp.zeros((x.shape[0], layout.lanes), jnp.float32)
        for start, stop in layout.runs:
            here = [p[:, i * layout.lanes : (i + 1) * layout.lanes] for i in range(start, stop)]
            here = jnp.sum(jnp.stack(here).astype(jnp.float32), axis=0)
            total += jnp.where(key + start * layout.spread < layout.length, here, 0.0)
        self.sums[self.step, part] = total
        return p, jnp.sum(total, axis=-1, keepdims=True)

    def masked(self, x):
        """Scores, very low where there is no key: a maximum must not see those."""
        return jnp.where(self._keys(x.shape[1]) < self.layout.length, x, MASKED)

    def _keys(self, count: int):
        """The numbers of the first keys of this grid step, `[1, count]`."""
        layout = self.layout
        place = jax.lax.broadcasted_iota(jnp.int32, (1, count), 1)
        inside = jax.lax.div(place, jnp.int32(layout.blocks))
        block = self.step * layout.blocks + place % layout.blocks
        return block * layout.block + inside

    def fade(self, part, by) -> None:
        """What was kept so far was relative to a lower maximum."""

        def one(step: Any, _: Any) -> Any:
            self.sums[step, part] *= by
            return 0

        jax.lax.fori_loop(0, self.layout.steps, one, 0)

    def finish(self, total) -> None:
        """Divides by the sums of whole rows, and adds up the rows of each query block."""
        over = jnp.where(self.real, 1 / total, 0.0)

        def one(step: Any, _: Any) -> Any:
            # Rows past the end hold anything.
            shares = jnp.where(self.real, self.sums[step] * over, 0.0)
            by_block = jnp.sum(shares.reshape(-1, self.layout.block, shares.shape[1]), axis=1)
            start = pl.multiple_of(step * self.layout.lanes, self.layout.lanes)
            self.mass[:, pl.ds(start, self.layout.lanes)] = by_block
            return 0

        jax.lax.fori_loop(0, self.layout.steps, one, 0)
