"""What each part of AdaSpa is worth: its paper's ablations, on the trained tiny video DiT.

    python -m benchmarks.adaspa_ablation                       # what the record lacks
    python -m benchmarks.adaspa_ablation --only "one search"   # rows with these words, again
    python -m benchmarks.adaspa_ablation --quick --out out     # a minute, for a test

Every variant is run beside dense attention on the q, k, v of all layers along the dense model's own
samples, step after step with its memory, and then samples videos itself from the same noise. Writes
`results/adaspa_ablation.{json,csv,md}`: the record, every step of it, and a table.
"""

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import vmonarch_jax.models as models
from flax import nnx
from vmonarch_jax.models.sampler import time_steps

import vmonarch_jax as vm

from . import inputs, measures, timing
from .cases import table
from .methods import SHIPPED, relative_difference

RESULTS = Path(__file__).parent / "results"
SHIFT = 6.0  # of the times, as `models.sample` has it


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name and the method value."""

    name: str
    method: vm.AdaSpa


def variants(steps: int, blocks: list[int]) -> list[Variant]:
    """The paper's method and what its ablations change, for sampling in `steps` steps.

    The paper's numbers of steps are for 50, and scale with them.
    """

    def at(*searches: int) -> tuple[int, ...]:
        return tuple(step * steps // 50 for step in searches)

    every = tuple(range(at(10)[0], steps))
    changes: dict[str, dict[str, Any]] = {
        "as in the paper": {},
        "one budget for all heads": {"head_adaptive": False},
        "budgets by head from a recall of 50%": {"recall": 0.5},
        "no cached log-sum-exp": {"lse_cache": False},
        "one search": {"search_steps": at(10)},
        "three searches": {"search_steps": at(10, 20, 30)},
        "a search on every step": {"search_steps": every},
    }
    base = vm.AdaSpa(search_steps=at(10, 30), warmup_steps=at(10)[0])
    return [
        Variant(f"{name}, blocks of {block}",
                dataclasses.replace(base, block_size=block, **change))
        for block in blocks
        for name, change in changes.items()
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing, then writes a table and a CSV."""
    args = _flags(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "adaspa_ablation.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    named = variants(args.steps, args.blocks)
    chosen = [
        variant for variant in named
        if args.only in variant.name and (args.only or variant.name not in record["rows"])
    ]  # fmt: skip
    model = args.load()
    grid, config = model.config.grid, model.config
    if chosen:
        record["place"], record["setting"] = timing.place(), (
            f"{args.prompts} prompts, {args.steps} Euler steps without guidance, "
            f"{'x'.join(map(str, grid.shape))} tokens, {config.depth} layers of {config.heads} "
            f"heads, {chosen[0].method.sparsity:.0%} sparsity"
        )  # fmt: skip
        trajectory = dense_trajectory(model, args)
        errors = along(model, trajectory, chosen, args)
        for variant, found in zip(chosen, errors, strict=True):
            record["rows"][variant.name] = row_of(model, variant, found, trajectory[-1], args)
            path.write_text(json.dumps(record) + "\n")
    rows = {v.name: record["rows"][v.name] for v in named if v.name in record["rows"]}
    warm_up = named[0].method.warmup_steps
    report = "\n".join([
        "# Ablations of AdaSpa on the tiny video DiT", "",
        record["place"],
        "- command: `python -m benchmarks.adaspa_ablation`, its last run; rows may be older",
        f"- input: {record['setting']}", "",
        "Output errors are relative to dense attention on the same q, k and v, along the dense",
        "model's samples: the mean over the steps after the warm-up, then some steps alone. The",
        "sample is what the variant makes of the same noise by itself, against dense attention's.",
        "Without the cached log-sum-exp each search step is dense, with an error of 0.", "",
        table(*_cells(rows, warm_up)), "",
    ])  # fmt: skip
    (args.out / "adaspa_ablation.md").write_text(report)
    write_csv(args.out / "adaspa_ablation.csv", rows)
    print("\n" + report)


def dense_trajectory(model: models.VideoDiT, args: argparse.Namespace) -> list[Any]:
    """The videos before each step of dense sampling, and at last the samples."""
    label, caption = inputs.conditions(model, args.prompts)
    noise = jax.random.normal(jax.random.key(2), (args.prompts, *model.config.video_shape[:3], 3))
    seen = [noise]
    models.sample(
        model, None, label, caption, steps=args.steps, guidance=1.0, shift=SHIFT,
        attention=vm.Dense(), start=(noise, 1.0), on_step=lambda _, x: seen.append(x),
    )  # fmt: skip
    return seen


def along(
    model: models.VideoDiT, trajectory: list[Any], chosen: list[Variant], args: Any
) -> list[np.ndarray]:
    """Output error and KL of each variant on each step, `[steps, 2]`, means over layers and heads.

    All layers and videos are one batch: entries of a batch do not meet.
    """
    config, grid = model.config, model.config.grid
    label, caption = inputs.conditions(model, args.prompts)
    times = time_steps(args.steps, SHIFT)

    @jax.jit
    def dense(x: Any, t: Any) -> Any:
        layers = models.capture_qkv(model, x, t, label, caption)
        qkv = tuple(jnp.concatenate(arrays) for arrays in zip(*layers, strict=True))
        return qkv, vm.dense_attention(*qkv, return_lse=True)

    def beside(method: vm.AdaSpa) -> Any:
        @jax.jit
        def call(qkv: Any, exact: Any, state: Any, step: Any) -> Any:
            (out, lse), state = vm.attend(
                method, *qkv, grid=grid, state=state, step=step, return_lse=True
            )
            error = measures.relative_errors(out, exact.out).mean()
            return jnp.stack([error, jnp.maximum(exact.lse - lse, 0).mean()]), state

        return call

    calls = [beside(variant.method) for variant in chosen]
    sizes = {"batch": args.prompts * config.depth, "heads": config.heads}
    states = [
        vm.init_state(v.method, grid, **sizes, head_dim=config.head_dim, dtype=jnp.float32)
        for v in chosen
    ]
    found = np.zeros((len(chosen), args.steps, 2))
    for step in range(args.steps):
        qkv, exact = dense(trajectory[step], jnp.full(args.prompts, times[step]))
        for number, call in enumerate(calls):
            found[number, step], states[number] = call(qkv, exact, states[number], jnp.int32(step))
        print(f"step {step}: errors {' '.join(f'{e:.3f}' for e in found[:, step, 0])}", flush=True)
    return list(found)


def row_of(
    model: models.VideoDiT, variant: Variant, found: np.ndarray, exact: Any, args: Any
) -> dict[str, Any]:
    """A row of the record: its cost, its own samples, and its errors along the way."""
    grid, config = model.config.grid, model.config
    size = {"heads": config.heads, "head_dim": config.head_dim}
    label, caption = inputs.conditions(model, args.prompts)
    noise = jax.random.normal(jax.random.key(2), (args.prompts, *config.video_shape[:3], 3))
    video = models.sample(
        model, None, label, caption, steps=args.steps, guidance=1.0, shift=SHIFT,
        attention=variant.method, start=(noise, 1.0),
    )  # fmt: skip
    video, exact = np.asarray(video), np.asarray(jnp.clip(exact, -1, 1))
    row = {
        "flops": vm.flops.sampling(variant.method, grid, args.steps, **size)
        / vm.flops.sampling(vm.Dense(), grid, args.steps, **size),
        "sample": relative_difference(video, exact),
        "psnr": measures.psnr(video, exact),
        "error": [float(f"{x:.6g}") for x in found[:, 0]],
        "kl": [float(f"{x:.6g}") for x in found[:, 1]],
    }
    print(f"{variant.name}: sample {row['sample']:.3f}, {row['psnr']:.2f} dB", flush=True)
    return row


def some_steps(steps: int) -> list[int]:
    """Steps whose errors the table shows: after, between and before the paper's searches."""
    return sorted({step * steps // 50 for step in (11, 19, 29, 30, 31, 39, 49)})


def _cells(rows: dict[str, Any], warm_up: int) -> tuple[list[str], list[list[str]]]:
    shown = some_steps(len(next(iter(rows.values()))["error"]))
    header = ["variant", "FLOPs of the run / dense", "output error", "KL"]
    header += [f"step {step}" for step in shown]
    header += ["sample, relative difference", "sample, PSNR"]
    cells = [
        [
            name,
            f"{row['flops']:.3f}",
            *(f"{np.mean(row[key][warm_up:]):.3f}" for key in ("error", "kl")),
            *(f"{row['error'][step]:.3f}" for step in shown),
            f"{row['sample']:.3f}",
            f"{row['psnr']:.2f}",
        ]
        for name, row in rows.items()
    ]
    return header, cells


def write_csv(path: Path, rows: dict[str, Any]) -> None:
    """Every step of every variant."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "step", "error", "kl"])
        for name, row in rows.items():
            for step, pair in enumerate(zip(row["error"], row["kl"], strict=True)):
                writer.writerow([name, step, *pair])


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=SHIPPED, help="folder of dense/")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="rows whose name has these words, again")
    parser.add_argument("--prompts", type=int, default=2, help="sampled videos, at most 4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 64], help="tokens of a block")
    parser.add_argument("--quick", action="store_true", help="a micro model: does it run at all?")
    args = parser.parse_args(arguments)
    if args.quick:
        # Random weights of a tiny size: what comes out means nothing, but everything runs.
        args.prompts, args.steps, args.blocks = 1, 5, [4]
        config = dataclasses.replace(models.CONFIGS["micro"], scan_layers=True)
        args.load = lambda: models.VideoDiT(config, rngs=nnx.Rngs(0))
        return args
    # Layers run in a scan: one of them is compiled instead of all.
    args.load = lambda: models.load_model(
        args.models / "dense", attention=vm.Dense(), scan_layers=True
    )
    return args


if __name__ == "__main__":
    main()
