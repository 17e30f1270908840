"""The gradients of the L step at real shapes, one head of each video."""

import jax
import jax.numpy as jnp

from ..block_sizes import BlockSizes
from ..tpu.case import Case
from .tpu_backward import last_backward, middle_backward

# Name, frames, positions.
SHAPES = (
    ("16x28x52", 16, 1456),
    ("21x30x52", 21, 1560),
    ("21x45x80", 21, 3600),
    ("46x28x52", 46, 1456),
    ("81x28x52", 81, 1456),
)

DIM, FLOOR = 128, 0.1

# Scores of a grid step beyond which a body is too long to be worth a try.
LONGEST = 600_000


def _last(block_sizes: BlockSizes):
    def function(q, k, y, dout, shift, lse, dlse):
        return last_backward(
            q, k, shift, (y,), None, lse, (dout,), dlse, block_sizes=block_sizes
        )  # fmt: skip

    return function


def _middle(block_sizes: BlockSizes):
    def function(q, al, dqt, cl):
        return middle_backward(
            q, al, cl, None, dqt, floor=FLOOR, want_dcl=False, block_sizes=block_sizes
        )  # fmt: skip

    return function


def _case(kernel: str, name: str, frames: int, n: int) -> Case:
    array = jax.ShapeDtypeStruct((1, frames, n, DIM), jnp.bfloat16)
    line = jax.ShapeDtypeStruct((1, frames, n), jnp.float32)
    last = kernel == "l_step_last_backward"
    # Odd numbers of tiles of 16 positions: what strided loads are fastest with.
    positions = [p for p in range(16, 209, 32) if p * frames**2 <= LONGEST]
    return Case(
        kernel=kernel,
        shape={
            "rows": frames, "keys": frames, "positions": n, "dim": DIM, "width": DIM if last else 0,
        },
        dtype="bfloat16",
        build=_last if last else _middle,
        arguments=(*[array] * 4, *[line] * 3) if last else (*[array] * 3, line),
        candidates=tuple({"positions": p} for p in positions),
        name=name,
    )  # fmt: skip


KERNELS = ("l_step_last_backward", "l_step_middle_backward")

CASES = tuple(_case(kernel, *shape) for kernel in KERNELS for shape in SHAPES)
