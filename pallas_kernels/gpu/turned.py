"""Products whose left side one warpgroup turned in shared memory for another."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from . import mode
from .call import Tiles


def store_turned(x: Float[Array, "rows k"], to: Tiles) -> None:
    """Writes the transpose of a product to a panel of shared memory, `[k, rows]`."""
    x = x.astype(to.tiled.dtype)
    if mode.interpreting() is not None:
        to.tiled[0] = x.T
        return
    x = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
    to.tiled.at[0].transpose((1, 0))[...] = x


def products(*sums: Sequence[tuple[Any, Tiles]]) -> list[list[Float[Array, "n _"]]]:
    """For each of `sums` the sum of its products `a @ b`, in float32 and panel by panel.

    All are under way together. Left sides are in registers, or panels in shared memory.
    """
    counts = [terms[0][1].panels for terms in sums]
    if mode.interpreting() is not None:
        return [
            [_total(_plain(a[...], b.tiled[i]) for a, b in terms) for i in range(count)]
            for terms, count in zip(sums, counts, strict=True)
        ]

    def compute(*accumulators: Any) -> list[list[Array]]:
        groups, left = [], list(accumulators)
        for terms, count in zip(sums, counts, strict=True):
            groups.append(left[:count])
            left = left[count:]
            for a, b in terms:
                for i, accumulator in enumerate(groups[-1]):
                    plgpu.wgmma(accumulator, a, b.tiled.at[i])
        return [[accumulator[...] for accumulator in group] for group in groups]

    shapes = [
        (terms[0][0].shape[0], terms[0][1].width)
        for terms, count in zip(sums, counts, strict=True)
        for _ in range(count)
    ]
    return pl.run_scoped(compute, *(plgpu.WGMMAAccumulatorRef(x, jnp.float32) for x in shapes))


def _total(x: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, x)


def _plain(a: Array, b: Array) -> Array:
    return lax.dot(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )  # fmt: skip
