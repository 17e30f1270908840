"""Corrected and guided attention on the trained tiny video DiT: what design choices are worth.

    python -m benchmarks.past_papers                     # writes benchmarks/results/past_papers.*
    python -m benchmarks.past_papers --quick --out out   # a minute, for a test

Three questions, each with a table and a panel of the picture:

- corrected: how far off is `method + residual` some steps after the refresh, against the method
  alone, and against reusing the dense output itself?
- guided: how much does exact attention on a few key blocks bring, and how good is each way of
  choosing them?
- samples: how far is a video sampled under a method from the dense model's own, and at what share
  of its attention FLOPs?

The first two are on q, k and v of all layers and heads along the dense model's own sampling.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import vmonarch_jax.models as models
from flax import nnx

import vmonarch_jax as vm
from vmonarch_jax.dispatch import XLA
from vmonarch_jax.guided_attention import attend_chosen
from vmonarch_jax.guided_gap import dense_gap, monarch_mass, monarch_settings
from vmonarch_jax.monarch import monarch_factors

from . import inputs, measures, timing
from .cases import table

AGES = (1, 4, 8)  # steps since the refresh
SHIPPED = Path(models.__path__[0]) / "tiny"
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes tables, a CSV and a picture."""
    args = _flags(arguments)
    began, where = time.perf_counter(), timing.place()
    study = Study(args)
    rows = []
    for part in (study.corrected, study.guided, study.samples):
        for row in part():
            rows.append({"part": part.__name__} | row)
            print(f"{time.perf_counter() - began:6.0f} s  {rows[-1]}", flush=True)
    seconds = time.perf_counter() - began
    write(args, rows, f"{where}\n- command: `python -m benchmarks.past_papers`, {seconds:.0f} s")


def write(args: argparse.Namespace, rows: list[Row], where: str) -> None:
    """The report, the CSV and the picture; `where` heads the report."""
    args.out.mkdir(parents=True, exist_ok=True)
    setting = (
        f"{args.prompts} prompts, {args.steps} Euler steps, guidance {args.guidance:g}; refreshes "
        f"at steps {', '.join(map(str, args.anchors))} for the tables of calls, all layers, heads"
    )
    report = "\n".join([
        "# Corrected and guided attention on the tiny video DiT", "",
        where, f"- input: {setting}", "", *tables(rows),
    ])  # fmt: skip
    (args.out / "past_papers.md").write_text(report)
    with (args.out / "past_papers.csv").open("w", newline="") as file:
        keys = list(dict.fromkeys(itertools.chain(*rows)))
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows
        )
    if not args.no_picture:
        from .past_papers_picture import draw

        draw(rows, args.out / "past_papers.png")
    print("\n" + report)


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Zeros: corrected, it is the dense output of the last refresh again."""

    def __call__(self, query: Any, key: Any, value: Any, *, grid: Any, **options: Any) -> Any:
        """Zeros of the shape of an attention's output."""
        return jnp.zeros_like(value)

    def matmul_flops(self, grid: Any, **sizes: Any) -> int:
        """None."""
        return 0


class Study:
    """The model, and q, k and v along its own dense sampling."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = args.load()
        grid = self.model.config.grid
        tube = (grid.frames, 1, 1)
        self.methods = {
            "frames": vm.VMonarch(),
            "frames, no exact frame": vm.VMonarch(recompute_frames=0),
            "frames, 1 iteration, no exact frame": vm.VMonarch(1, recompute_frames=0),
            "tubes": vm.VMonarch(block=tube, recompute_frames=0),
            "tubes, 1 iteration": vm.VMonarch(1, tube, recompute_frames=0),
        }

    @functools.cached_property
    def qkv(self) -> dict[int, tuple[Any, Any, Any]]:
        """q, k and v of every step that is needed, each `[layer * video, seq, heads, head_dim]`."""
        args, model = self.args, self.model
        wanted = {step + age for step in args.anchors for age in (0, *AGES)}
        label, caption = inputs.conditions(model, args.prompts)
        times = models.time_steps(args.steps, 6.0)
        videos: dict[int, Any] = {}

        def keep(step: int, x: Any) -> None:
            if step in wanted:
                videos[step] = x

        models.sample(
            model, jax.random.key(2), label, caption,
            steps=args.steps, guidance=args.guidance, on_step=keep,
        )  # fmt: skip

        @jax.jit
        def capture(x: Any, t: Any) -> Any:
            layers = models.capture_qkv(model, x, jnp.full(len(x), t), label, caption)
            return tuple(jnp.concatenate(arrays) for arrays in zip(*layers, strict=True))

        return {step: capture(x, times[step]) for step, x in videos.items()}

    def corrected(self) -> Iterator[Row]:
        """Errors of a call, by the steps since the refresh; 0: never refreshed."""
        grid, ages = self.model.config.grid, AGES
        reused = [
            float(_error(_dense(*self.qkv[step]), _dense(*self.qkv[step + age])))
            for step in self.args.anchors
            for age in ages
        ]
        reused = np.reshape(reused, (-1, len(ages))).mean(0)
        for age, error in zip(ages, reused, strict=True):
            yield {"method": "the dense output again", "age": age, "error": float(error)}
        for name, method in self.methods.items():
            for dtype in ("bfloat16", "float8") if name == "frames" else ("bfloat16",):
                label = name + (", float8 residual" if dtype == "float8" else "")
                found = [
                    _corrected_errors(
                        vm.Corrected(method, dtype=dtype), grid,
                        self.qkv[step], [self.qkv[step + age] for age in ages],
                    )
                    for step in self.args.anchors
                ]  # fmt: skip
                for age, error in zip((0, *ages), np.mean(found, axis=0), strict=True):
                    yield {"method": label, "age": age, "error": float(error)}

    def guided(self) -> Iterator[Row]:
        """Errors of a call with some exact key blocks, by the way of choosing them."""
        grid = self.model.config.grid
        dense = vm.flops.attention(vm.Dense(), grid)
        for name in ("tubes", "frames, no exact frame"):
            method, last = self.methods[name], AGES[-1]
            now = [self.qkv[step + last] for step in self.args.anchors]
            plain = np.mean([_corrected_errors(method, grid, qkv, []) for qkv in now])
            cost = vm.flops.attention(method, grid) / dense
            yield {
                "method": name, "guide": "none", "blocks": 0, "flops": cost, "error": float(plain)
            }  # fmt: skip
            scores = self._scores(method)
            many = (1, 2, 4, 8) if name == "tubes" else (1, 2, 4)
            for count in [n for n in many if n <= vm.flops.tiling_of(method, grid).sizes[1]]:
                for guide, known in scores.items():
                    found = [
                        _guided_error(method, count, grid, qkv, score)
                        for qkv, score in zip(now, known, strict=True)
                    ]
                    every = 50 if known[0] is not None else None
                    value = vm.Guided(method, count, every=every)
                    yield {
                        "method": name, "guide": guide, "blocks": count,
                        "flops": vm.flops.attention(value, grid) / dense,
                        "error": float(np.mean(found)),
                    }  # fmt: skip

    def _scores(self, method: Any) -> dict[str, list[Any]]:
        """What each guide gives the pairs of blocks at every anchor; `None`: found by the call."""
        grid, anchors, last = self.model.config.grid, self.args.anchors, AGES[-1]
        found: dict[str, list[Any]] = {"mass times curvature": [None] * len(anchors)}
        for age, guide in ((0, "true gap"), (4, "gap of 4 before"), (8, "gap of 8 before")):
            seen = [self.qkv[step + last - age] for step in anchors]
            found[guide] = [_gap(method, grid, *qkv) for qkv in seen]
        now = [self.qkv[step + last] for step in anchors]
        found["mass alone"] = [_mass(method, grid, q, k) for q, k, _ in now]
        return found

    def samples(self) -> Iterator[Row]:
        """Sampled videos against the dense model's own."""
        args, model, grid = self.args, self.model, self.model.config.grid

        def sample(method: Any) -> Any:
            return inputs.samples(model, method, args.steps, args.guidance, args.prompts)

        own, dense = sample(vm.Dense()), vm.flops.sampling(vm.Dense(), grid, args.steps)
        for name, method in self.sampled().items():
            video = sample(method)
            away = np.linalg.norm(video - own) / np.linalg.norm(own)
            detail = own - own.mean(axis=(1, 2, 3), keepdims=True)
            yield {
                "method": name, "flops": vm.flops.sampling(method, grid, args.steps) / dense,
                "error": float(away),
                "centred": float(np.linalg.norm(video - own) / np.linalg.norm(detail)),
                "psnr": measures.psnr(video, own),
            }  # fmt: skip

    def sampled(self) -> dict[str, Any]:
        """The methods of the last table."""
        found: dict[str, Any] = dict(self.methods)
        tubes, bare = self.methods["tubes"], self.methods["frames, no exact frame"]
        exact = min(4, vm.flops.tiling_of(tubes, self.model.config.grid).sizes[1])
        found |= {
            f"corrected every 10: {name}": vm.Corrected(method, every=10)
            for name, method in self.methods.items()
        }
        once = self.methods["frames, 1 iteration, no exact frame"]
        found |= {
            f"corrected every {n}: frames, 1 iteration, no exact frame": vm.Corrected(once, every=n)
            for n in (5, 25)
        }
        found |= {
            "dense output of every 4th step again": vm.Corrected(Nothing(), every=4),
            "corrected every 10, float8: frames, no exact frame": vm.Corrected(
                bare, every=10, dtype="float8"
            ),
            f"guided, {exact} exact: tubes": vm.Guided(tubes, exact),
            f"guided, {exact} exact, every 10: tubes": vm.Guided(tubes, exact, every=10),
            "guided, 1 exact, every 10: frames, no exact frame": vm.Guided(bare, 1, every=10),
            f"corrected every 10: guided, {exact} exact: tubes": vm.Corrected(
                vm.Guided(tubes, exact), every=10
            ),
        }
        return dict(list(found.items())[:: 6 if self.args.quick else 1])


@jax.jit
def _dense(q: Any, k: Any, v: Any) -> Any:
    return vm.dense_attention(q, k, v)


def _error(out: Any, exact: Any) -> Any:
    """Mean over heads of the relative error of the output, as in the fidelity study."""
    return measures.relative_errors(out, exact).mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _corrected_errors(method: Any, grid: Any, first: Any, later: Any) -> list[Any]:
    """The error without any refresh, and on each of `later` after a refresh on `first`."""
    plain = getattr(method, "method", method)
    errors = [_error(plain(*first, grid=grid), _dense(*first))]
    if not later:
        return errors
    batch, _, heads, head_dim = first[0].shape
    state = vm.init_state(method, grid, batch=batch, heads=heads, head_dim=head_dim)
    _, state = method(*first, grid=grid, state=state, step=0)
    for qkv in later:
        out, _ = method(*qkv, grid=grid, state=state, step=1)
        errors.append(_error(out, _dense(*qkv)))
    return errors


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _guided_error(method: Any, count: int, grid: Any, qkv: Any, scores: Any) -> Any:
    """The error with the `count` best exact blocks of each query block."""
    cut = vm.Guided(method, count).tiling(grid)
    indices = None if scores is None else vm.top_blocks(scores, count)[0]
    part = attend_chosen(method, count, *qkv, cut, indices)
    return _error(part.out, _dense(*qkv))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gap(method: Any, grid: Any, q: Any, k: Any, v: Any) -> Any:
    return dense_gap(method, q, k, v, vm.flops.tiling_of(method, grid))[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mass(method: Any, grid: Any, q: Any, k: Any) -> Any:
    """The weight that Monarch itself puts on each pair of blocks."""
    cut, lead = vm.flops.tiling_of(method, grid), (q.shape[0], q.shape[2])
    _, m, b = cut.sizes
    q, k = (cut.split(x.swapaxes(1, 2)).reshape(-1, m, b, x.shape[-1]) for x in (q, k))
    on = {"backend": XLA, "block_sizes": vm.BlockSizes()}
    _, r = monarch_factors(q, k, None, None, None, **monarch_settings(method, q), **on)
    f = jnp.einsum("gljd,gkjd->gljk", q, r.al) - r.cl.swapaxes(1, 2)[:, None]
    lse = jax.nn.logsumexp(f, axis=-1)
    return monarch_mass(q, r.al, r.cl, lse, block_sizes=vm.BlockSizes()).reshape(*lead, m, m)


def tables(rows: list[Row]) -> list[str]:
    """The three tables as lines of Markdown."""
    by_part = {
        part: [row for row in rows if row["part"] == part]
        for part in ("corrected", "guided", "samples")
    }
    ages = (0, *AGES)
    names = dict.fromkeys(row["method"] for row in by_part["corrected"])
    errors = {(row["method"], row["age"]): f"{row['error']:.3f}" for row in by_part["corrected"]}
    lines = ["Relative output error of a call, by the steps since the refresh:", ""]
    header = ["method", "no refresh", *(f"{age} after" for age in AGES)]
    lines.append(table(header, [[n, *(errors.get((n, a), "-") for a in ages)] for n in names]))
    lines += ["", "Guided attention: relative output error of a call, by exact key blocks:", ""]
    cells = [
        [row["method"], row["guide"], str(row["blocks"]), f"{row['flops']:.3f}",
         f"{row['error']:.3f}"]
        for row in by_part["guided"]
    ]  # fmt: skip
    lines.append(table(["method", "guide", "blocks", "FLOPs / dense", "output error"], cells))
    lines += ["", "Sampled videos against those of dense attention from the same noise:", ""]
    cells = [
        [row["method"], *(f"{row[key]:.3f}" for key in ("flops", "error", "centred")),
         f"{row['psnr']:.1f}"]
        for row in by_part["samples"]
    ]  # fmt: skip
    header = ["method", "FLOPs / dense", "relative difference", "of the mean-free video", "PSNR"]
    return [*lines, table(header, cells), ""]


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED / "dense", help="weights")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--prompts", type=int, default=3, help="sampled videos, at most 4")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a micro model: does it run at all?")
    args = parser.parse_args(arguments)
    args.anchors = (5, 20, 35)
    args.load = lambda: models.load_model(args.model, attention=vm.Dense(), scan_layers=True)
    if args.quick:
        # Random weights of a tiny size: what comes out means nothing, but everything runs.
        args.prompts, args.steps, args.anchors = 1, 11, (2,)
        config = dataclasses.replace(models.CONFIGS["micro"], scan_layers=True)
        args.load = lambda: models.VideoDiT(config, rngs=nnx.Rngs(0))
    if args.steps <= max(args.anchors) + max(AGES):
        parser.error(f"--steps must be over {max(args.anchors) + max(AGES)}, got {args.steps}")
    return args


if __name__ == "__main__":
    main()
