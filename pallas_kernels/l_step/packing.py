"""How positions lie together in one matrix product of the L step.

For each position a tiny `m x M` attention: far too small for a matrix unit alone. Several positions
share a product, and a mask drops the scores between different ones. The arrays stay as the R step
writes them, `[g, frames, n, d]`: a strided load gathers the frames of a position, 8 at a time.

The rows of a product are ordered `(load, frame, side)`:

- *side*: positions that one load brings along. A load of 32-bit words brings a pair of bfloat16
  positions, interleaved row by row, for nothing.
- *frame*: frames in steps of 8. The last step overlaps the one before it when their number is no
  multiple of 8, so that nothing outside is ever read; frames seen twice count once.
- *load*: loads put below each other until a product is 128 rows tall.

Few frames (up to 8) need no strided load: a slab `[frames, side, d]` is `[frames * side, d]`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..tpu.mode import interpreting

# Rows or columns of a product: the lanes of a vector register.
LANES = 128
# Rows of a vector register of 32-bit words.
STEP = 8


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each position and frame goes; sizes in positions and frames.

    Args:
        rows, keys: frames of q, and of K.
        loads: loads in a product.
        side: positions interleaved in a load.
        halves: products that one load of a pair is split into: 2 where a bfloat16 pair is too
            tall for one product, else 1.
        slab: whether a load is a plain slab.
    """

    rows: int
    keys: int
    loads: int
    side: int
    halves: int = 1
    slab: bool = False

    @property
    def positions(self) -> int:
        """Positions of a product."""
        return self.loads * self.side

    @property
    def group(self) -> int:
        """Positions that are loaded together: those of a product, or of both halves."""
        return self.positions * self.halves

    def padded(self, frames: int) -> int:
        """Frames in a product, those seen twice included."""
        return frames if self.slab else pl.cdiv(frames, STEP) * STEP

    def height(self, frames: int) -> int:
        """Rows of a product."""
        return self.positions * self.padded(frames)

    def twice(self, frames: int) -> range:
        """Places, among the padded frames, of the ones that were there already."""
        whole = frames // STEP * STEP
        return range(whole, self.padded(frames) - frames + whole)


def packs(rows: int, keys: int) -> bool:
    """Whether `rows` and `keys` frames have a packing: 1 to 128 of each, at least 8 or all few."""
    return max(rows, keys) <= LANES and (max(rows, keys) <= STEP or min(rows, keys) >= STEP)


def packing(rows: int, keys: int, dtype: Any) -> Packing:
    """The packing for `rows` and `keys` frames, 1 to 128 of each, at least 8 or all few.

    Raises:
        NotImplementedError: if there is none (see `packs`).
    """
    most = max(rows, keys)
    if not packs(rows, keys):
        raise NotImplementedError(
            f"packed products take up to {LANES} frames, and {STEP} or more of both rows and keys "
            f"unless all are few, got {rows} rows and {keys} keys"
        )
    pair = 4 // jnp.dtype(dtype).itemsize
    if most <= STEP:
        return Packing(rows, keys, 1, 2 ** ((LANES // most).bit_length() - 1), slab=True)
    tall = pl.cdiv(most, STEP) * STEP
    if tall * pair > LANES:
        return Packing(rows, keys, 1, 1, halves=pair)
    # A power of two divides the blocks of 16 positions that arrays are cut into.
    loads = 2 ** ((LANES // (tall * pair)).bit_length() - 1)
    return Packing(rows, keys, loads, pair)


def load(packing: Packing, ref: Any, index: Any, frames: int) -> list[Float[Array, "rows d"]]:
    """The matrices of group `index` of `ref`, `[1, frames, positions, d]`: one, or two halves."""
    if packing.slab:
        x = ref[0, :, pl.ds(index * packing.side, packing.side), :]
        return [x.reshape(frames * packing.side, x.shape[-1])]
    words = _Words(ref)
    first = index * packing.loads
    parts = [words[start, first + i] for i in range(packing.loads) for start in _starts(frames)]
    if packing.halves == 1:
        return [_stack([words.unpacked(x) for x in parts])]
    low = [pltpu.bitcast(jax.lax.shift_left(x, 16), jnp.float32) for x in parts]
    high = [pltpu.bitcast(x & -65536, jnp.float32) for x in parts]
    return [_stack(low).astype(ref.dtype), _stack(high).astype(ref.dtype)]


def store(
    packing: Packing, ref: Any, index: Any, frames: int, values: list[Float[Array, "rows d"]]
) -> None:
    """The other way about: float32 `values` of group `index` into `ref`, rounded to its dtype."""
    if packing.slab:
        x = values[0].astype(ref.dtype).reshape(frames, packing.side, -1)
        ref[0, :, pl.ds(index * packing.side, packing.side), :] = x
        return
    words = _Words(ref)
    if packing.halves == 2:
        low, high = (_rounded(x, ref.dtype) for x in values)
        rows = jax.lax.shift_right_logical(low, 16) | high
    else:
        rows = words.packed(values[0].astype(ref.dtype))
    first = index * packing.loads
    starts = _starts(frames)
    # Backwards: a frame seen twice keeps what its first place says.
    for i in range(packing.loads):
        for step in reversed(range(len(starts))):
            at = (i * len(starts) + step) * STEP
            words[starts[step], first + i] = rows[at : at + STEP]


class _Words:
    """`[1, frames, positions, d]` as 32-bit words: a float32, or a pair of bfloat16 positions."""

    def __init__(self, ref: Any) -> None:
        self.ref = ref
        _, self.frames, self.positions, self.d = ref.shape
        self.pair = 4 // jnp.dtype(ref.dtype).itemsize

    def unpacked(self, words: Any) -> Any:
        return words if self.pair == 1 else pltpu.bitcast(words, self.ref.dtype)

    def packed(self, rows: Any) -> Any:
        return rows if self.pair == 1 else pltpu.bitcast(rows, jnp.int32)

    def _strided(self, start: int, word: Any) -> tuple[Any, Any]:
        stride = self.positions // self.pair
        flat = self._words().reshape(self.frames * stride, self.d)
        return flat, (pl.ds(start * stride + word, STEP, stride=stride), slice(None))

    def _plain(self, start: int, word: Any) -> Any:
        # The interpreter cannot store through a reshaped reference.
        return 0, pl.ds(start, STEP), pl.ds(word * self.pair, self.pair), slice(None)

    def __getitem__(self, at: tuple[int, Any]) -> Any:
        """`[8, d]`: word `at[1]` of 8 frames from `at[0]`."""
        if interpreting():
            return self.packed(self.ref[self._plain(*at)].reshape(STEP * self.pair, self.d))
        if self._row_by_row(at[1]):
            start, word = at
            return self._words()[0, pl.ds(start, STEP), word, :]
        flat, part = self._strided(*at)
        return flat[part]

    def __setitem__(self, at: tuple[int, Any], words: Any) -> None:
        if interpreting():
            self.ref[self._plain(*at)] = self.unpacked(words).reshape(STEP, self.pair, self.d)
            return
        if self._row_by_row(at[1]):
            start, word = at
            self._words()[0, pl.ds(start, STEP), word, :] = words
            return
        flat, part = self._strided(*at)
        flat[part] = words

    def _row_by_row(self, word: Any) -> bool:
        """Strided loads are for rows of 128 lanes, at places known beforehand."""
        return self.d != LANES or not isinstance(word, int)

    def _words(self) -> Any:
        return self.ref if self.pair == 1 else self.ref.bitcast(jnp.int32)


def _starts(frames: int) -> list[int]:
    """First frames of the steps of 8; the last step ends where the frames end."""
    return [min(start, frames - STEP) for start in range(0, frames, STEP)]


def _stack(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _rounded(x: Any, dtype: Any) -> Any:
    """The bits of a float32 that is exactly one of `dtype`."""
    return pltpu.bitcast(x.astype(dtype).astype(jnp.float32), jnp.int32)


def to_lines(
    packing: Packing, x: Float[Array, "g frames n"], steps: int, block: int, repeated: float
) -> Float[Array, "g steps products lanes"]:
    """A number for each frame and position, as one row of 128 lanes for each product.

    Lanes that stand for nothing, or for a frame seen twice, hold `repeated`.
    """
    g, frames, n = x.shape
    products = block // packing.positions
    padded = packing.padded(frames)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, steps * block - n)))
    if padded > frames:
        places = packing.twice(frames)
        fill = jnp.full((g, len(places), x.shape[-1]), repeated, x.dtype)
        x = jnp.concatenate([x[:, : places.start], fill, x[:, places.start :]], axis=1)
    x = x.reshape(g, padded, *_split(packing, steps, products))
    x = x.transpose(0, *_products_first(packing))
    x = x.reshape(g, steps, products, -1)
    extra = LANES - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra)), constant_values=repeated)


def from_lines(
    packing: Packing, lines: Float[Array, "g steps products lanes"], frames: int, n: int
) -> Float[Array, "g frames n"]:
    """The other way about."""
    g, steps, products, _ = lines.shape
    padded = packing.padded(frames)
    split = _split(packing, steps, products)
    order = _products_first(packing)
    x = lines[..., : packing.height(frames)]
    x = x.reshape(g, *((padded, *split)[axis - 1] for axis in order))
    x = x.transpose(0, *(1 + int(i) for i in np.argsort(order)))
    x = x.reshape(g, padded, -1)[..., :n]
    if padded > frames:
        places = packing.twice(frames)
        x = jnp.concatenate([x[:, : places.start], x[:, places.stop :]], axis=1)
    return x


def _split(packing: Packing, steps: int, products: int) -> tuple[int, ...]:
    """Positions as `(step, group, load, side, half)`; a half is what a word holds beside it."""
    return (steps, products // packing.halves, packing.loads, packing.side, packing.halves)


def _products_first(packing: Packing) -> tuple[int, ...]:
    """Axes 1 to 6 of `[g, frame, step, group, load, side, half]` in the order of the lines."""
    del packing
    return (2, 3, 6, 4, 1, 5)


def same_position(packing: Packing, rows: int, columns: int) -> Any:
    """`[rows, columns]` of a product's scores: whether both ends are of one position.

    `rows` and `columns` are numbers of frames; `None` where a product has one position.
    """
    if packing.positions == 1:
        return None

    def position(frames: int, axis: int) -> Any:
        index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        load = jax.lax.div(index, jnp.int32(packing.padded(frames) * packing.side))
        return load * packing.side + index % packing.side

    shape = packing.height(rows), packing.height(columns)
    return position(rows, 0) == position(columns, 1)


def once(packing: Packing, frames: int) -> Any:
    """`[1, 128]`: 1 for the lanes of a product that stand for a frame seen the first time."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    frame = jax.lax.div(lane, jnp.int32(packing.side)) % packing.padded(frames)
    places = packing.twice(frames)
    seen = (frame >= places.start) & (frame < places.stop)
    return jnp.where(seen | (lane >= packing.height(frames)), 0.0, 1.0)
