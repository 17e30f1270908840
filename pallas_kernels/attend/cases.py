"""`attend` at real shapes: dense rows of a head, and parts over some key frames."""

import jax
import jax.numpy as jnp

from ..block_sizes import BlockSizes
from ..tpu.case import Case
from .tpu import attend

# Name, rows, keys, whether the keys have a bias.
SHAPES = (
    ("21x30x52 first frame", 1560, 32760, False),
    ("21x45x80 first frame", 3600, 75600, False),
    ("46x28x52 first frame", 1456, 66976, False),
    ("81x28x52 first frame", 1456, 117936, False),
    ("21x30x52 dense", 32760, 32760, False),
    ("21x30x52 four key frames", 32760, 6240, False),
    ("21x30x52 with a bias", 1560, 32760, True),
)

DIM = 128

# Scores of a grid step: from where its overhead shows to where its body is too long.
SHORTEST, LONGEST = 2_500_000, 6_000_000


def _build(block_sizes: BlockSizes):
    def function(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None):
        return attend(q, k, (v,), scale=DIM**-0.5, bias=bias, block_sizes=block_sizes)

    return function


def _case(name: str, n: int, s: int, biased: bool) -> Case:
    def array(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, rows, DIM), jnp.bfloat16)

    bias = [jax.ShapeDtypeStruct((1, s), jnp.float32)] * biased
    candidates = (
        {"rows": rows, "keys": keys}
        for rows in _divisors(n, 256, 2048)
        for keys in _divisors(s, 1024, 12_288)
        if SHORTEST <= rows * keys <= LONGEST
    )
    return Case(
        kernel="attend",
        shape={"rows": n, "keys": s, "dim": DIM, "width": DIM},
        dtype="bfloat16",
        build=_build,
        arguments=(array(n), array(s), array(s), *bias),
        candidates=tuple(candidates),
        name=name,
    )


def _divisors(length: int, least: int, most: int) -> list[int]:
    return [x for x in range(least, most + 1, 8) if length % x == 0]


CASES = tuple(_case(*shape) for shape in SHAPES)
