"""Seconds of attention against dense attention, beside the ratio of the matmul FLOPs.

    python -m benchmarks.attention                    # 21x15x26 tokens, 2 heads of 64, float32
    python -m benchmarks.attention --grid 21x30x52 --rounds 3

The two gradients of a matmul are matmuls of the same size, so one FLOP ratio is the ideal of the
forward and of the backward pass.
"""

import statistics

import jax
import jax.numpy as jnp

import vmonarch_jax as vm

from . import ceilings, timing
from .cases import DENSE, LIBRARY, Case, all_gradients, cases, parser, shape3, table


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    flags = parser(__doc__, grid="21x15x26")
    flags.add_argument("--rounds", type=int, default=7, help="turns that every method takes")
    flags.add_argument(
        "--passes", choices=("forward", "both"), default="both", help="both: also the backward pass"
    )
    args = flags.parse_args(arguments)
    if args.quick:
        args.grid, args.rounds = shape3("5x4x6"), 2
    print(f"grid {'x'.join(map(str, args.grid.shape))} = {args.grid.tokens:,} tokens, ", end="")
    print(f"{args.heads} heads of {args.head_dim}, {args.dtype}, {args.rounds} rounds\n")
    print(timing.place() + "\n")
    args.rate = ceilings.rates(args.grid.frame_tokens, args.head_dim, args.dtype)
    print(
        f"Ceilings: {args.rate['flops'] / 1e9:.0f} GFLOP/s in score products of one frame, "
        f"{args.rate['exps'] / 1e9:.2f} G exponentials/s; `predicted` is what the products and "
        "the exponentials would take at these rates.\n"
    )
    print("## Forward\n\n" + measure(args, backward=False) + "\n", flush=True)
    if args.passes == "both":
        print("## Forward and backward\n\n" + measure(args, backward=True) + "\n")


def measure(args, backward: bool) -> str:
    """The table of one direction."""
    shape = (4, 1, args.grid.tokens, args.heads, args.head_dim)
    arrays = jax.random.normal(jax.random.key(0), shape, args.dtype)
    arrays = arrays if backward else arrays[:3]
    todo = cases(args.grid)
    calls = {}
    for case in todo:
        function = jax.jit(all_gradients(case.function) if backward else case.function)
        calls[case.name] = lambda function=function: function(*arrays)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(calls[case.name]())), case.name
    seconds = timing.alternate(calls, args.rounds)
    header = [
        "method", "min s", "median s", "GFLOP forward", "ideal",
        "vs jax.nn", "of ideal", "vs dense, ours", "of ideal",
    ]  # fmt: skip
    rows = [_row(case, seconds, args) for case in todo]
    if not backward:
        header.insert(3, "predicted s")
        for case, row in zip(todo, rows, strict=True):
            size = (case.method, args.grid, args.heads, args.head_dim)
            row.insert(3, f"{ceilings.prediction(*size, args.rate):.4f}")
    return table(header, rows)


def _row(case: Case, seconds: dict[str, list[float]], args) -> list[str]:
    size = {"heads": args.heads, "head_dim": args.head_dim}
    flops = vm.flops.attention(case.method, args.grid, **size)
    ideal = vm.flops.attention(vm.Dense(), args.grid, **size) / flops
    own = seconds[case.name]
    row = [case.name, f"{min(own):.4f}", f"{statistics.median(own):.4f}", f"{flops / 1e9:.3f}"]
    row.append(f"{ideal:.2f}x")
    for baseline in (LIBRARY, DENSE):
        ratio = timing.pair_ratio(seconds[baseline], own)
        row += [f"{ratio:.2f}x", f"{ratio / ideal:.2f}"]
    return row


if __name__ == "__main__":
    main()
