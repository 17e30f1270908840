"""On a Hopper GPU: the gradient of attention by this library's kernel beside cuDNN's calls.

    python -m benchmarks.gpu_gradients        # about a minute; prints a table

Where both make five products, "pallas_gpu" takes cuDNN's, because the kernel has never been timed.
This says whether it should, and whether the kernel is right where cuDNN hides it from
`python -m benchmarks.gpu`. Errors are those of the two gradients' difference, relative to the
largest entry.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from vmonarch_jax.pallas_kernels.attend import cudnn, gpu_backward, gpu_forward
from vmonarch_jax.pallas_kernels.gpu import mode

from . import timing
from .cases import table


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention: frames, heads, rows and keys of a frame; its values, of which K may be one."""

    name: str
    sizes: tuple[int, int, int, int]
    values: int
    shared: bool
    dim: int = 128


CASES = (
    Case("R step, 21 x 1560, [K | V]", (21, 12, 1560, 1560), 2, True),
    Case("R step, 21 x 1560, K", (21, 12, 1560, 1560), 1, True),
    Case("R step, 46 x 1456, [K | V]", (46, 12, 1456, 1456), 2, True),
    Case("R step, 46 x 1456, K", (46, 12, 1456, 1456), 1, True),
    Case("first frame, 1560 of 32760", (1, 12, 1560, 32760), 1, False),
    Case("dense, 32760", (1, 12, 32760, 32760), 1, False),
)


ROUNDS = 7


def main() -> int:
    """0 if the two agree everywhere, 1 if not, 2 without a Hopper GPU."""
    if reason := mode.unavailable():
        print(f"Nothing to compare: {reason}.")
        return 2
    print(timing.place(), "\n")
    lines, right = [], True
    for case in CASES:
        calls, error = compare(case)
        right &= error < 4e-2  # NaN is wrong too
        seconds = timing.alternate(calls, ROUNDS)
        ms = {name: statistics.median(x) * 1e3 for name, x in seconds.items()}
        products = {"kernel": 3 + 2 * case.values, "cuDNN": 5 * case.values}
        (x, y, n, s), d = case.sizes, case.dim
        cells = [case.name, f"{error:.1e}"]
        for name, count in products.items():
            flops = 2 * count * x * y * n * s * d
            cells += [f"{ms[name]:.3f}", f"{flops / ms[name] / 1e9:.0f}"]
        ratio = timing.pair_ratio(seconds["cuDNN"], seconds["kernel"])
        lines.append([*cells, f"{ratio:.2f}x", f"{products['cuDNN'] / products['kernel']:.2f}x"])
    header = ["gradient", "difference", "kernel, ms", "TFLOP/s", "cuDNN, ms", "TFLOP/s"]
    print(table([*header, "faster", "products"], lines, left=1))
    return int(not right)


def compare(case: Case, seed: int = 0) -> tuple[dict[str, Callable[[], Any]], float]:
    """The two gradients as calls, and how far apart their results are."""
    (x, y, n, s), d = case.sizes, case.dim
    keys = jax.random.split(jax.random.key(seed), 5)

    def random(number: int, rows: int) -> jax.Array:
        return jax.random.normal(keys[number], (x, y, rows, d), jnp.bfloat16)

    q, k, v = random(0, n), random(1, s), random(2, s)
    values = (v,) if case.values > case.shared else ()
    settings: Any = {"scale": d**-0.5, "gains": (1.0,) * case.values}
    outs, lse, _ = gpu_forward.softmax_rows(
        q, k, values, **settings, shared=case.shared, entropy=False, name="rows"
    )
    outs = tuple(outs)
    douts = tuple(random(3 + i, n) for i in range(case.values))
    results = outs, lse, douts, jnp.ones_like(lse)

    def by_kernel(q: Any, k: Any, values: Any, *results: Any) -> Any:
        return gpu_backward.softmax_rows_backward(
            q, k, values, *results, **settings, shared=case.shared, name="rows_backward"
        )

    def by_cudnn(q: Any, k: Any, values: Any, *results: Any) -> Any:
        if not case.shared:
            return cudnn.backward(q, k, values, *results, **settings)
        dq, dk, (mean, *others) = cudnn.backward(q, k, (k, *values), *results, **settings)
        return dq, cudnn.added([dk, mean]), tuple(others)

    calls = {
        name: functools.partial(jax.jit(function), q, k, values, *results)
        for name, function in (("kernel", by_kernel), ("cuDNN", by_cudnn))
    }
    found = [jax.tree.leaves(call()) for call in calls.values()]
    pairs = [[np.asarray(x, np.float32) for x in pair] for pair in zip(*found, strict=True)]
    return calls, max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
