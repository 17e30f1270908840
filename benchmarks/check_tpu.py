"""On a real TPU: are the kernels right, how fast are they, and a report to send back.

    python -m benchmarks.check_tpu              # some minutes; writes out/check_tpu/
    python -m benchmarks.check_tpu --interpret  # anywhere: the correctness part, small, interpreted

Every kernel and every whole call, forward and gradients, is compared with float32 einsums that the
CPU runs; then calls are timed in turns with JAX's splash attention, beside the static prediction.
The report is `report.txt`, with all figures in `report.json`: please send both (an issue at the
project's page is the place), whatever they say. Nothing else has told us yet what a TPU does.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from vmonarch_jax.pallas_kernels.attend import reference as attend_reference
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.block_sparse import reference as sparse_reference
from vmonarch_jax.pallas_kernels.l_step import reference as l_reference
from vmonarch_jax.pallas_kernels.r_step import reference as r_reference
from vmonarch_jax.pallas_kernels.tiled import reference as tiled_reference
from vmonarch_jax.pallas_kernels.tpu import chips
from vmonarch_jax.pallas_kernels.tpu.mode import interpreted

import vmonarch_jax as vm
from tests.tolerances import TOLERANCES

from . import splash, timing

SCHEDULE = Path(__file__).with_name("tpu_schedule.json")
HEADS = 8


@dataclasses.dataclass(frozen=True)
class Check:
    """A kernel, the float32 function that says what it should give, and random arguments."""

    name: str
    dtype: str
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple[Any, ...]


def main(arguments: list[str] | None = None) -> int:
    """0 if all is right, 1 if something is wrong, 2 if there is no TPU."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--interpret", action="store_true", help="small, interpreted, on any device")
    flags.add_argument("--only", default="", help="checks whose name contains this")
    flags.add_argument("--rounds", type=int, default=10, help="turns that every timed call takes")
    flags.add_argument("--out", type=Path, default=Path("out/check_tpu"))
    args = flags.parse_args(arguments)
    if jax.default_backend() != "tpu" and not args.interpret:
        print(f"No TPU here (JAX sees {jax.default_backend()!r}): nothing to check.")
        return 2
    lines = [timing.place(), f"- chip: {chips.current().name}", "", "Correctness"]
    print("\n".join(lines), flush=True)
    report: dict[str, Any] = {"place": timing.place(), "chip": chips.current().name}
    with interpreted() if args.interpret else contextlib.nullcontext():
        report["checks"] = [
            said(lines, compare(check))
            for check in checks(args.interpret)
            if args.only in check.name
        ]
    if not args.interpret:
        said(lines, {"text": "\nSpeed"})
        report["speed"] = [said(lines, timed(*what, args.rounds)) for what in speeds()]
        report["memory"] = {k: int(v) for k, v in (jax.devices()[0].memory_stats() or {}).items()}
    wrong = [check for check in report["checks"] if not check["right"]]
    right = len(report["checks"]) - len(wrong)
    said(lines, {"text": f"\n{right} of {len(report['checks'])} checks are right."})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.txt").write_text("\n".join(lines) + "\n")
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Written to {args.out}/report.txt and report.json.")
    return min(len(wrong), 1)


def said(lines: list[str], result: dict[str, Any]) -> dict[str, Any]:
    """Prints and keeps a result's line."""
    print(result["text"], flush=True)
    lines.append(result["text"])
    return result


def checks(small: bool) -> Iterator[Check]:
    """Every kernel by itself and every whole call; `small` for the interpreter."""
    for dtype in ("bfloat16", "float32"):
        yield from _kernel_checks(small, dtype)
        yield from _call_checks(small, dtype)


def _kernel_checks(small: bool, dtype: str) -> Iterator[Check]:
    from vmonarch_jax.pallas_kernels.attend import tpu as attend
    from vmonarch_jax.pallas_kernels.block_sparse import tpu as block_sparse
    from vmonarch_jax.pallas_kernels.l_step import tpu as l_step
    from vmonarch_jax.pallas_kernels.r_step import tpu as r_step
    from vmonarch_jax.pallas_kernels.tiled import tpu as tiled

    own = {"block_sizes": BlockSizes()}
    d, scale = (64, 0.125) if small else (128, 128**-0.5)
    frames, b = (3, 40) if small else (3, 1560)
    group = ((1, frames, b, d),) * 3

    def two(f: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        return lambda q, k: f(q, k, (), scale=scale, **more)

    def three(f: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        return lambda q, k, v: f(q, k, (v,), scale=scale, **more)

    def pair(way: Any, name: str, *shapes: tuple[int, ...]) -> Check:
        kernel, reference = way
        return Check(name, dtype, kernel, reference, random(dtype, *shapes))

    def extreme(f: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        # A power of two, exact in bfloat16; without cL, a small difference of large numbers.
        def call(q: Any, k: Any, v: Any) -> Any:
            step = f(q * 64, k, (v,), scale=scale, **more)
            return step.al, step.ys, step.lse

        return call

    r = (r_step.r_step, r_reference.r_step)
    yield pair((two(r[0], **own), two(r[1])), "R step", *group[:2])
    yield pair((three(r[0], **own), three(r[1])), "R step with values", *group)
    yield pair((extreme(r[0], **own), extreme(r[1])), "R step, scores of hundreds", *group)
    a = (three(attend.attend, **own), three(attend_reference.attend))
    rows, keys = (40, 136) if small else (1560, 4680)
    yield pair(a, "dense rows", (2, rows, d), (2, keys, d), (2, keys, d))
    for block in (64, 128):
        # Every block of queries keeps some of the blocks of keys, the short last one among them.
        blocks = 4 if small else 40
        kept = jnp.arange(blocks)[:, None] + jnp.array([0, 3, blocks - 2])
        kept = jnp.broadcast_to(kept % blocks, (2, blocks, 3)).astype(jnp.int32)
        counts = 1 + jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32) % 3, (2, blocks))
        more = {"block": block, "length": blocks * block - 8, "scale": scale}
        shapes = ((2, blocks * block, d),) * 3
        way = (
            lambda q, k, v, s=(kept, counts), m=more: block_sparse.block_sparse(
                q, k, v, *s, **m, **own
            ),
            lambda q, k, v, s=(kept, counts), m=more: sparse_reference.block_sparse(
                q, k, v, *s, **m
            ),
        )
        yield pair(way, f"block-sparse attention, blocks of {block}", *shapes)

        def masses(function: Any, q: Any, k: Any, m: Any = more, **own: Any) -> Any:
            q, k = jax.lax.stop_gradient((q, k))
            return function(q, k, jnp.full(q.shape[:2], 9.0), **m, **own)

        way = (
            functools.partial(masses, block_sparse.block_mass, **own),
            functools.partial(masses, sparse_reference.block_mass),
        )
        yield pair(way, f"block masses, blocks of {block}", *shapes[:2])

        def both(q: Any, k: Any, v: Any, m: Any = more) -> Any:
            return block_sparse.attend_mass(q, k, v, rows=m["length"], **m, **own)

        def in_turn(q: Any, k: Any, v: Any, m: Any = more) -> Any:
            real = jnp.arange(k.shape[1]) < m["length"]
            mask = jnp.broadcast_to(real, k.shape[:2])
            (out,), lse = attend_reference.attend(q, k, (v,), scale=scale, mask=mask)
            lines = jax.lax.stop_gradient((q, k, jnp.where(real, lse, jnp.inf)))
            return out, lse, sparse_reference.block_mass(*lines, **m)

        yield pair((both, in_turn), f"dense attention and masses, blocks of {block}", *shapes)
    for m in (5, 20) if small else (21, 46, 81, 128):
        shape = (1, m, 24 if small else 364, d)
        yield pair(
            (
                lambda q, al, cl: l_step.middle(q, al * d**-0.5, cl, floor=0.1, **own),
                lambda q, al, cl: l_reference.middle(q, al * d**-0.5, cl, floor=0.1),
            ),
            f"L step, middle, {m} blocks", shape, shape, shape[:3],
        )  # fmt: skip
        yield pair(
            (
                lambda q, al, cl, y: l_step.last(q, al * d**-0.5, cl, y, **own),
                lambda q, al, cl, y: l_reference.last(q, al * d**-0.5, cl, y),
            ),
            f"L step, last, {m} blocks", shape, shape, shape[:3], shape,
        )  # fmt: skip
    tiles = (1, 2, 4, 13, d) if small else (1, 3, 30, 52, d)
    for entropy in (False, True):
        more = {"scale": scale, "entropy_gradient": entropy}
        way = (
            functools.partial(tiled.tiled, **own, **more),
            functools.partial(tiled_reference.tiled, **more),
        )
        note = ", gradient through the entropy" if entropy else ""
        yield pair(way, "fused tiled Monarch" + note, tiles, tiles, tiles)


def _call_checks(small: bool, dtype: str) -> Iterator[Check]:
    calls = {
        "VMonarch": (vm.VMonarch(), (5, 4, 6), (5, 30, 52)),
        "VMonarch, blocks of two frames": (vm.VMonarch(block=(2, 4, 6)), (4, 4, 6), None),
        "VMonarch, tubes": (vm.VMonarch(block=(5, 1, 1)), (5, 4, 6), None),
        "VMonarch, rows": (vm.VMonarch(block=(1, 1, 6)), (5, 4, 6), None),
        "tiled Monarch": (vm.TiledMonarch(), (3, 4, 6), (3, 30, 52)),
        "dense": (vm.Dense(), (3, 4, 6), (3, 30, 52)),
    }
    for name, (method, grid, large) in calls.items():
        grid = large if large and not small else grid
        tokens = math.prod(grid)
        shape = (1, tokens, 2, 64 if small else 128)

        def run(q, k, v, implementation, method=method, grid=grid):
            return tuple(method(q, k, v, grid=grid, implementation=implementation, return_lse=True))

        yield Check(
            f"call: {name}, {'x'.join(map(str, grid))}",
            dtype,
            functools.partial(run, implementation="pallas_tpu"),
            functools.partial(run, implementation="reference"),
            random(dtype, shape, shape, shape),
        )


def random(dtype: str, *shapes: tuple[int, ...]) -> tuple[Any, ...]:
    """Normal arrays, those of three axes or more in `dtype`, others (cL) in float32."""
    generator = np.random.default_rng(sum(map(math.prod, shapes)))
    made = []
    for number, shape in enumerate(shapes):
        values = generator.standard_normal(shape)
        wide = number == 2 and len(shapes) > 2 and len(shape) < len(shapes[0])
        made.append(jnp.asarray(values, jnp.float32 if wide else dtype))
    return tuple(made)


def compare(check: Check) -> dict[str, Any]:
    """Runs both, forward and backward; the worst error of each relative to the largest entry."""
    start = time.perf_counter()
    result: dict[str, Any] = {"name": check.name, "dtype": check.dtype, "right": True}
    words = []
    try:
        outs, pullback = jax.vjp(jax.jit(check.kernel), *check.arguments)
        cpu = jax.devices("cpu")[0]
        wide = [jax.device_put(x, cpu).astype(jnp.float32) for x in check.arguments]
        with jax.default_device(cpu):
            wanted, wanted_pullback = jax.vjp(jax.jit(check.reference), *wide)
            bars = [
                np.random.default_rng(number).standard_normal(x.shape)
                for number, x in enumerate(jax.tree.leaves(wanted))
            ]
            gradients = wanted_pullback(_like(wanted, bars))
        pairs = {"forward": (outs, wanted), "gradient": (pullback(_like(outs, bars)), gradients)}
        for kind, (got, want) in pairs.items():
            error, allowed = _error(got, want), TOLERANCES[check.dtype, kind]
            result[kind] = {"error": error, "allowed": allowed}
            result["right"] = bool(result["right"] and error <= allowed)
            words.append(f"{kind} {error:.1e}")
    except Exception as error:  # the other checks still tell something
        result |= {"right": False, "failed": f"{type(error).__name__}: {error}"[:2000]}
        words.append(result["failed"].splitlines()[0][:120])
    verdict = "right" if result["right"] else "WRONG"
    seconds = time.perf_counter() - start
    result["text"] = f"{verdict}  {check.name}, {check.dtype}: {', '.join(words)} ({seconds:.0f} s)"
    return result


def _like(tree: Any, leaves: list[Any]) -> Any:
    own, structure = jax.tree.flatten(tree)
    cast = [jnp.asarray(x, y.dtype) for x, y in zip(leaves, own, strict=True)]
    return jax.tree.unflatten(structure, cast)


def _error(got: Any, want: Any) -> float:
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        worst = max(worst, float(np.abs(x - y).max()) / max(1.0, float(np.abs(y).max())))
        worst = worst if np.isfinite(x).all() else math.inf
    return worst


def speeds() -> Iterator[tuple[str, Any, tuple[int, int, int], bool]]:
    """Label in the schedule's record, method, grid, and whether with gradients."""
    for method in (vm.VMonarch(), vm.TiledMonarch()):
        for grid in ((21, 30, 52), (21, 45, 80)):
            for backward in (False, True):
                passes = "forward + backward" if backward else "forward"
                yield (
                    f"{type(method).__name__} {'x'.join(map(str, grid))} {passes}",
                    method,
                    grid,
                    backward,
                )


def timed(label: str, method: Any, grid: tuple, backward: bool, rounds: int) -> dict[str, Any]:
    """Milliseconds of a method and of splash attention, heads-major, in turns."""
    chip = chips.current()
    result: dict[str, Any] = {"name": label}
    try:
        calls = {"ours": _ours(method, grid, backward), "splash": _splash(chip, grid, backward)}
        seconds = timing.alternate(calls, rounds, warm_up=2)
    except Exception as error:
        return result | {"text": f"{label}: FAILED: {type(error).__name__}: {error}"[:2000]}
    result["seconds"] = seconds
    ours, other = (statistics.median(seconds[name]) * 1e3 for name in ("ours", "splash"))
    spread = (max(seconds["ours"]) - min(seconds["ours"])) * 1e3
    ratio = timing.pair_ratio(seconds["splash"], seconds["ours"])
    known = json.loads(SCHEDULE.read_text()) if SCHEDULE.exists() else {}
    entry = known.get("calls", {}).get(chip.name, {}).get(label)
    predicted = entry["cycles"] * HEADS / chip.clock / chip.cores * 1e3 if entry else math.nan
    result["predicted"] = predicted / 1e3
    result["text"] = (
        f"{label}: {ours:.2f} ms (spread {spread:.2f}; schedule said {predicted:.2f}), "
        f"splash {other:.2f} ms: {ratio:.2f}x"
    )
    return result


def _arrays(tokens: int, count: int) -> list[Any]:
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(key, (1, HEADS, tokens, 128), jnp.bfloat16) for key in keys]


def _run(forward: Callable[..., Any], arrays: list[Any], backward: bool) -> Callable[[], Any]:
    def gradients(q, k, v, out_bar):
        return jax.vjp(forward, q, k, v)[1](out_bar)

    call = jax.jit(gradients if backward else forward)
    return lambda: call(*arrays)


def _ours(method: Any, grid: tuple, backward: bool) -> Callable[[], Any]:
    def forward(q, k, v):
        tokens = [x.swapaxes(1, 2) for x in (q, k, v)]
        return method(*tokens, grid=grid, implementation="pallas_tpu").swapaxes(1, 2)

    return _run(forward, _arrays(math.prod(grid), 4 if backward else 3), backward)


def _splash(chip: Any, grid: tuple, backward: bool) -> Callable[[], Any]:
    """At the blocks recorded for this chip, on padded arrays; the padding is not masked."""
    tokens = math.prod(grid)
    plain = splash.Blocks(1024, 1024, 512)
    best = splash.best(chip, "splash forward", tokens)
    forward = splash.Blocks(**best[0]["blocks"]) if best else plain
    best = splash.best(chip, "splash fused", tokens)
    other = splash.Blocks(**best[0]["blocks"]) if best else plain
    sizes = (forward.q, forward.kv, *((other.q, other.kv) if backward else ()))
    padded = -(-tokens // max(sizes)) * max(sizes)
    kind = "splash fused" if backward else "splash forward"
    call = jax.vmap(splash.kernel(kind, padded, forward, other if backward else None, heads=HEADS))
    return _run(call, _arrays(padded, 4 if backward else 3), backward)


if __name__ == "__main__":
    sys.exit(main())
