"""The whole demo, from the weights to the table."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

import vmonarch_jax as vm

from ..attention_schedule import flops_of_steps
from ..dit import VideoDiT
from . import maps, plots, scaling
from .conditions import Conditions, from_input, from_prompts
from .files import write_csv
from .measure import attention_seconds, gaps, likeness
from .methods import Entry, load_entries
from .progress import phase
from .query_map import draw_query
from .report import Result, machine, notes_of, table, write_report
from .sampling import SHIFT, sample_from
from .videos import save_comparison, save_strip


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What the demo does.

    Attributes:
      out: folder of everything that it writes.
      dense: exported model under dense attention; the shipped one if not given.
      tuned: the same, tuned to VMonarch.
      salad: the same, tuned to SALAD.
      input: a video, a photograph or a folder of them to noise and denoise, instead of prompts.
      strength: time in (0, 1] that the input is noised to.
      steps: sampling steps; 12, or 2 in a quick run.
      guidance: weight of classifier-free guidance of the prompts.
      seed: of the noise.
      quick: a small run: fewer videos, steps and sizes.
    """

    out: pathlib.Path = pathlib.Path("out/demo")
    dense: pathlib.Path | None = None
    tuned: pathlib.Path | None = None
    salad: pathlib.Path | None = None
    input: pathlib.Path | None = None
    strength: float = 0.6
    steps: int | None = None
    guidance: float = 2.0
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"expected --steps >= 1, got {self.steps}")
        if self.seed < 0:
            raise ValueError(f"expected --seed >= 0, got {self.seed}")

    @property
    def levels(self) -> tuple[float, ...]:
        """Times at which the certificate is taken; the maps are drawn at the middle one."""
        return (0.5,) if self.quick else (0.8, 0.5, 0.2)


def run_demo(config: DemoConfig) -> list[Result]:
    """Samples, measures, draws and writes; prints the table and where everything went.

    Every file is complete once it has its name, and is written as soon as its content is known, so
    a run that is stopped leaves valid files.

    Raises:
      ValueError: an option, a model or the input is wrong; nothing has been written then.
    """
    began = time.perf_counter()
    steps = config.steps or (2 if config.quick else 12)
    loaded = load_entries(steps, config.dense, config.tuned, config.salad)
    rows = 2 if config.quick else 4
    shape = loaded[0][1].config
    if config.input is None:
        conditions = from_prompts(shape, rows, config.seed, config.guidance)
    else:
        conditions = from_input(shape, config.input, rows, config.seed, config.strength)
    config.out.mkdir(parents=True, exist_ok=True)
    device = machine()
    print(f"{len(conditions.names)} videos, {steps} steps, {device}")
    for weights, name in (("tuned", "VMonarch"), ("salad", "SALAD")):
        if not any(entry.weights == weights for entry, _ in loaded):
            print(f"no weights tuned to {name}: that method is left out")

    about = {
        "machine": device, "steps": steps, "shift": SHIFT, "guidance": conditions.guidance,
        "seed": config.seed, "start": conditions.t, "kl_levels": config.levels,
        "rows": [" ".join(n) for n in conditions.names],
    }  # fmt: skip
    notes = notes_of(conditions, steps, config.levels, shape.grid, device)
    results, videos = _sample(config, loaded, conditions, steps, about, notes)
    _certify(config, loaded, conditions, steps, results, videos, about, notes)
    if config.input is None:
        _scale(config, device)
    print("\n" + table(results))
    print(notes)
    print(f"{time.perf_counter() - began:.0f} s; all files are in {config.out}:")
    print("  " + ", ".join(sorted(p.name for p in config.out.iterdir() if p.name[0] != ".")))
    return results


def _sample(config, loaded, conditions: Conditions, steps: int, about, notes):
    """Samples under each method; the GIF, the strips and the table grow with each."""
    results: list[Result] = []
    videos: dict[str, np.ndarray] = {}
    columns: list[Any] = []
    if conditions.videos is not None:
        columns.append((("Input", f"noised to {conditions.t:g}"), "#888888", conditions.videos))
    dense = _flops(loaded[0][0], loaded[0][1], steps)
    for entry, model in loaded:
        found, seconds = sample_from(model, conditions, steps, entry.name)
        videos[entry.key] = found
        result = Result(entry.key, entry.name, _flops(entry, model, steps) / dense, seconds)
        if entry.key != "dense":
            result.psnr, result.ssim = likeness(found, videos["dense"])
        if conditions.videos is not None:
            result.input_psnr = likeness(found, conditions.videos)[0]
        results.append(result)
        columns.append((entry.title, entry.colour, found))
        save_comparison(config.out / "comparison.gif", conditions.names, columns)
        strip = [(n, "#222222", v) for n, v in zip(conditions.names, found, strict=True)]
        save_strip(config.out / f"strip_{entry.key}.png", strip)
        strip = [(title, colour, each[0]) for title, colour, each in columns]
        save_strip(config.out / "strip_comparison.png", strip)
        write_report(config.out, results, about, notes)
    return results, videos


def _flops(entry: Entry, model: VideoDiT, steps: int) -> int:
    """Of attention in one video's sampling, linear branches included."""
    shape = model.config
    heads, head_dim = shape.heads, shape.head_dim
    branch = vm.flops.linear_branch(shape.grid, heads=heads, head_dim=head_dim)
    own = sum(
        flops_of_steps(entry.method, steps, shape.depth, shape.grid, heads=heads, head_dim=head_dim)
    )
    return own + steps * len(shape.linear_layers) * branch


def _certify(config, loaded, conditions, steps, results, videos, about, notes) -> None:
    """Fills in KL and attention time, and draws the maps."""
    grid = loaded[0][1].config.grid
    middle = config.levels[len(config.levels) // 2]
    # under guidance each step runs the model on every video twice
    passes = 1 if conditions.guidance == 1 else 2
    repeats = 2 if config.quick else 5
    with phase("certificate on the real q and k", len(loaded) * len(config.levels)) as bar:
        for (entry, model), result in zip(loaded, results, strict=True):
            found = []
            for level in config.levels:
                gap, qkv = gaps(model, videos[entry.key], conditions, level)
                found.append(gap.mean((1, 2)))
                if level == middle:
                    once = attention_seconds(entry.method, qkv, grid, steps, repeats)
                    result.attention_seconds = passes * once
                    if entry.key == "vmonarch":
                        _draw_maps(config, entry, gap, qkv, grid, videos[entry.key][0])
                bar.update()
            if entry.key not in ("dense", "corrected"):
                result.kl = np.mean(found, axis=0)
                result.kl_mean, result.kl_worst = float(result.kl.mean()), float(result.kl.max())
            write_report(config.out, results, about, notes)
    drawn = [
        (entry.name, entry.colour, result.kl)
        for (entry, _), result in zip(loaded, results, strict=True)
        if result.kl is not None
    ]
    plots.draw_gaps(config.out / "kl_per_head.png", drawn)


def _draw_maps(config, entry: Entry, gap, qkv, grid, video) -> None:
    heads = []
    for title, layer, head in maps.pick_heads(gap):
        q, k = (a[layer, 0, :, head] for a in qkv[:2])
        dense, monarch = (
            maps.attention_matrix(method, q, k, grid) for method in (vm.Dense(), entry.method)
        )
        heads.append((title, dense, monarch))
    maps.draw_matrices(config.out / "attention_matrices.png", heads, grid)
    # a query off the centre: its own place in other frames is then told from the frame's middle
    centre = (grid.frames // 2, grid.height // 3, grid.width // 3)
    query = int(np.ravel_multi_index(centre, grid.shape))
    draw_query(config.out / "attention_query.png", heads, grid, video, query)


def _scale(config: DemoConfig, device: str) -> None:
    def report(rows):
        write_csv(config.out / "scaling.csv", rows)
        plots.draw_scaling(config.out / "scaling.png", rows, device.split(" (")[0])

    scaling.measure_scaling(scaling.QUICK_GRIDS if config.quick else scaling.GRIDS, report)
