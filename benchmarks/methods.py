"""All methods side by side: error against FLOPs and time, a call at a time and over whole samples.

    python -m benchmarks.methods                    # what the record lacks; an hour on two cores
    python -m benchmarks.methods --only salad       # rows whose name has this word, again
    python -m benchmarks.methods --time             # the times alone, again: on a quiet machine
    python -m benchmarks.methods --report           # table, picture and README from the record

Samples: videos of the shipped tiny DiT from one noise, under each method for all steps, against
those of dense attention with the same weights. A call: along the *dense* model's own samples each
method is run beside dense attention on the same q, k, v, step after step, with its memory. Time:
one ordinary step of one layer at a larger size. Writes `results/methods.{json,md,png}`, each row of
the record as it comes, and the table in the README.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import vmonarch_jax.models as models
from flax import nnx

import vmonarch_jax as vm

from . import inputs, measures, methods_report, timing
from .methods_list import ENTRIES, Entry
from .variants import relative_flops

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
SHIPPED = Path(models.__path__[0]) / "tiny"
# Tokens of a block of block-sparse methods: the tiny grid has 1,024 tokens, the timed one 8,190.
BLOCK, TIMED_BLOCK = 16, 64


@dataclasses.dataclass(frozen=True)
class Probe:
    """Dense attention that runs a method beside itself and tells how far off it is.

    Args:
        method: the method value.
        sink: called as `sink(step, error, kl)` with the mean over heads and batch; `kl` is 0 for
            a method that has no certificate.
    """

    method: Any
    sink: Callable[..., None]

    def init_state(self, grid: Any, **sizes: Any) -> Any:
        """The method's own, in a dict, so that one that remembers nothing has a state too."""
        batch = sizes["batch"]
        return {"probed": jnp.zeros(batch), "own": vm.init_state(self.method, grid, **sizes)}

    def __call__(
        self, query: Any, key: Any, value: Any, *, grid: Any, state: Any, step: Any
    ) -> Any:
        """Dense attention's output."""
        exact, exact_lse = vm.dense_attention(query, key, value, return_lse=True)
        found, own = vm.attend(
            self.method, query, key, value, grid=grid, state=state["own"], step=step,
            **({"return_lse": True} if certified(self.method) else {}),
        )  # fmt: skip
        out, lse = found if certified(self.method) else (found, exact_lse)
        error = measures.relative_errors(out, exact).mean()
        jax.debug.callback(self.sink, step, error, jnp.maximum(exact_lse - lse, 0).mean())
        return exact, {"probed": state["probed"], "own": own}


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing, then writes table, picture and README."""
    args = _flags(arguments)
    path = args.out / "methods.json"
    args.out.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    study = Study(args)
    chosen = [] if args.report else ENTRIES[:: args.every]
    for entry in chosen:
        if args.only.lower() not in entry.name.lower() or not study.has(entry.weights):
            continue
        if (entry.key in known.get("rows", {})) != args.time and not args.only:
            continue
        began = time.perf_counter()
        row = known["rows"][entry.key] if args.time else study.measure(entry)
        row |= {"seconds": study.seconds(entry), "flops_timed": study.flops_timed(entry)}
        print(f"{entry.name}: {time.perf_counter() - began:.0f} s, {row}", flush=True)
        known.setdefault("rows", {})[entry.key] = row
        known |= {"place": timing.place(), "setting": study.setting}
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(known, indent=1) + "\n")
        fresh.replace(path)
    methods_report.write(known, args.out, args.readme)


class Study:
    """What every row is measured on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @functools.cached_property
    def grid(self) -> vm.VideoGrid:
        """Of the tokens of the model's videos."""
        return self.model("dense").config.grid

    @property
    def setting(self) -> str:
        """What was measured, in words."""
        args, timed = self.args, self.args.timed
        return (
            f"{args.prompts} prompts, {args.steps} Euler steps, guidance {args.guidance:g}, "
            f"{'x'.join(map(str, self.grid.shape))} tokens; time: "
            f"{'x'.join(map(str, timed.shape))} = {timed.tokens:,} tokens, 2 heads of 64, float32, "
            f"median of {args.rounds} rounds"
        )

    @functools.cache  # noqa: B019 (one study a process)
    def model(self, weights: str) -> Any:
        """The tiny DiT with some of its shipped weights."""
        return self.args.load(weights)

    def has(self, weights: str) -> bool:
        """Whether those weights are there."""
        return self.args.quick or (self.args.models / weights).is_dir()

    @functools.cache  # noqa: B019
    def dense_samples(self, weights: str) -> Any:
        """The videos of dense attention."""
        return self.samples(weights, vm.Dense())

    def samples(self, weights: str, method: Any) -> Any:
        """The videos of some method."""
        args = self.args
        return inputs.samples(self.model(weights), method, args.steps, args.guidance, args.prompts)

    def measure(self, entry: Entry) -> dict[str, Any]:
        """One row of the record."""
        grid, steps = self.grid, self.args.steps
        method = entry.method(grid, BLOCK)
        config = self.model(entry.weights).config
        size = {"heads": config.heads, "head_dim": config.head_dim}
        dense = vm.flops.attention(vm.Dense(), grid, **size)
        extra = entry.branch_flops(config)
        counts = [vm.flops.attention(method, grid, step=n, **size) for n in range(steps)]
        ordinary = vm.flops.attention(method, grid, **size)
        told: dict[int, list[tuple[float, float]]] = {n: [] for n in range(steps)}

        def sink(step: Any, error: Any, kl: Any) -> None:
            told[int(step)].append((float(error), float(kl)))

        self.samples(entry.weights, Probe(method, sink))
        jax.effects_barrier()
        by_step = np.array([np.mean(told[n], axis=0) for n in range(steps)])
        plain = [n for n, count in enumerate(counts) if count == ordinary] or list(range(steps))
        video, exact = self.samples(entry.weights, method), self.dense_samples("dense")
        own = self.dense_samples(entry.weights)
        return {
            "name": entry.name, "group": entry.group, "weights": entry.weights,
            "flops": (ordinary + extra) / dense,
            "run_flops": (sum(counts) / steps + extra) / dense,
            "error": float(by_step[plain, 0].mean()), "run_error": float(by_step[:, 0].mean()),
            "kl": float(by_step[plain, 1].mean()) if certified(method) else None,
            "difference": relative_difference(video, own), "psnr": measures.psnr(video, own),
            "from_dense": relative_difference(video, exact),
        }  # fmt: skip

    def seconds(self, entry: Entry) -> list[float]:
        """Of an ordinary step of a layer and of dense attention, turn about: `[own, dense]`."""
        grid = self.args.timed
        method = entry.method(grid, TIMED_BLOCK)
        q, k, v = jax.random.normal(jax.random.key(0), (3, 1, grid.tokens, 2, 64))
        state = vm.init_state(method, grid, batch=1, heads=2, head_dim=64)

        def call(q: Any, k: Any, v: Any, state: Any, step: Any) -> Any:
            return vm.attend(method, q, k, v, grid=grid, state=state, step=step)

        ordinary = vm.flops.attention(method, grid)
        step = 0
        traced = jax.jit(call)
        while vm.flops.attention(method, grid, step=step) != ordinary:
            _, state = traced(q, k, v, state, jnp.int32(step))  # fills the memory
            step += 1
        run = jax.jit(lambda *arrays: call(*arrays, step)[0])
        dense = jax.jit(vm.dense_attention)
        calls = {"own": lambda: run(q, k, v, state), "dense": lambda: dense(q, k, v)}
        found = timing.alternate(calls, self.args.rounds)
        return [float(np.median(found[name])) for name in ("own", "dense")]

    def flops_timed(self, entry: Entry) -> float:
        """FLOPs of the timed step over those of dense attention at that size."""
        return relative_flops(entry.method(self.args.timed, TIMED_BLOCK), self.args.timed)


def certified(method: Any) -> bool:
    """Whether a method has a log-sum-exp, and so a certificate."""
    return not isinstance(method, vm.Corrected)


def relative_difference(video: Any, reference: Any) -> float:
    """`|video - reference| / |reference|`, Euclidean, mean over videos."""
    length = functools.partial(np.linalg.norm, axis=-1)
    flat = [np.asarray(x).reshape(len(x), -1) for x in (video, reference)]
    return float(np.mean(length(flat[0] - flat[1]) / length(flat[1])))


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=SHIPPED, help="folder of the weights")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="rows whose name has these words, again")
    parser.add_argument("--time", action="store_true", help="the times of recorded rows, again")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--prompts", type=int, default=4, help="sampled videos, at most 4")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--quick", action="store_true", help="a micro model: does it run at all?")
    args = parser.parse_args(arguments)
    args.every, args.timed = 1, vm.VideoGrid(21, 15, 26)
    args.readme = README if args.out == RESULTS else None
    if args.quick:
        # Random weights of a tiny size: what comes out means nothing, but everything runs.
        args.prompts, args.steps, args.rounds, args.every = 1, 12, 1, 4
        args.timed = vm.VideoGrid(4, 4, 8)
        config = models.CONFIGS["micro"]
        args.load = lambda weights: models.VideoDiT(config, rngs=nnx.Rngs(0))
        return args
    args.load = lambda weights: models.load_model(args.models / weights, attention=vm.Dense())
    return args


if __name__ == "__main__":
    main()
