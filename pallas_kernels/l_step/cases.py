"""The L steps and the attention of short tubes at real shapes, one head of each."""

import jax
import jax.numpy as jnp

from ..block_sizes import BlockSizes
from ..tpu.case import Case
from .tpu import last, middle, position_attention

# Frames and positions of the grids: 16x28x52, 21x30x52, 21x45x80, 46x28x52, 81x28x52.
GRIDS = {
    "16x28x52": (16, 1456),
    "21x30x52": (21, 1560),
    "21x45x80": (21, 3600),
    "46x28x52": (46, 1456),
    "81x28x52": (81, 1456),
}

DIM = 128

CANDIDATES = tuple({"positions": positions} for positions in (48, 80, 112, 144, 176, 208))


def _arrays(frames: int, n: int, count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((1, frames, n, DIM), jnp.bfloat16),) * count


def _line(frames: int, n: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, frames, n), jnp.float32)


def _last(block_sizes: BlockSizes):
    def function(q: jax.Array, al: jax.Array, y: jax.Array, cl: jax.Array):
        return last(q, al, cl, y, block_sizes=block_sizes)

    return function


def _middle(block_sizes: BlockSizes):
    def function(q: jax.Array, al: jax.Array, cl: jax.Array):
        return middle(q, al, cl, floor=0.1, block_sizes=block_sizes)

    return function


def _tubes(block_sizes: BlockSizes):
    def function(q: jax.Array, k: jax.Array, v: jax.Array):
        gains = (DIM**-0.5, 1.0)
        return position_attention(
            q, k, (k, v), scale=DIM**-0.5, gains=gains, block_sizes=block_sizes
        )

    return function


def _case(kernel, name, grid, build, arguments, width) -> Case:
    frames, n = GRIDS[grid]
    return Case(
        kernel=kernel,
        shape={"rows": frames, "keys": frames, "positions": n, "dim": DIM, "width": width},
        dtype="bfloat16",
        build=build,
        arguments=arguments,
        candidates=CANDIDATES,
        name=f"{grid} {name}",
    )


CASES = (
    *(
        _case("l_step_last", "last", grid, _last, (*_arrays(*size, 3), _line(*size)), DIM)
        for grid, size in GRIDS.items()
    ),
    *(
        _case("l_step_middle", "middle", grid, _middle, (*_arrays(*size, 2), _line(*size)), DIM)
        for grid, size in GRIDS.items()
    ),
    _case("l_step_last", "tubes", "21x30x52", _tubes, _arrays(*GRIDS["21x30x52"], 3), 2 * DIM),
)
