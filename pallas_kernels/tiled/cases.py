"""Fused tiled Monarch attention at real shapes: a frame a tile, a row a block, and others."""

import jax
import jax.numpy as jnp

from ..block_sizes import BlockSizes
from ..tpu.case import Case
from . import tpu_backward, tpu_forward
from .tpu import tiled

# Name, tiles, blocks a tile, positions a block.
SHAPES = (
    ("21x30x52, tile 1x30x52, block 1x1x52", 21, 30, 52),
    ("21x45x80, tile 1x45x80, block 1x1x80", 21, 45, 80),
    ("16x28x52, tile 1x28x52, block 1x1x52", 16, 28, 52),
    ("46x28x52, tile 1x28x52, block 1x1x52", 46, 28, 52),
    ("81x28x52, tile 1x28x52, block 1x1x52", 81, 28, 52),
)

DIM = 128


def _forward(block_sizes: BlockSizes):
    def function(q: jax.Array, k: jax.Array, v: jax.Array):
        return tiled(q, k, v, scale=DIM**-0.5, block_sizes=block_sizes)

    return function


def _backward(block_sizes: BlockSizes):
    def function(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        out: jax.Array,
        lse: jax.Array,
        dout: jax.Array,
        dlse: jax.Array,
    ):
        return tpu_backward.backward(
            q, k, v, None, out, lse, dout, dlse,
            scale=DIM**-0.5, entropy_gradient=True, block_sizes=block_sizes,
        )  # fmt: skip

    return function


def _case(kernel: str, name: str, tiles: int, m: int, b: int) -> Case:
    array = jax.ShapeDtypeStruct((1, tiles, m, b, DIM), jnp.bfloat16)
    line = jax.ShapeDtypeStruct((1, tiles, m, b), jnp.float32)
    back = kernel == tpu_backward.KERNEL
    most = 128 if back else 256
    steps = {-(-tiles // keys): keys for keys in range(max(1, most // m), 0, -1)}
    return Case(
        kernel=kernel,
        shape={"a": tiles, "f": tiles, "m": m, "b": b, "d": DIM, "e": DIM},
        dtype="bfloat16",
        build=_backward if back else _forward,
        arguments=(array,) * 3 + (array, line, array, line) * back,
        # More query tiles a step share each K that the matrix unit loads, and compile slowly.
        candidates=tuple(
            {"tiles": queries, "keys": keys * m * b}
            for queries in (1, 2, 3)
            for keys in sorted(steps.values())
            if queries * keys <= 9
        ),
        name=name,
    )


CASES = tuple(
    _case(kernel, *shape)
    for kernel in (tpu_forward.KERNEL, tpu_backward.KERNEL)
    for shape in SHAPES
)
