"""The gradients of `attend` and of the R step at real shapes, one head of each video."""

import functools

import jax
import jax.numpy as jnp

from ..block_sizes import BlockSizes
from ..tpu.case import Case
from .tpu_backward import backward

# Name, groups, rows, keys.
ROWS = (
    ("21x30x52 first frame", 1, 1560, 32760),
    ("21x45x80 first frame", 1, 3600, 75600),
    ("46x28x52 first frame", 1, 1456, 66976),
    ("81x28x52 first frame", 1, 1456, 117936),
    ("21x30x52 dense", 1, 32760, 32760),
)
R_STEPS = (
    ("21x30x52", 21, 1560, 1560),
    ("21x45x80", 21, 3600, 3600),
    ("46x28x52, 81x28x52, 16x28x52", 81, 1456, 1456),
    ("21x30x52 by rows", 630, 52, 52),
)

DIM = 128

# Scores of a grid step: from where its overhead shows to where its body is too long.
SHORTEST, LONGEST = 1_000_000, 3_500_000


def _build(shared: bool, count: int, block_sizes: BlockSizes):
    gains = (DIM**-0.5, 1.0)[:count] if shared else (1.0,) * count

    def function(q: jax.Array, k: jax.Array, lse: jax.Array, *rest: jax.Array):
        values = rest[: count - shared]
        outs, douts = rest[len(values) :][:count], rest[len(values) + count :]
        return backward(
            q, k, values, outs, lse, douts, lse,
            scale=DIM**-0.5, gains=gains, shared=shared, block_sizes=block_sizes,
        )  # fmt: skip

    return function


def _case(name: str, groups: int, n: int, s: int, *, shared: bool, count: int = 1) -> Case:
    def array(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((groups, rows, DIM), jnp.bfloat16)

    lse = jax.ShapeDtypeStruct((groups, n), jnp.float32)
    candidates = (
        {"rows": rows, "keys": keys}
        for rows in _divisors(n, 512, 2048)
        for keys in _divisors(s, 1024, 4096)
        if SHORTEST <= rows * keys <= LONGEST
    )
    return Case(
        kernel="r_step_backward" if shared else "attend_backward",
        shape={"rows": n, "keys": s, "dim": DIM, "width": DIM * count},
        dtype="bfloat16",
        build=functools.partial(_build, shared, count),
        arguments=(
            array(n),
            array(s),
            lse,
            *[array(s)] * (count - shared),
            *[array(n)] * 2 * count,
        ),
        candidates=tuple(candidates),
        name=name + (" with values" if shared and count > 1 else ""),
    )


def _divisors(length: int, least: int, most: int) -> list[int]:
    return [x for x in range(least, most + 1, 8) if length % x == 0]


CASES = (
    *(_case(*shape, shared=False) for shape in ROWS),
    *(_case(*shape, shared=True, count=count) for shape in R_STEPS for count in (1, 2)),
)
