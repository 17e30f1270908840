"""The R step at real shapes: a head of each video, without and with values."""

import jax
import jax.numpy as jnp

from ..block_sizes import BlockSizes
from ..tpu.case import Case
from .tpu import r_step

# Name, key blocks, positions, keys of a block.
SHAPES = (
    ("21x30x52", 21, 1560, 1560),
    ("21x45x80", 21, 3600, 3600),
    ("46x28x52, 81x28x52, 16x28x52", 81, 1456, 1456),
    ("20x30x52 by two frames", 10, 3120, 3120),
    ("21x30x52 by rows", 630, 52, 52),
)

DIM = 128

# Scores of a grid step beyond which a body is too long to be worth a try.
LONGEST = 5_000_000


def _build(block_sizes: BlockSizes):
    def function(qt: jax.Array, k: jax.Array, *values: jax.Array):
        return r_step(qt, k, values, scale=DIM**-0.5, block_sizes=block_sizes)

    return function


def _case(name: str, blocks: int, n: int, b: int, values: int) -> Case:
    def array(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, blocks, rows, DIM), jnp.bfloat16)

    rows = (x for x in range(256, n + 1, 8) if n % x == 0 and x * b <= LONGEST)
    return Case(
        kernel="r_step",
        shape={"rows": n, "keys": b, "dim": DIM, "width": DIM * (1 + values)},
        dtype="bfloat16",
        build=_build,
        arguments=(array(n), *[array(b)] * (1 + values)),
        candidates=tuple({"rows": x, "keys": b} for x in rows),
        name=name + (" with values" if values else ""),
    )


CASES = tuple(_case(*shape, values) for shape in SHAPES for values in (0, 1))
