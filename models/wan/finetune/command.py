"""What `vmonarch finetune --weights` takes and does."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from ... import cli_options as options
from ...flow import FlowConfig
from ...step import SCHEDULES, TrainConfig
from ..sharding import Sharding, make_mesh
from ..weights.detect import detect
from .adapters import LoRA
from .cache import ClipCache, ClipSettings
from .data import find_clips
from .tune import LORA_FILE, Tuning, check_tuning, tune

_EXPERTS = {"high": "transformer", "low": "transformer_2"}
# Where the settings of a run differ from `TrainConfig`'s own; thin adapters take larger steps.
_DEFAULTS: dict[str, Any] = {"steps": 1000, "batch_size": 1}
_LORA_DEFAULTS = _DEFAULTS | {"learning_rate": 1e-4}
_FULL_DEFAULTS = _DEFAULTS | {"learning_rate": 1e-5, "ema_decay": 0.0}
_FIRST_FRAME_SHARE = 0.2
# Flags of the small model that mean nothing here, and those of a Wan model that mean nothing there.
_NOT_HERE = ("label_dropout", "scan_layers", "remat", "workers")
_ONLY_HERE = (
    "data", "size", "fps", "cache", "full", "rank", "alpha", "projections", "expert",
    "first_frame_share", "recompute", "mesh", "no_linear_branch",
)  # fmt: skip
# Of these, what tuning the small model to SALAD takes too.
_ADAPTERS = ("full", "rank")


def add_wan_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of tuning a Wan model; the run's own (`--steps`, ...) are there already."""
    folder = pathlib.Path
    group = parser.add_argument_group(
        "a Wan model (with --weights)",
        "Defaults: 1000 steps of one video, learning rate 1e-4 (1e-5 with --full, and no moving "
        "average), shift, size, frames and frame rate of the model.",
    )
    group.add_argument("--data", type=folder, metavar="DIR", help="videos with captions beside")
    group.add_argument("--size", type=options.size2, metavar="WIDTHxHEIGHT", help="of the videos")
    group.add_argument("--fps", type=float, metavar="N", help="frames a second of the videos")
    group.add_argument(
        "--cache", type=folder, metavar="DIR",
        help="latents and text states, which runs may share; default: cache in the run's folder",
    )  # fmt: skip
    group.add_argument(
        "--full",
        action="store_true",
        default=None,
        help="tune all weights, not LoRA adapters (also of a small model under salad)",
    )
    group.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help=f"of LoRA; default {LoRA.rank}, under salad with --from 16",
    )
    group.add_argument("--alpha", type=float, metavar="A", help="of LoRA; default: the rank")
    group.add_argument(
        "--projections", type=lambda text: tuple(text.split(",")), metavar="NAME,...",
        help='with adapters: such as attn, attn.q, cross, mlp_in; default "attn", self-attention',
    )  # fmt: skip
    group.add_argument(
        "--expert", choices=_EXPERTS, help="of a model of two: that of high or of low noise"
    )
    group.add_argument(
        "--first-frame-share", type=float, metavar="P",
        help="share of videos whose first frame is given, where the model can; default 0.2",
    )  # fmt: skip
    group.add_argument(
        "--recompute", choices=("none", "dots", "full"),
        help="in the backward pass: nothing, all but matmuls, or all; default full",
    )  # fmt: skip
    group.add_argument(
        "--no-linear-branch", action="store_true", default=None,
        help="of salad: no linear branches, which all layers get otherwise",
    )  # fmt: skip
    group.add_argument("--mesh", type=options.mesh_axes, metavar="AXIS=N,...", help="of devices")
    group.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine", help="learning rate; default cosine"
    )


def check_no_wan_options(args: argparse.Namespace) -> None:
    """Raises `ValueError` for flags that only a Wan model has."""
    salad = args.attention == "salad"
    names = tuple(name for name in _ONLY_HERE if not (salad and name in _ADAPTERS))
    _none_of(args, names, "--from")


def run_wan(args: argparse.Namespace) -> None:
    """Tunes the Wan model of `--weights`, or goes on with the run in `--out`.

    Raises:
      ValueError: a flag, the weights or the data are wrong.
      Interrupted: Ctrl-C, or SIGTERM; what is done is saved.
    """
    _none_of(args, _NOT_HERE, "--weights")
    if args.data is None:
        raise ValueError("expected --data, a folder of videos with captions, with --weights")
    if args.optimizer != "adamw":
        raise ValueError(f"expected --optimizer adamw with --weights, got {args.optimizer}")
    if args.out.resolve().is_relative_to(args.weights.resolve()):
        raise ValueError(f"expected --out outside of the weights {args.weights}, got {args.out}")
    found = detect(args.weights)
    model = found.config
    tuning = _tuning(args, model.boundary is not None, model.first_frame)
    config = _train_config(args, model.shift)
    check_tuning(found, tuning)
    sharding = None if args.mesh is None else Sharding(make_mesh(**args.mesh))
    settings = ClipSettings(
        frames=model.frames if args.frames is None else args.frames,
        size=args.size or model.size,
        fps=model.fps if args.fps is None else args.fps,
    )
    cache = ClipCache(
        found, find_clips(args.data), settings, args.cache or args.out / "cache", tuning.dtype
    )
    made = tune(args.out, cache, config, tuning, sharding=sharding, progress=not args.quiet)
    flag = "--lora-low" if args.expert == "low" else "--lora"
    used = f"{args.weights} {flag} {made}" if made.name == LORA_FILE else str(made)
    print(f"done: {made}, curve in {args.out / 'loss.png'}; vmonarch generate --weights {used}")


def _tuning(args: argparse.Namespace, experts: bool, first_frame: bool) -> Tuning:
    if experts != (args.expert is not None):
        raise ValueError(
            f"expected --expert {' or '.join(_EXPERTS)}: the model has two, and each is tuned alone"
            if experts
            else f"expected no --expert of a model of one, got {args.expert}"
        )
    names = ("rank", "alpha", "projections")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.full and given:
        raise ValueError(f"expected no {', '.join(f'--{n}' for n in given)} with --full")
    share, salad = args.first_frame_share, args.attention == "salad"
    if args.no_linear_branch and not salad:
        raise ValueError(f"expected no --no-linear-branch with --attention {args.attention}")
    return Tuning(
        attention=options.attention_of(args),
        lora=None if args.full else LoRA(**given),
        part=_EXPERTS[args.expert or "high"],
        dtype=args.dtype or "bfloat16",
        remat=args.recompute or "full",
        linear_branch=salad and not args.no_linear_branch,
        first_frame_share=(_FIRST_FRAME_SHARE if first_frame else 0.0) if share is None else share,
    )


def _train_config(args: argparse.Namespace, shift: float) -> TrainConfig:
    flow = FlowConfig(**{"shift": shift} | options.take_fields(args, FlowConfig))
    values: dict[str, Any] = {**(_FULL_DEFAULTS if args.full else _LORA_DEFAULTS)}
    values |= options.take_fields(args, TrainConfig)
    return TrainConfig(**values, flow=flow)


def _none_of(args: argparse.Namespace, names: tuple[str, ...], way: str) -> None:
    given = [f"--{n.replace('_', '-')}" for n in names if getattr(args, n) is not None]
    if given:
        raise ValueError(f"expected no {', '.join(given)} with {way}")
