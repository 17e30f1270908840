"""How every GPU kernel is launched, and the products and loads that its body is made of.

Bodies are written once. Compiled, a product is a wgmma of a warpgroup. Interpreted, it is an
ordinary product of what the references hold: JAX's interpreter takes the copies, the barriers and
the threads, but no register layouts and no accumulators that start from a value.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..varying import kernel_results
from . import mode

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Row maxima are raised to this: far above a masked score, so that a row with every key masked
# sums to zero, and far below any real one.
LOWEST = -1e29

# The log-sum-exp of a row that is not there or attends to nothing: far above every score, which
# leaves it no weight.
NOBODY = 1e30

# Least sum that a row is divided by; a real row's largest term is 1.
TINY_SUM = 1e-30

# wgmma takes rows in multiples of this, one warpgroup's worth.
ROWS = 64

# A copy of one line must start at a multiple of 128 bytes of shared memory: 32 float32.
LINE = 32

# Columns of a panel: what one row of swizzled shared memory holds, at two bytes an entry.
PANEL = 64


def launch(
    body: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    threads: int,
    out_type: Any,
    scratch: Sequence[Any],
    flops: int,
    moved: int,
) -> Callable[..., Any]:
    """`plgpu.kernel` with this project's defaults; `threads` counts warpgroups."""
    mode.record(mode.Launch(name, math.prod(grid), flops, moved))
    interpret = mode.interpreting()

    def make(out_type: Any) -> Callable[..., Any]:
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=list(scratch),
            grid=grid,
            grid_names=grid_names,
            num_threads=threads,
            thread_name="warpgroup",
            kernel_name=name,
            compiler_params=compiler_params(),
            **({} if interpret is None else {"interpret": interpret}),
        )

    return kernel_results(make, out_type)


def compiler_params() -> plgpu.CompilerParams:
    """How every kernel is lowered."""
    # Layouts here are those of lanes; from 0.11 on JAX would find other ones by itself.
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def tile_memory(
    lead: tuple[int, ...], rows: int, columns: int, dtype: Any, panel: int = PANEL
) -> Any:
    """Shared memory `[*lead, columns / panel, rows, panel]` for matrices, in panels of columns.

    It is one piece of memory under two names (`tiles`): the copy engine sees plain swizzled
    panels, so that the length of an array may be anything, and wgmma sees the same bytes as tiles
    of 8 rows, which lie one after the other in a panel. As the right side of a product, its rows
    must be a multiple of `panel`, which is 64 or 32.
    """
    shape = (*lead, columns // panel, rows, panel)
    swizzle = plgpu.SwizzleTransform(2 * panel)
    if mode.interpreting() is not None:
        return plgpu.SMEM(shape, dtype, transforms=(swizzle,))
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(swizzle,)),
        plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, panel)), swizzle)),
    )


def square_memory(shape: tuple[int, ...], dtype: Any, panel: int = PANEL) -> Any:
    """Shared memory for matrices that `load_square` reads; their length is a multiple of 8."""
    if mode.interpreting() is not None:
        return plgpu.SMEM(shape, dtype)
    transforms = plgpu.TilingTransform((8, panel)), plgpu.SwizzleTransform(2 * panel)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Tiles(NamedTuple):
    """Panels of matrices in shared memory: as the copy engine and as wgmma name them."""

    plain: Any
    tiled: Any

    def at(self, *index: Any) -> "Tiles":
        """One matrix of several."""
        return Tiles(self.plain.at[index], self.tiled.at[index])

    def first_panels(self, count: int) -> "Tiles":
        """The first panels of a matrix."""
        index = (pl.ds(0, count),)
        return Tiles(self.plain.at[index], self.tiled.at[index])

    def rows(self, start: int, count: int) -> "Tiles":
        """Some rows of a matrix, from a multiple of 8."""
        index = (slice(None), pl.ds(start, count))
        return Tiles(self.plain.at[index], self.tiled.at[index])

    @property
    def panels(self) -> int:
        """How many panels a matrix has."""
        return self.plain.shape[0]

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.plain.shape[-1]


def tiles(memory: Any) -> Tiles:
    """What a body makes of `tile_memory`."""
    return Tiles(memory, memory) if mode.interpreting() is not None else Tiles(*memory)


def fetch(source: Any, index: tuple[Any, ...], to: Tiles, barrier: Any, column: int = 0) -> None:
    """Starts a copy of `source[index]`, `[rows, columns]`; each panel arrives at the barrier once.

    The columns copied are those from `column` on.

    Rows beyond the end of the array become zeros.
    """
    for panel in range(to.panels):
        part = source.at[(*index, pl.ds(column + panel * to.width, to.width))]
        plgpu.copy_gmem_to_smem(part, to.plain.at[panel], barrier)


def store(panels: Sequence[Float[Array, "rows _"]], to: Tiles) -> None:
    """Writes a product to shared memory, rounded to its dtype."""
    for panel, x in enumerate(panels):
        to.tiled[panel] = x.astype(to.tiled.dtype)


def send(source: Tiles, to: Any, index: tuple[Any, ...], column: int = 0) -> None:
    """Starts a copy to `to[index]`, `[rows, columns]` from `column` on, which the caller commits.

    Rows beyond the end of the array are left out.
    """
    for panel in range(source.panels):
        part = to.at[(*index, pl.ds(column + panel * source.width, source.width))]
        plgpu.copy_smem_to_gmem(source.plain.at[panel], part, commit_group=False)


def line_memory(shape: tuple[int, ...]) -> Any:
    """Shared memory for lines of float32."""
    return plgpu.SMEM(shape, jnp.float32)


def dot_transposed(
    a: Tiles, b: Tiles, then: Callable[[], None] = lambda: None
) -> Float[Array, "n m"]:
    """`a @ b.T` in float32, of two matrices in shared memory.

    `then` runs when the product has been started and before it is waited for.
    """
    return dots_transposed([(a, b)], then)[0]


def dots_transposed(
    pairs: Sequence[tuple[Tiles, Tiles]], then: Callable[[], None] = lambda: None
) -> list[Float[Array, "n m"]]:
    """`a @ b.T` of each pair, all started before the first is waited for; `then` as above."""
    if mode.interpreting() is not None:
        products = [[_plain(a.tiled[i], b.tiled[i], 1) for i in range(a.panels)] for a, b in pairs]
        then()
        return [sum(parts[1:], start=parts[0]) for parts in products]

    def compute(*accumulators: Any) -> list[Array]:
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            for i in range(a.panels):
                plgpu.wgmma(accumulator, a.tiled.at[i], b.tiled.at[i].transpose((1, 0)))
        then()
        return [accumulator[...] for accumulator in accumulators]

    shapes = [(a.plain.shape[1], b.plain.shape[1]) for a, b in pairs]
    return pl.run_scoped(
        compute, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes)
    )


def dot(a: Float[Array, "n k"], b: Tiles) -> list[Float[Array, "n _"]]:
    """`a @ b` in float32, panel by panel; `a` is in registers and has b's dtype."""
    if mode.interpreting() is not None:
        return [_plain(a, b.tiled[i], 0) for i in range(b.panels)]

    def compute(*accumulators: Any) -> list[Array]:
        for i, accumulator in enumerate(accumulators):
            plgpu.wgmma(accumulator, a, b.tiled.at[i])
        return [accumulator[...] for accumulator in accumulators]

    shape = (a.shape[0], b.width)
    return pl.run_scoped(
        compute, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for _ in range(b.panels))
    )


def add_dot(
    start: Sequence[Float[Array, "n _"]],
    a: Float[Array, "n k"],
    matrices: Sequence[Tiles],
    then: Callable[[], None] = lambda: None,
) -> list[Float[Array, "n _"]]:
    """`start + a @ [matrices side by side]` in float32, panel by panel; `then` as above.

    An empty `start` is zero.
    """
    return add_dots(start, [(a, matrices)], then)


def add_dots(
    start: Sequence[Float[Array, "n _"]],
    products: Sequence[tuple[Float[Array, "n k"], Sequence[Tiles]]],
    then: Callable[[], None] = lambda: None,
) -> list[Float[Array, "n _"]]:
    """`start` and the sum of several products, as `add_dot` makes one."""
    panels = [
        (a, [b.tiled.at[i] for b in matrices for i in range(b.panels)]) for a, matrices in products
    ]
    a, first = panels[0]
    start = start or [full((a.shape[0], b.shape[1]), 0.0) for b in first]
    if mode.interpreting() is not None:
        sums = list(start)
        for a, right in panels:
            sums = [x + _plain(a, b[...], 0) for x, b in zip(sums, right, strict=True)]
        then()
        return sums

    def compute(accumulators: Any) -> None:
        for a, right in panels:
            for accumulator, b in zip(accumulators, right, strict=True):
                plgpu.wgmma(accumulator, a, b)
        then()

    sums: Any = pl.run_state(compute)([plgpu.WGMMAAccumulatorRef.init(x) for x in start])
    return list(sums)


def _plain(a: Array, b: Array, contracted: int) -> Array:
    return lax.dot_general(
        a, b, (((1,), (contracted,)), ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip


def full(shape: tuple[int, ...], value: float) -> Array:
    """A constant matrix, or a number for each of its rows, in wgmma's layout."""
    made = jnp.full(shape, value, jnp.float32)
    if mode.interpreting() is not None:
        return made
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(made, layout)


def _load(ref: Any, layout: Any) -> Array:
    # JAX 0.10 wants an index too, 0.11 would rather not have one, 0.12 knows none.
    index = inspect.signature(plgpu.load).parameters.get("idx")
    needed = index is not None and index.default is index.empty
    return plgpu.load(ref, *([()] if needed else []), layout=layout)


def load_panel(matrix: Tiles, panel: int) -> Array:
    """A panel in registers, laid out as a product's."""
    if mode.interpreting() is not None:
        return matrix.tiled[panel]
    return _load(matrix.tiled.at[panel], plgpu.Layout.WGMMA)


def load_square(ref: Any) -> Array:
    """Lines of shared memory in registers, laid out as a product's, a line a row."""
    if mode.interpreting() is not None:
        return ref[...]
    return _load(ref, plgpu.Layout.WGMMA)


def load_per_row(ref: Any) -> Array:
    """A number for each row of a product, from a line of shared memory."""
    if mode.interpreting() is not None:
        return ref[...]
    return _load(ref, plgpu.Layout.WGMMA.reduce(1))


def load_per_column(ref: Any) -> Array:
    """A number for each column of a product, from a line of shared memory."""
    if mode.interpreting() is not None:
        return ref[...]
    return _load(ref, plgpu.Layout.WGMMA.reduce(0))


def by_row(x: Float[Array, "n"], shape: tuple[int, ...]) -> Float[Array, "n m"]:
    """A number for each row, all over the row."""
    return lax.broadcast_in_dim(x, shape, [0])


def by_column(x: Float[Array, "m"], shape: tuple[int, ...]) -> Float[Array, "n m"]:
    """A number for each column, all over the column."""
    return lax.broadcast_in_dim(x, shape, [1])


def column_numbers(shape: tuple[int, ...]) -> Array:
    """Each entry's column."""
    if mode.interpreting() is not None:
        return lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def round_up(x: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-x // multiple) * multiple
