"""On a real GPU: are the GPU routes right, and how fast are they? Some minutes; writes a report.

    python -m benchmarks.gpu                    # writes benchmarks/results/gpu_<device>.json
    python -m benchmarks.gpu --small            # anywhere: the checks alone, tiny, with "xla"

Every route is compared, forward and gradients, with the einsums of "reference" in float64 on the
CPU, on fresh random inputs. Then whole calls are timed beside
`jax.nn.dot_product_attention(implementation="cudnn")`: warm, in turns, several runs a turn, from
two sets of inputs that are each larger than the L2 cache.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vmonarch_jax as vm
from tests.tolerances import TOLERANCES

from . import timing
from .cases import all_gradients, table

ROUTES = ("cudnn", "pallas_gpu")
GRIDS = ((16, 28, 52), (20, 28, 52), (46, 28, 52), (81, 28, 52))
TILED_GRID = (21, 45, 80)
SPARSE_GRID = (21, 30, 52)
# Neighbouring blocks keep much the same keys in a window, hardly so where random keys are the best.
SPARSE = (
    vm.SlidingWindow(sparsity=0.9, block_size=64),
    vm.SlidingWindow(sparsity=0.9, block_size=128),
    vm.Salad(sparse="top_k", sparsity=0.9, block_size=64),
)
HEADS, DIM = 12, 128
# A turn takes about this long, of as many runs as fit.
TURN = 0.05


@dataclasses.dataclass(frozen=True)
class Check:
    """A call to compare: a method value on a grid, and the sizes of its arrays."""

    name: str
    method: Any
    grid: tuple[int, int, int]
    dtype: str = "bfloat16"
    dim: int = DIM
    spread: float = 1.0  # of the entries of q and k


def checks(small: bool) -> Iterator[Check]:
    """Whole calls that reach every kernel of a route."""
    frame = (4, 6) if small else (28, 52)
    dim = 8 if small else DIM
    for dtype in ("bfloat16", "float16"):
        sized = functools.partial(Check, dtype=dtype, dim=dim)
        yield sized("VMonarch", vm.VMonarch(), (5, *frame))
        yield sized("dense", vm.Dense(), (3, *frame))
        yield sized("tiled Monarch", vm.TiledMonarch(entropy_gradient=True), (2, *frame))
        for method in SPARSE[:2]:
            yield sized(f"blocks of {method.block_size}, window", method, (3, *frame))
    yield Check("blocks of 64, best keys", SPARSE[2], (3, *frame), dim=dim)
    yield Check("masses of blocks", dense_with_masses, (3, *frame), dim=dim)
    yield Check("VMonarch, many frames", vm.VMonarch(steps=3), (81, 4, 6), dim=dim)
    yield Check(
        "VMonarch, gradient of the entropy",
        vm.VMonarch(entropy_gradient=True),
        (5, *frame),
        dim=dim,
    )
    yield Check(
        "VMonarch, blocks of two frames", vm.VMonarch(block=(2, *frame)), (6, *frame), dim=dim
    )
    yield Check("VMonarch, no exact frame", vm.VMonarch(recompute_frames=0), (21, 7, 9), dim=dim)
    # Blocks of 80 have half panels; few bytes make several chunks of positions.
    chunks = functools.partial(vm.TiledMonarch(), block_sizes=vm.BlockSizes(copy_bytes=2**24))
    rows = (3, 4, 6) if small else (3, 45, 80)
    yield Check("tiled Monarch, in chunks", chunks, rows, dim=dim)
    yield Check("VMonarch, large scores", vm.VMonarch(), (5, *frame), dim=dim, spread=3.0)
    if not small:
        yield Check("VMonarch, heads of 64", vm.VMonarch(), (5, *frame), dim=64)


def dense_with_masses(
    q: Any, k: Any, v: Any, *, grid: Any, implementation: str, return_lse: bool
) -> tuple[Any, Any]:
    """Sums of values weighted by the masses of their blocks, and the log-sum-exp."""
    del grid, return_lse
    block = 64
    _, lse, mass = vm.dense_attention_mass(q, k, v, block, implementation=implementation)
    length = q.shape[1]
    padded = jnp.pad(v, ((0, 0), (0, -length % block), (0, 0), (0, 0))).astype(mass.dtype)
    sums = padded.reshape(v.shape[0], -1, block, *v.shape[2:]).sum(2)
    mixed = jnp.einsum("zhpc,zche->zphe", mass, sums, precision="highest")
    return jnp.repeat(mixed, block, axis=1)[:, :length], lse


def main(arguments: list[str] | None = None) -> int:
    """0 if all is right, 1 if something is wrong, 2 if there is no NVIDIA GPU."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--small", action="store_true", help="tiny checks, on any device, no timing")
    flags.add_argument("--only", default="", help="checks whose name contains this")
    flags.add_argument("--rounds", type=int, default=7, help="turns that every timed call takes")
    flags.add_argument("--minutes", type=float, default=7.5, help="nothing is started after this")
    flags.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = flags.parse_args(arguments)
    if jax.default_backend() != "gpu" and not args.small:
        print(f"No GPU here (JAX sees {jax.default_backend()!r}): nothing to check or to time.")
        return 2
    routes = ROUTES if jax.default_backend() == "gpu" else ("xla",)
    until = time.monotonic() + 60 * args.minutes
    report: dict[str, Any] = {"place": timing.place(), "seed": int(time.time())}
    device = re.sub(r"\W+", "_", jax.devices()[0].device_kind).lower()
    path = args.out / f"gpu_{device}.json"
    unfinished = path.with_suffix(".unfinished")
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{report['place']}\n\n## Correctness, against float64\n", flush=True)
    _collect(report, "checks", _checked(args, routes, report["seed"], until), unfinished)
    if not args.small:
        print("\n## Speed\n", flush=True)
        _collect(report, "speed", _timed(routes, args.rounds, until), unfinished)
        print(speed_table(report["speed"]))
    unfinished.replace(path)
    wrong = [check for check in report["checks"] if check["verdict"] == "WRONG"]
    print(f"\n{len(report['checks'])} checks, {len(wrong)} wrong. Written to {path}.")
    return min(len(wrong), 1)


def _collect(
    report: dict[str, Any], name: str, results: Iterator[dict[str, Any]], path: Path
) -> None:
    """Adds results to the report and writes it after each: the next kernel might not return."""
    report[name] = []
    path.write_text(json.dumps(report) + "\n")
    for result in results:
        report[name].append(result)
        path.write_text(json.dumps(report, indent=1) + "\n")


# --- correctness ----------------------------------------------------------------------------------


def _checked(args: Any, routes: Any, seed: int, until: float) -> Iterator[dict[str, Any]]:
    # Half of the time at most: the other half is for the timings.
    until -= 30 * args.minutes
    for number, check in enumerate(checks(args.small)):
        if args.only not in check.name:
            continue
        if time.monotonic() > until:
            print(f"skipped for want of time: {check.name}", flush=True)
            continue
        arrays, bars = random(check, seed + number)
        wanted = oracle(check, arrays, bars)
        for route in routes:
            result = compare(check, route, arrays, bars, wanted)
            print(result["text"], flush=True)
            yield result


def random(check: Check, seed: int) -> tuple[list[Any], tuple[Any, Any]]:
    """q, k and v, rounded to their dtype, and the gradients of output and log-sum-exp."""
    generator = np.random.default_rng(seed)
    shape = (1, math.prod(check.grid), 2, check.dim)
    spreads = (check.spread, check.spread, 1.0)
    arrays = [jnp.asarray(generator.normal(size=shape) * s, check.dtype) for s in spreads]
    bars = generator.normal(size=shape), generator.normal(size=shape[:-1])
    return arrays, (jnp.asarray(bars[0], check.dtype), jnp.asarray(bars[1], jnp.float32))


def run(check: Check, implementation: str) -> Callable[..., Any]:
    """`(out, lse)` and the three gradients of a call."""

    def call(q: Any, k: Any, v: Any) -> Any:
        how = {"implementation": implementation, "return_lse": True}
        return tuple(check.method(q, k, v, grid=check.grid, **how))

    def everything(arrays: Any, bars: Any) -> Any:
        results, pullback = jax.vjp(call, *arrays)
        like = tuple(bar.astype(x.dtype) for bar, x in zip(bars, results, strict=True))
        return *results, *pullback(like)

    return everything


def oracle(check: Check, arrays: Any, bars: Any) -> list[np.ndarray]:
    """The same in float64, by the einsums of "reference", on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        wide = jax.tree.map(
            lambda x: jax.device_put(np.asarray(x, np.float64), cpu), (arrays, bars)
        )
        return [np.asarray(x) for x in jax.jit(run(check, "reference"))(*wide)]


def compare(check: Check, route: str, arrays: Any, bars: Any, wanted: Any) -> dict[str, Any]:
    """The worst errors of a route, relative to the largest entry (or to one)."""
    start = time.perf_counter()
    size = f"{'x'.join(map(str, check.grid))}, {check.dtype}, dim {check.dim}"
    result: dict[str, Any] = {"name": check.name, "size": size, "route": route, "verdict": "right"}
    words = []
    try:
        got = jax.jit(run(check, route))(arrays, bars)
        kinds = ("forward", "lse", "gradient", "gradient", "gradient")
        for kind, x, want in zip(kinds, got, wanted, strict=True):
            x = np.asarray(x, np.float64)
            error = float(np.abs(x - want).max() / max(1.0, np.abs(want).max()))
            # float16 is held to the same bounds as bfloat16.
            allowed = TOLERANCES["bfloat16", kind]
            result[kind] = max(result.get(kind, 0.0), error)
            if not error <= allowed:  # NaN is wrong too
                result["verdict"] = "WRONG"
        words = [f"{kind} {result[kind]:.1e}" for kind in dict.fromkeys(kinds)]
    except NotImplementedError as error:
        result["verdict"], words = "not served", [str(error)[:160]]
    except Exception as error:  # the other checks still tell something
        result["verdict"], words = "WRONG", [f"{type(error).__name__}: {error}"[:300]]
    seconds = time.perf_counter() - start
    what = f"{route}: {check.name}, {size}: {', '.join(words)} ({seconds:.0f} s)"
    return result | {"text": f"{result['verdict']:10} {what}"}


# --- speed ----------------------------------------------------------------------------------------


def _timed(routes: Any, rounds: int, until: float) -> Iterator[dict[str, Any]]:
    todo = [(grid, vm.VMonarch(), backward) for backward in (False, True) for grid in GRIDS]
    sparse = [(SPARSE_GRID, method, backward) for backward in (False, True) for method in SPARSE]
    todo[len(GRIDS) : len(GRIDS)] = [(TILED_GRID, vm.TiledMonarch(), False), *sparse]
    for grid, method, backward in todo:
        if time.monotonic() > until:
            print(f"skipped for want of time: {method}, {grid}, backward {backward}", flush=True)
            continue
        for row in timed(grid, method, backward, routes, rounds):
            if "failed" in row:
                print(f"FAILED: {row['name']}: {row['failed']}", flush=True)
            yield row


def library(q: Any, k: Any, v: Any) -> Any:
    """Dense attention by cuDNN, as JAX offers it."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def timed(
    grid: tuple[int, int, int],
    method: Any,
    backward: bool,
    routes: Any,
    rounds: int,
    dense: Callable[..., Any] = library,
    size: tuple[int, int] = (HEADS, DIM),
) -> list[dict[str, Any]]:
    """A row for dense attention and for each route: seconds of every turn, and what they mean."""
    heads, dim = size
    shape = (4 if backward else 3, 1, math.prod(grid), heads, dim)
    sets = [
        tuple(jax.random.normal(key, shape, jnp.bfloat16))
        for key in jax.random.split(jax.random.key(0), 2)
    ]
    functions: dict[str, Callable[..., Any]] = {"dense": dense}
    for route in routes:
        functions[route] = functools.partial(method, grid=grid, implementation=route)
    rows, calls, runs = [], {}, {}
    for name, function in functions.items():
        call = jax.jit(all_gradients(function) if backward else function)
        kind = "dense" if name == "dense" else type(method).__name__
        if kind != "dense" and hasattr(method, "block_size"):
            kind += f", blocks of {method.block_size}"
        row: dict[str, Any] = {"name": name, "grid": grid, "backward": backward, "method": kind}
        rows.append(row)
        try:
            jax.block_until_ready(call(*sets[0]))
            start = time.perf_counter()
            jax.block_until_ready(call(*sets[1]))
            runs[name] = max(1, round(TURN / (time.perf_counter() - start)))
            calls[name] = functools.partial(_several, call, sets, runs[name])
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
    seconds = timing.alternate(calls, rounds, warm_up=1)
    flops = {
        name: vm.flops.attention(
            vm.Dense() if name == "dense" else method, grid, heads=heads, head_dim=dim
        )
        for name in calls
    }
    passes = 3.5 if backward else 1  # the backward pass has five products for two
    moved = (2 * shape[0] - 1 if backward else 4) * math.prod(shape[1:]) * 2
    for row in rows:
        if row["name"] not in calls:
            continue
        name = row["name"]
        each = [x / runs[name] for x in seconds[name]]
        median = statistics.median(each)
        row |= {"seconds": each, "median": median, "spread": max(each) - min(each)}
        row |= {"flops": flops[name] * passes / median, "bytes": moved / median}
        if "dense" in calls:
            base = [x / runs["dense"] for x in seconds["dense"]]
            row["ratio"] = timing.pair_ratio(base, each)
            row["ideal"] = flops["dense"] / flops[name]
    return rows


def _several(call: Callable[..., Any], sets: list[Any], count: int) -> Any:
    """Runs queued one behind another, so that the host's own time is hidden."""
    found = None
    for number in range(count):
        found = call(*sets[number % len(sets)])
    return found


def speed_table(rows: list[dict[str, Any]]) -> str:
    """The rows that were measured, as Markdown."""
    header = ["call", "passes", "ms", "spread", "TFLOP/s", "GB/s", "ratio", "ideal", "of ideal"]
    lines = []
    for row in rows:
        if "median" not in row:
            continue
        grid = "x".join(map(str, row["grid"]))
        route = "jax.nn, cuDNN" if row["name"] == "dense" else row["name"]
        cells = [f"{row['method']} {grid}, {route}", "both" if row["backward"] else "forward"]
        cells += [f"{row['median'] * 1e3:.3f}", f"{row['spread'] * 1e3:.3f}"]
        cells += [f"{row['flops'] / 1e12:.0f}", f"{row['bytes'] / 1e9:.0f}"]
        ratio, ideal = row.get("ratio", math.nan), row.get("ideal", math.nan)
        lines.append([*cells, f"{ratio:.2f}x", f"{ideal:.2f}x", f"{ratio / ideal:.2f}"])
    return table(header, lines, left=2)


if __name__ == "__main__":
    sys.exit(main())
