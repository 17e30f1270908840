"""What must not get worse on GPUs, checked without one: `python -m benchmarks.gpu_gates`.

The whole VMonarch call, forward and with its gradients, is compiled at real sizes for a device and
an implementation. Counted are the kernels that it calls, the passes that XLA makes over arrays of
the size of q around them, and the temporary memory. Prints a line a check, and exits with 1 if one
fails. `make aot-gpu` runs it; it needs the CUDA packages of JAX (extra `gpu`), not a GPU.
"""

import argparse
import math
import sys
import time
from typing import Any

from . import hlo
from .gpu_target import DEVICES, Compiled, Compiler

GRIDS = ((16, 28, 52), (20, 28, 52), (46, 28, 52), (81, 28, 52))
HEADS, DIM = 12, 128

PASSES = ("forward", "forward + backward")

# Calls of cuDNN forward, backward, and of this library's kernels where there are any (Hopper). R
# steps: the first, then the last (cuDNN's: with values K, with values V); dense rows; two L steps.
CALLS = {
    ("cudnn", "forward"): (4, 0, 2),
    ("cudnn", "forward + backward"): (4, 4, 4),
    ("pallas_gpu", "forward"): (0, 0, 5),
    ("pallas_gpu", "forward + backward"): (0, 2, 8),
}
# The most that XLA may read and write around the kernels, and the most temporary memory, both in
# multiples of q: a tenth above what was measured.
LIMITS = {
    ("h100", "cudnn", "forward"): (5.9, 3.4),
    ("h100", "cudnn", "forward + backward"): (25.1, 9.1),
    ("h100", "pallas_gpu", "forward"): (0.5, 3.4),
    ("h100", "pallas_gpu", "forward + backward"): (24, 7),
    ("a100", "cudnn", "forward"): (45, 5.4),
    ("a100", "cudnn", "forward + backward"): (158, 20),
}


def main(arguments: list[str] | None = None) -> int:
    """0 if all checks pass."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--device", default="h100", choices=list(DEVICES))
    flags.add_argument("--implementation", default="cudnn", choices=["cudnn", "pallas_gpu"])
    flags.add_argument("--frames", type=int, nargs="*", help="only these numbers of frames")
    flags.add_argument("--batch", type=int, default=1, help="entries of the batch")
    args = flags.parse_args(arguments)
    compiler = Compiler(args.device)
    failed = 0
    for grid in GRIDS:
        if args.frames and grid[0] not in args.frames:
            continue
        for passes in PASSES:
            start = time.monotonic()
            what = (args.device, args.implementation, passes)
            try:
                figures, problems = measure(compiler, what, grid, args.batch)
            except Exception as error:
                figures, problems = "", [f"{type(error).__name__}: {str(error)[:500]}"]
            verdict = "FAILED: " + "; ".join(problems) if problems else "passed"
            name = f"{args.device} {args.implementation} {'x'.join(map(str, grid))} {passes}"
            seconds = time.monotonic() - start
            print(f"{name}: {verdict}. {figures} ({seconds:.0f} s)", flush=True)
            failed += bool(problems)
    return min(failed, 1)


def measure(
    compiler: Compiler, what: tuple[str, str, str], grid: tuple[int, int, int], batch: int = 1
) -> tuple[str, list[str]]:
    """Compiles a call; its figures in words, and what is wrong with them.

    `what` is a device, an implementation and one of `PASSES`.
    """
    compiled = compiled_call(compiler, what[1], grid, what[2], batch)
    q = 2 * batch * math.prod(grid) * HEADS * DIM  # bytes of a query
    found = {
        "calls": counted(compiled),
        "moved": around(compiled) / q,
        "temporary": compiled.memory.temp_size_in_bytes / q,
    }
    words = f"XLA moves {found['moved']:.1f} q, temporaries {found['temporary']:.1f} q"
    return words, wrong(what, **found)


def compiled_call(
    compiler: Compiler,
    implementation: str,
    grid: tuple[int, int, int],
    passes: str,
    batch: int = 1,
) -> Compiled:
    """The whole call in bfloat16, or its gradients."""
    import jax
    import jax.numpy as jnp

    import vmonarch_jax as vm

    from .cases import all_gradients

    def call(q: Any, k: Any, v: Any) -> Any:
        return vm.vmonarch_attention(q, k, v, grid=grid, implementation=implementation)

    q = jax.ShapeDtypeStruct((batch, math.prod(grid), HEADS, DIM), jnp.bfloat16)
    forward = passes == PASSES[0]
    return compiler(call if forward else all_gradients(call), *[q] * (3 if forward else 4))


def counted(compiled: Compiled) -> tuple[int, int, int]:
    """Calls of cuDNN forward, backward, and of Mosaic GPU kernels."""
    backward = len(compiled.calls("fmhaSoftmaxBackward"))
    forward = len(compiled.calls("fmhaSoftmax")) - backward
    return forward, backward, len(compiled.calls("mosaic_gpu"))


def around(compiled: Compiled) -> int:
    """Bytes that XLA's own operations read and write: all but the calls of kernels."""
    operations = hlo.operations(compiled.hlo)
    return sum(op.bytes * op.runs for op in operations if op.kind != "custom-call")


def wrong(
    what: tuple[str, str, str],
    *,
    calls: tuple[int, int, int],
    moved: float,
    temporary: float,
) -> list[str]:
    """What is not as it should be."""
    problems = []
    forward, backward, ours = CALLS[what[1:]]
    expected = (forward, backward, ours if what[0] == "h100" else 0)
    if calls != expected:
        problems.append(f"expected {expected} calls (cuDNN, its backward, ours), got {calls}")
    most_moved, most_temporary = LIMITS[what]
    if moved > most_moved:
        problems.append(f"XLA moves {moved:.1f} times q, more than {most_moved}")
    if temporary > most_temporary:
        problems.append(f"temporaries are {temporary:.1f} times q, more than {most_temporary}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
