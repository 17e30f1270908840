"""The 1.3B transformer with random weights on a GPU: checks first, then times.

Called by `python -m benchmarks.wan_gpu --run`. Each route's velocity is compared with that of
"reference" (float32 einsums) on a short video, and may be twice as far from it as that of "xla":
both round to bfloat16 between layers. Then one block and the whole model are timed at 81 frames of
832x480, in turns with dense attention by cuDNN. Writes `results/wan_gpu_<device>.json`.
"""

import dataclasses
import functools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan import presets
from vmonarch_jax.models.wan.config import WanConfig
from vmonarch_jax.models.wan.transformer import WanTransformer

import vmonarch_jax as vm

from . import timing
from .cases import table
from .wan_gpu import ROUTES
from .wan_steps import METHODS, MODELS, SIZES

SHORT = (9, 480, 832)
CALLS = [("dense", "cudnn"), ("dense", "pallas_gpu"), *(("vmonarch", route) for route in ROUTES)]
# What a route may differ by beside twice what "xla" does: a few last bits of bfloat16.
ROOM = 2**-8


def main() -> int:
    """0 if all is right, 1 if a route is wrong or fails, 2 if there is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        print(f"No GPU here (JAX sees {jax.default_backend()!r}): nothing to check or to time.")
        return 2
    model = presets.MODELS[MODELS["1.3B"]]
    found: dict[str, Any] = {"place": timing.place(), "checks": [], "times": []}
    print(found["place"], flush=True)
    for attention in ("dense", "vmonarch"):
        run = Run(_cut(model, 2), SHORT, attention)
        found["checks"] += [check(run, route, ROUTES[route]) for route in ("pallas_gpu", "cudnn")]
    for layers in (1, model.transformer.layers):
        found["times"] += times(_cut(model, layers), SIZES["480p"])
    device = re.sub(r"\W+", "_", jax.devices()[0].device_kind).lower()
    path = Path(__file__).parent / "results" / f"wan_gpu_{device}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"Written to {path}.")
    failed = [row for row in found["checks"] + found["times"] if not row["right"]]
    return min(len(failed), 1)


class Run:
    """A model with random weights and inputs, ready to be called under any route."""

    def __init__(self, model: WanConfig, video: tuple[int, int, int], attention: str) -> None:
        """Draws weights, latents and text states in bfloat16."""
        config = dataclasses.replace(model.transformer, dtype="bfloat16")
        self.attention = attention

        def make() -> WanTransformer:
            return WanTransformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)

        self._rebuild = split_params(nnx.eval_shape(make))[0]
        params = jax.jit(lambda: split_params(make())[1])()
        shape = (1, *model.vae.latent_size(*video), config.in_channels)
        latents = jax.random.normal(jax.random.key(1), shape)
        text = jax.random.normal(jax.random.key(2), (1, config.text_length, config.text_dim))
        time = jnp.full((1,), 500.0)
        self.arguments = params, latents, time, text.astype(jnp.bfloat16)

    def under(self, implementation: Any) -> Callable[[], Any]:
        """The velocity, as a compiled call."""

        @jax.jit
        def velocity(params: Any, *inputs: Any) -> Any:
            with vm.default_implementation(implementation):
                return self._rebuild(params)(*inputs, attention=METHODS[self.attention])

        return functools.partial(velocity, *self.arguments)


def check(run: Run, name: str, implementation: Any) -> dict[str, Any]:
    """How far a route is from "reference" beside how far "xla" is; prints it."""
    row: dict[str, Any] = {"attention": run.attention, "route": name, "right": False}
    wanted = run.under("reference")()

    def error(implementation: Any) -> float:
        got = run.under(implementation)()
        return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))

    try:
        row |= {"bar": 2 * error("xla") + ROOM, "error": error(implementation)}
        row["right"] = row["error"] <= row["bar"]
    except Exception as problem:
        row["failed"] = f"{type(problem).__name__}: {problem}"[:300]
    print("right" if row["right"] else "WRONG", row, flush=True)
    return row


def times(
    model: WanConfig, video: tuple[int, int, int], calls: Any = CALLS, rounds: int = 5
) -> list[dict[str, Any]]:
    """Seconds of each call in every turn; prints them beside those of the first."""
    rows: list[dict[str, Any]] = []
    ready: dict[str, Callable[[], Any]] = {}
    for attention, route in calls:
        name = f"{attention}, {route}"
        layers = model.transformer.layers
        row: dict[str, Any] = {"name": name, "layers": layers, "video": video, "right": True}
        rows.append(row)
        try:
            ready[name] = Run(model, video, attention).under(ROUTES.get(route, route))
            jax.block_until_ready(ready[name]())
        except Exception as problem:
            ready.pop(name, None)
            row |= {"right": False, "failed": f"{type(problem).__name__}: {problem}"[:300]}
            print(f"FAILED: {name}: {row['failed']}", flush=True)
    seconds = timing.alternate(ready, rounds)
    base, lines = seconds.get(rows[0]["name"]), []
    for row in rows:
        if row["name"] not in seconds:
            continue
        row["seconds"] = seconds[row["name"]]
        row["ratio"] = timing.pair_ratio(base, row["seconds"]) if base else None
        median = f"{1e3 * statistics.median(row['seconds']):.1f}"
        lines.append([row["name"], median, f"{row['ratio']:.2f}" if base else ""])
    head = [f"{model.transformer.layers} layers", "ms", f"times as fast as {rows[0]['name']}"]
    print(table(head, lines), flush=True)
    return rows


def _cut(model: WanConfig, layers: int) -> WanConfig:
    sizes = dataclasses.replace(model.transformer, layers=layers)
    return dataclasses.replace(model, transformer=sizes)


if __name__ == "__main__":
    raise SystemExit(main())
