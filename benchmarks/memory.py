"""Temporary memory of attention in multiples of the query's bytes; compiled, not run.

    python -m benchmarks.memory                       # 21x30x52 tokens, 2 heads of 64, float32

Temporaries are what the compiled program holds at its peak beside its inputs and outputs
(`memory_analysis()`); q, k, v and the output together are 4 of these units.
"""

from collections.abc import Callable
from typing import Any

import jax

from vmonarch_jax.units import bytes_text

from . import timing
from .cases import LIBRARY, all_gradients, cases, parser, shape3, table

FORWARD_LIMIT, GRADIENT_LIMIT = 6, 16  # of VMonarch, which the tests hold it to


def main(arguments: list[str] | None = None) -> None:
    """Compiles and prints."""
    args = parser(__doc__, grid="21x30x52").parse_args(arguments)
    if args.quick:
        args.grid = shape3("5x4x6")
    like = jax.ShapeDtypeStruct((1, args.grid.tokens, args.heads, args.head_dim), args.dtype)
    size = like.size * like.dtype.itemsize
    print(f"grid {'x'.join(map(str, args.grid.shape))} = {args.grid.tokens:,} tokens, ", end="")
    print(f"{args.heads} heads of {args.head_dim}, {args.dtype}; q is {bytes_text(size)}\n")
    print(timing.place() + "\n")
    rows = []
    for case in cases(args.grid):
        forward = temporary(case.function, [like] * 3) / size
        gradients = temporary(all_gradients(case.function), [like] * 4) / size
        rows.append([case.name, f"{forward:.2f}x", f"{gradients:.2f}x"])
        if case.name == LIBRARY:
            rows[-1][0] += " (holds all scores)"
    print(table(["method", "forward", "all three gradients"], rows))
    print(f"\nVMonarch may take at most {FORWARD_LIMIT}x and {GRADIENT_LIMIT}x.")


def temporary(function: Callable[..., Any], arrays: list[jax.ShapeDtypeStruct]) -> int:
    """Peak bytes of temporaries of the compiled function."""
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
