"""Tiled Monarch attention of one iteration on a Hopper GPU: some positions at a time.

Position j of query tile a meets every key block with its own row of `q[a]`, and no other position.
So query tiles are simply more positions n = (a, j) of the same key blocks (f, k):

    R step   aL[f,k,n], Y[f,k,n], cL[f,k,n]  from q[k,n], K[f,k], V[f,k]
    L step   out[l,n], lse[l,n]              from q[l,n] and the former, over all (f, k)

The L step's sums are `m e` numbers a position. A multiprocessor has room for those of eight
positions, so a kernel that did both steps would read all of K and V once for every eight: more
traffic than aL and Y are. They go through memory instead, once out and once in, a chunk of
positions at a time, so that what is alive is some multiple of the size of K. What a multiprocessor
reads and writes is next to nothing else, and that bounds the speed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..gpu.call import ROWS, round_up
from ..gpu.order import rows_first
from .gpu_l_step import l_step
from .gpu_r_step import r_step


def forward(
    q: Float[Array, "g a m b d"],
    k: Float[Array, "g f m b d"],
    v: Float[Array, "g f m b e"],
    *,
    scale: float,
    most: int,
    entries: int = 1,
) -> tuple[Float[Array, "g a m b e"], Float[Array, "g a m b"]]:
    """`(out, lse)`: out in the dtype of v, lse in float32; see the room's page.

    `most` bounds the bytes of aL and Y that are there at once (64 positions of one group at least).
    `entries` says of how many entries of a batch the groups are the heads; it changes only where
    arrays lie.
    """
    g, a, m, b, d = q.shape
    k, v = (rows_first(x.reshape(g, -1, *x.shape[3:]), entries) for x in (k, v))
    n, blocks, e = a * b, k.shape[1], v.shape[-1]
    rows = q.swapaxes(1, 2).reshape(g, m, n, d)
    heads, positions = chunk(g, n, 2 * blocks * (d + e), most)
    starts = np.array(
        [(group, first) for group in range(0, g, heads) for first in range(0, n, positions)],
        np.int32,
    )

    def some(start: Any) -> Any:
        averages, bias = r_step(start, rows, k, v, heads=heads, positions=positions, scale=scale)
        return l_step(start, rows, averages, bias)

    if len(starts) == 1:
        found = jax.tree.map(lambda x: x[None], some(jnp.asarray(starts[0])))
    else:
        found = jax.lax.map(some, jnp.asarray(starts))

    def whole(x: Array) -> Array:
        x = x.reshape(g // heads, -1, *x.shape[1:])  # [groups of heads, chunks, heads, m, n, ...]
        x = jnp.moveaxis(x, 1, 3)
        x = x.reshape(g, m, -1, *x.shape[5:])[:, :, :n]
        return x.reshape(g, m, a, b, *x.shape[3:]).swapaxes(1, 2)

    out, lse = found
    return whole(out), whole(lse)


def chunk(g: int, n: int, each: int, most: int) -> tuple[int, int]:
    """`(groups, positions)` at a time, of `each` bytes a position, at most `most` bytes.

    Whole groups where one fits, and else the fewest even parts of one. Positions are rounded up to
    the rows of a product.
    """
    tiles, fit = round_up(n, ROWS) // ROWS, max(1, most // (each * ROWS))
    if tiles <= fit:
        return divisor(g, fit // tiles), tiles * ROWS
    parts = -(-tiles // fit)
    return 1, -(-tiles // parts) * ROWS


def divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`; 1 at least."""
    return max(x for x in range(1, max(1, min(number, most)) + 1) if number % x == 0)
