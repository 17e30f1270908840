"""What the GPU routes would take on an H100, predicted: `python -m benchmarks.gpu_roofline`.

The whole VMonarch call is compiled for an H100. Every kernel in it is then given the longer of two
times: its matrix products at the speed that cuDNN's attention was measured at for so many keys,
and its bytes at the speed of memory. What XLA moves around the kernels is added. It is a prediction
from counts and from other people's measurements: nothing is run, and launches, waiting and a last
round of thread blocks that fills only part of the GPU cost nothing here. It needs the CUDA packages
of JAX (extra `gpu`), not a GPU.
"""

import argparse
import dataclasses
import math
import re

from . import gpu_gates, hlo
from .cases import table
from .gpu_gates import DIM, GRIDS, HEADS, PASSES
from .gpu_target import Compiled, Compiler

# Bytes a second of an H100 SXM.
BANDWIDTH = 3.35e12

# cuDNN's attention, forward and backward, in TFLOP/s by the number of keys: an H100 SXM5, head dim
# 128, no mask, 16 bits, as the charts of the paper on FlashAttention-3 (arXiv 2407.08608) have it.
# FlashAttention-3 itself, whose schedule our kernels follow, is within a tenth of it there.
FORWARD = {512: 497, 1024: 574, 2048: 617, 4096: 609, 8192: 600, 16384: 595}
BACKWARD = {512: 305, 1024: 408, 2048: 465, 4096: 499, 8192: 518, 16384: 516}

# Ratios to dense attention that are aimed at, forward, by frames of 28x52 tokens.
AIMS = {16: 3.6, 20: 4.5, 46: 10.0, 81: 18.0}
# Forward and backward, of the ratio of FLOPs; and what cuDNN's calls alone are to reach of an aim.
AIM_OF_BOTH, SHARE_OF_CUDNN = 0.75, 0.7


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that attends: its matrix FLOPs, its bytes, and the keys of a row."""

    name: str
    flops: float
    moved: float
    keys: int

    @property
    def seconds(self) -> float:
        """The longer of what its products and its bytes take."""
        rates = BACKWARD if "ackward" in self.name else FORWARD
        return max(self.flops / speed(rates, self.keys), self.moved / BANDWIDTH)


def main(arguments: list[str] | None = None) -> None:
    """Prints a table of predictions."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--frames", type=int, nargs="*", help="only these numbers of frames")
    flags.add_argument("--details", action="store_true", help="each kernel's share as well")
    args = flags.parse_args(arguments)
    compiler, rows = Compiler("h100"), []
    for grid in GRIDS:
        if args.frames and grid[0] not in args.frames:
            continue
        for passes in PASSES:
            for route in ("cudnn", "pallas_gpu"):
                kernels, moved = kernels_of(compiler, route, grid, passes)
                rows.append(row(grid, passes, route, kernels, moved))
                if args.details:
                    print(rows[-1][:3])
                    print(*(f"  {x.seconds * 1e3:7.3f} ms  {x}" for x in kernels), sep="\n")
    head = ["frames", "passes", "route", "kernels, ms", "XLA, ms", "dense, ms"]
    print(table([*head, "ratio", "aim", "FLOP ratio"], rows, left=3))


def speed(rates: dict[int, int], keys: int) -> float:
    """FLOP/s for so many keys: between two lengths on a line over their logarithm."""
    lengths = sorted(rates)
    if keys <= lengths[0] or keys >= lengths[-1]:
        return 1e12 * rates[min(max(keys, lengths[0]), lengths[-1])]
    upper = next(length for length in lengths if keys <= length)
    lower = lengths[lengths.index(upper) - 1]
    part = math.log(keys / lower) / math.log(upper / lower)
    return 1e12 * (rates[lower] + part * (rates[upper] - rates[lower]))


def kernels_of(
    compiler: Compiler, route: str, grid: tuple[int, int, int], passes: str
) -> tuple[list[Kernel], int]:
    """The kernels of a whole call, and the bytes that XLA moves around them."""
    from vmonarch_jax.pallas_kernels.gpu import mode

    with mode.recording() as launches:
        compiled = gpu_gates.compiled_call(compiler, route, grid, passes)
    # The backward pass traces L steps once more, which XLA leaves out; no two others are alike.
    launches = list(dict.fromkeys(launches))
    in_program = gpu_gates.counted(compiled)[2]
    if len(launches) != in_program:
        raise RuntimeError(f"{len(launches)} kernels were traced, {in_program} are in the program")
    keys = grid[1] * grid[2]
    ours = [
        # Of the kernels that are bound by their products only dense rows see more than a block.
        Kernel(x.name, x.flops, x.moved, math.prod(grid) if x.name.startswith("attend") else keys)
        for x in launches
    ]
    return [*ours, *cudnn_calls(compiled)], gpu_gates.around(compiled)


def cudnn_calls(compiled: Compiled) -> list[Kernel]:
    """Those of a compiled program, from the shapes of their operands `[x, n, y, d]`."""
    found = []
    for line in compiled.hlo.splitlines():
        target = re.search(r'custom_call_target="__cudnn\$(fmhaSoftmax\w*)"', line)
        shapes = re.search(r"operand_layout_constraints=\{(.*?\})\}", line)
        if not target or not shapes:
            continue
        sizes = re.findall(r"\[([\d,]+)\]", shapes[1])
        (x, n, y, d), (_, s, _, _) = ([int(i) for i in size.split(",")] for size in sizes[:2])
        products = 5 if "Backward" in target[1] else 2
        result = line.split(" custom-call(")[0].split(" = ")[1]
        moved = hlo.size(shapes[1]) + hlo.size(result)
        found.append(Kernel(target[1], 2 * products * x * y * n * s * d, moved, s))
    return found


def row(
    grid: tuple[int, int, int], passes: str, route: str, kernels: list[Kernel], moved: int
) -> list[str]:
    """A line of the table."""
    import vmonarch_jax as vm

    both = passes != PASSES[0]
    tokens = math.prod(grid)
    dense = dense_seconds(tokens, both)
    inside, around = sum(x.seconds for x in kernels), moved / BANDWIDTH
    ideal = vm.flops.attention(vm.Dense(), grid) / vm.flops.attention(vm.VMonarch(), grid)
    aim = AIM_OF_BOTH * ideal if both else AIMS[grid[0]]
    aim *= SHARE_OF_CUDNN if route == "cudnn" else 1
    milliseconds = [f"{1e3 * x:.2f}" for x in (inside, around, dense)]
    ratio = f"{dense / (inside + around):.1f}"
    return [str(grid[0]), passes, route, *milliseconds, ratio, f"{aim:.1f}", f"{ideal:.1f}"]


def dense_seconds(tokens: int, both: bool) -> float:
    """cuDNN's dense attention: 2 products forward, 5 backward."""
    product = 2 * tokens**2 * DIM * HEADS
    backward = 5 * product / speed(BACKWARD, tokens) if both else 0
    return 2 * product / speed(FORWARD, tokens) + backward


if __name__ == "__main__":
    main()
