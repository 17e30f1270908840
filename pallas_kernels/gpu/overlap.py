"""Products that a GPU kernel reads while others run, and sums that many blocks of threads add to.

`call.py` has what waits for its own products; here the waiting is spelled out.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from . import mode
from .call import Tiles, compiler_params, launch

# A row of swizzled shared memory, 128 bytes of float32: the panel of a sum on its way to memory.
SUM_PANEL = 32


class Running:
    """A sum of products that is being made, `[n, m]` in float32."""

    def __init__(self, sum_: Any) -> None:
        """`sum_`: an accumulator; interpreted, its value."""
        self._sum = sum_

    def add(self, a: Any, b: Any, *, turn_a: bool = False, turn_b: bool = False) -> None:
        """Starts `a @ b`, either turned; `b`, and `a` where it is turned, in shared memory."""
        if mode.interpreting() is not None:
            a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
            self._sum = self._sum + lax.dot_general(
                a, b, (((0 if turn_a else 1,), (1 if turn_b else 0,)), ((), ())),
                precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
            )  # fmt: skip
            return
        a = a.transpose((1, 0)) if turn_a else a
        b = b.transpose((1, 0)) if turn_b else b
        plgpu.wgmma(self._sum, a, b)

    def read(self, in_flight: int) -> Float[Array, "n m"]:
        """The sum, once at most `in_flight` of the products started last are still running."""
        if mode.interpreting() is not None:
            return self._sum
        return plgpu.wgmma_accumulator_load(self._sum, wait_n=in_flight)


def run_products(
    start: Sequence[Float[Array, "n _"]],
    compute: Callable[[list[Running]], Sequence[Array]],
    kept: Sequence[jax.ShapeDtypeStruct] = (),
) -> tuple[list[Array], list[Array]]:
    """`(sums, results)` of `compute(sums)`, which adds to sums that begin at `start`.

    All products have ended when this returns. `kept` are the shapes of what `compute` returns.
    """
    if mode.interpreting() is not None:
        sums = [Running(x) for x in start]
        results = compute(sums)
        return [x.read(0) for x in sums], list(results)

    def body(refs: Any) -> None:
        accumulators, places = refs
        results = compute([Running(x) for x in accumulators])
        for place, x in zip(places, results, strict=True):
            place[...] = x

    ends: Any = pl.run_state(body)(
        (
            [plgpu.WGMMAAccumulatorRef.init(x) for x in start],
            [jnp.zeros(x.shape, x.dtype) for x in kept],
        )
    )
    return list(ends[0]), list(ends[1])


def launch_adding(
    body: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    threads: int,
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    flops: int,
    moved: int,
) -> Callable[..., list[Array]]:
    """`call.launch` for a body with `send_added` to the first result, which begins at zero.

    What it returns has no rule of its own for `vmap`.
    """
    if mode.interpreting() is not None:
        return launch(
            body, name=name, grid=grid, grid_names=grid_names, threads=threads,
            out_type=tuple(out_type), scratch=scratch, flops=flops, moved=moved,
        )  # fmt: skip
    mode.record(mode.Launch(name, math.prod(grid), flops, moved))
    mesh = plgpu.Mesh(
        grid=grid, grid_names=grid_names, num_threads=threads, thread_name="warpgroup",
        kernel_name=name,
    )  # fmt: skip

    def scoped(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), *scratch, collective_axes="warpgroup")

    kernel = pl.kernel(
        scoped,
        out_type=(),
        mesh=mesh,
        compiler_params=compiler_params(),
        name=name,
    )

    def run(*inputs: Array) -> list[Array]:
        # References are what a kernel can find as they are, which a result is not.
        total, *others = out_type
        start = [jnp.zeros(total.shape, total.dtype)]
        start += [lax.empty(x.shape, x.dtype) for x in others]

        def add(refs: Any) -> None:
            kernel(*inputs, *refs)

        ends: Any = pl.run_state(add)(start)
        return list(ends)

    return run


def sum_memory(lead: tuple[int, ...], rows: int, columns: int) -> Any:
    """Shared memory `[*lead, columns / 32, rows, 32]` of float32, as `call.tile_memory`."""
    shape = (*lead, columns // SUM_PANEL, rows, SUM_PANEL)
    swizzle = plgpu.SwizzleTransform(4 * SUM_PANEL)
    if mode.interpreting() is not None:
        return plgpu.SMEM(shape, jnp.float32, transforms=(swizzle,))
    return plgpu.RefUnion(
        plgpu.SMEM(shape, jnp.float32, transforms=(swizzle,)),
        plgpu.SMEM(shape, jnp.float32, transforms=(plgpu.TilingTransform((8, SUM_PANEL)), swizzle)),
    )


def store_sum(x: Float[Array, "rows m"], to: Tiles) -> None:
    """Writes a product to `sum_memory`."""
    for panel in range(to.panels):
        start = panel * SUM_PANEL
        to.tiled[panel] = lax.slice(x, (0, start), (x.shape[0], start + SUM_PANEL))


def send_added(source: Tiles, to: Any, index: tuple[Any, ...], column: Any, first: Any) -> None:
    """Starts to add float32 tiles to `to[index, column:]`; the caller commits the copies.

    The copy engine adds them up in memory, in the order in which blocks of threads come along.
    Rows beyond the end of the array are left out. Interpreted, blocks of threads come in their own
    order, and the `first` to write a place finds no zeros there.
    """
    for panel in range(source.panels):
        there = to.at[(*index, pl.ds(column + panel * SUM_PANEL, SUM_PANEL))]
        if mode.interpreting() is not None:
            there[...] = jnp.where(first, 0.0, there[...]) + source.plain[panel]
            continue
        plgpu.copy_smem_to_gmem(
            source.plain.at[panel], there, commit_group=False, reduction_op="add"
        )
