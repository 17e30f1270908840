"""What each attention method costs in FLOPs and in fidelity, on the trained tiny video DiT.

    python -m benchmarks.fidelity                     # writes benchmarks/results/fidelity.*
    python -m benchmarks.fidelity --quick --out out   # seconds, for a test

Two kinds of input: q, k, v of every layer and head on held-out videos at several noise levels,
where each method is compared with dense attention; and videos sampled from one noise under each
method, where it is compared with the dense model's own.
"""

import argparse
import csv
import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import vmonarch_jax.models as models
from flax import nnx

import vmonarch_jax as vm

from . import inputs, measures, timing
from .cases import table
from .variants import Variant, floors, relative_flops, variants

LEVELS = (0.9, 0.6, 0.3)
COLUMNS = {
    "flops": "FLOPs / dense", "error": "output error", "kl": "KL mean", "worst_kl": "KL worst head",
    "loss": "loss / dense", "psnr": "PSNR", "motion": "motion / dense", "jumps": "jumps",
}  # fmt: skip
SHIPPED = Path(models.__path__[0]) / "tiny"


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes a table, a CSV and a picture."""
    args = _flags(arguments)
    began, where = time.perf_counter(), timing.place()
    study = Study(args)
    grid = study.grid
    every = 20 if args.quick else 1
    chosen = variants(grid)[::every]
    attention = study.run(chosen, "attention")
    floor_rows = study.run(floors(grid)[::every], "attention")
    pairs = zip(attention, study.run(chosen, "model"), strict=True)
    main_rows = [on_inputs | in_model for on_inputs, in_model in pairs]
    args.out.mkdir(parents=True, exist_ok=True)
    setting = (
        f"{args.videos} held-out videos at t = {', '.join(map(str, args.levels))}, "
        f"{'x'.join(map(str, grid.shape))} tokens, all layers and heads; "
        f"{args.prompts} prompts, {args.sample_steps} Euler steps, guidance {args.guidance:g}"
    )
    report = "\n".join([
        "# Fidelity of attention methods on the tiny video DiT", "",
        where,
        f"- command: `python -m benchmarks.fidelity`, {time.perf_counter() - began:.0f} s",
        f"- input: {setting}", "",
        markdown(main_rows), "", "Floors on `c_R`, 2 steps:", "",
        markdown(floor_rows, ("flops", "error", "kl", "worst_kl")), "",
    ])  # fmt: skip
    (args.out / "fidelity.md").write_text(report)
    write_csv(args.out / "fidelity.csv", main_rows + floor_rows)
    if not args.no_picture:
        from .picture import draw

        draw(main_rows, args.out / "fidelity.png")
    print("\n" + report)


class Study:
    """The shared inputs, captured once for each set of weights, and what dense makes of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.reference: dict[str, Any] = {}

    @functools.cached_property
    def grid(self) -> vm.VideoGrid:
        """Of the tokens of the model's videos."""
        return self.weights("dense")[0].config.grid

    @functools.cache  # noqa: B019 (one study a process)
    def weights(self, name: str) -> tuple[Any, Any, Any, Any]:
        """A model, its noised videos, their q, k, v, and dense attention's `(out, lse)`."""
        model = self.args.load(name)
        noised = inputs.noised_videos(model, self.args.levels, self.args.videos)
        qkv = inputs.captured(model, noised)
        exact = jax.jit(lambda q, k, v: vm.dense_attention(q, k, v, return_lse=True))
        return model, noised, qkv, exact(*qkv)

    def run(self, chosen: list[Variant], what: str) -> list[dict[str, Any]]:
        """What one of the two methods below finds, for every variant."""
        rows = []
        for number, variant in enumerate(chosen):
            began = time.perf_counter()
            rows.append(getattr(self, what)(variant))
            seconds = time.perf_counter() - began
            found = (f"{k} {x:.4g}" for k, x in rows[-1].items() if isinstance(x, float))
            label = f"{what} {number + 1}/{len(chosen)} {seconds:5.1f} s"
            print(f"{label}  {variant.group}, {variant.name}: {', '.join(found)}", flush=True)
        return rows

    def attention(self, variant: Variant) -> dict[str, Any]:
        """How far the method is from dense attention on q, k and v."""
        _, _, qkv, dense = self.weights(variant.weights)
        error, kl = measures.attention_errors(*qkv, dense, method=variant.method, grid=self.grid)
        kl = measures.by_layer(kl, len(self.args.levels), self.args.videos)
        return {
            "group": variant.group, "name": variant.name, "label": variant.label,
            "flops": relative_flops(variant.method, self.grid),
            "error": float(np.mean(error)), "kl": float(kl.mean()), "worst_kl": float(kl.max()),
        }  # fmt: skip

    def model(self, variant: Variant) -> dict[str, Any]:
        """How far the model under the method is from the first one, and how good it is itself."""
        args = self.args
        model, noised, _, _ = self.weights(variant.weights)
        loss = inputs.velocity_errors(model, noised, variant.method)
        video = inputs.samples(
            model, variant.method, args.sample_steps, args.guidance, args.prompts
        )
        known = self.reference or self.reference.update(loss=loss, video=video) or self.reference
        moved = measures.motion(video).mean() / measures.motion(known["video"]).mean()
        return {
            "loss": float(np.mean(loss / known["loss"])),
            "psnr": measures.psnr(video, known["video"]),
            "motion": float(moved), "jumps": measures.jumps(video),
        }  # fmt: skip


def markdown(rows: list[dict[str, Any]], keys: tuple[str, ...] = tuple(COLUMNS)) -> str:
    """The rows as a Markdown table."""
    digits = {"flops": 3, "error": 3, "psnr": 2, "loss": 3, "motion": 2, "jumps": 2}

    def cell(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        if value is None or math.isinf(value):
            return "-"
        return f"{value:.{digits.get(key, 4)}f}"

    header = ["", "method", *(COLUMNS[key] for key in keys)]
    cells = [[r["group"], r["name"], *(cell(r, key) for key in keys)] for r in rows]
    return table(header, cells, left=2)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """All numbers, to six digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["group", "name", *COLUMNS])
        for row in rows:
            numbers = (row.get(key) for key in COLUMNS)
            cells = ["" if x is None else f"{x:.6g}" for x in numbers]
            writer.writerow([row["group"], row["name"], *cells])


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=SHIPPED, help="folder of dense/, vmonarch/")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--videos", type=int, default=8, help="held-out videos")
    parser.add_argument("--prompts", type=int, default=4, help="sampled videos, at most 4")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a micro model: does it run at all?")
    args = parser.parse_args(arguments)
    args.levels = LEVELS
    if args.quick:
        # Random weights of a tiny size: what comes out means nothing, but everything runs.
        args.levels, args.videos, args.prompts, args.sample_steps = (0.6,), 1, 1, 1
        config = dataclasses.replace(models.CONFIGS["micro"], scan_layers=True)
        args.load = lambda name: models.VideoDiT(config, rngs=nnx.Rngs(0))
        return args
    methods = {"dense": ("dense", vm.Dense()), "tuned": ("vmonarch", vm.VMonarch())}

    def load(name: str) -> models.VideoDiT:
        folder, method = methods[name]
        # Layers run in a scan: one of them is compiled instead of all.
        return models.load_model(args.models / folder, attention=method, scan_layers=True)

    args.load = load
    return args


if __name__ == "__main__":
    main()
