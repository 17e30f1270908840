"""What `vmonarch finetune --weights` takes and does."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from ... import cli_options as options
from ...flow import FlowConfig
from ...step import SCHEDULES, TrainConfig
from ..config import WanConfig
from ..generate.run import placement_of
from ..sharding import AXES, Sharding
from ..weights.detect import Found, detect
from .adapters import LoRA
from .cache import ClipCache, ClipSettings
from .data import find_clips
from .plan import make_tuning_plan
from .prepare import Tuning, check_tuning, train_config
from .tune import LORA_FILE, tune

_EXPERTS = {"high": "transformer", "low": "transformer_2"}
_FIRST_FRAME_SHARE = 0.2
# Flags of the small model that mean nothing here, and those of a Wan model that mean nothing there.
_NOT_HERE = ("label_dropout", "scan_layers", "remat", "workers")
#: What `add_data_options` adds.
DATA_FLAGS = ("data", "size", "fps", "cache", "expert", "first_frame_share", "mesh")
_ONLY_HERE = (
    *DATA_FLAGS, "full", "rank", "alpha", "projections", "recompute", "accumulate", "dry_run",
    "no_linear_branch",
)  # fmt: skip
# Of these, what tuning the small model takes too.
_ADAPTERS = ("full", "rank")


def add_wan_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of tuning a Wan model; the run's own (`--steps`, ...) are there already."""
    group = parser.add_argument_group(
        "a Wan model (with --weights)",
        "Defaults: 1000 steps of one video, 50 of them warm-up, learning rate 1e-4 (1e-5 with "
        "--full, and no moving average), bfloat16, shift, size, frames and frame rate of the "
        "model.",
    )
    add_data_options(group, cache="cache in the run's folder")
    group.add_argument(
        "--full",
        action="store_true",
        default=None,
        help="tune all weights, not LoRA adapters (with --from the default, but under salad)",
    )
    group.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help=f"of LoRA; default {LoRA.rank}; with --from it asks for adapters, under salad 16",
    )
    group.add_argument("--alpha", type=float, metavar="A", help="of LoRA; default: the rank")
    group.add_argument(
        "--projections", type=lambda text: tuple(text.split(",")), metavar="NAME,...",
        help='with adapters: such as attn, attn.q, cross, mlp_in; default "attn", self-attention',
    )  # fmt: skip
    group.add_argument(
        "--recompute", choices=("none", "dots", "full"),
        help="in the backward pass: nothing, all but matmuls, or all; default full",
    )  # fmt: skip
    group.add_argument(
        "--accumulate", type=int, metavar="N",
        help="take a step's videos (--batch-size) in N parts, one after another: the memory of "
        "one part, the result of all; default 1",
    )  # fmt: skip
    group.add_argument(
        "--dry-run", action="store_true", default=None,
        help="say what would be loaded, the memory and the FLOPs of a step; the devices of --mesh "
        "need not be there",
    )  # fmt: skip
    group.add_argument(
        "--no-linear-branch", action="store_true", default=None,
        help="of salad: no linear branches, which all layers get otherwise",
    )  # fmt: skip
    group.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine", help="learning rate; default cosine"
    )


def add_data_options(group: Any, cache: str) -> None:
    """Adds the flags of videos, and of where and how they are shown to a Wan model.

    Args:
      group: of flags.
      cache: the default of `--cache`, in words.
    """
    folder = pathlib.Path
    group.add_argument("--data", type=folder, metavar="DIR", help="videos with captions beside")
    group.add_argument("--size", type=options.size2, metavar="WIDTHxHEIGHT", help="of the videos")
    group.add_argument("--fps", type=float, metavar="N", help="frames a second of the videos")
    group.add_argument(
        "--cache", type=folder, metavar="DIR",
        help=f"latents and text states, which runs may share; default: {cache}",
    )  # fmt: skip
    group.add_argument(
        "--expert", choices=_EXPERTS, help="of a model of two: that of high or of low noise"
    )
    group.add_argument(
        "--first-frame-share", type=float, metavar="P",
        help="share of videos whose first frame is given, where the model can; default 0.2",
    )  # fmt: skip
    group.add_argument(
        "--mesh",
        type=options.mesh_axes,
        metavar="AXIS=N,...",
        help=f"devices along {', '.join(AXES)}",
    )


def check_no_wan_options(args: argparse.Namespace) -> None:
    """Raises `ValueError` for flags that only a Wan model has."""
    none_of(args, tuple(name for name in _ONLY_HERE if name not in _ADAPTERS), "--from")


def run_wan(args: argparse.Namespace) -> None:
    """Tunes the Wan model of `--weights`, or goes on with the run in `--out`.

    Raises:
      ValueError: a flag, the weights or the data are wrong.
      Interrupted: Ctrl-C, or SIGTERM; what is done is saved.
    """
    none_of(args, _NOT_HERE, "--weights")
    if args.optimizer != "adamw":
        raise ValueError(f"expected --optimizer adamw with --weights, got {args.optimizer}")
    if args.out.resolve().is_relative_to(args.weights.resolve()):
        raise ValueError(f"expected --out outside of the weights {args.weights}, got {args.out}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"expected --out of a folder, got the file {args.out}")
    found = detect(args.weights)
    model = found.config
    tuning = _tuning(args, model)
    config = _train_config(args, model.shift)
    check_tuning(found, tuning)
    cache = clip_cache(args, found, tuning.dtype, args.out / "cache")
    sharding, parts = (
        mesh_of(args, there=not args.dry_run),
        1 if args.accumulate is None else args.accumulate,
    )
    if args.dry_run:
        print(make_tuning_plan(cache, config, tuning, sharding, parts))
        return
    made = tune(
        args.out, cache, config, tuning, sharding=sharding, parts=parts, progress=not args.quiet
    )
    flag = "--lora-low" if args.expert == "low" else "--lora"
    used = f"{args.weights} {flag} {made}" if made.name == LORA_FILE else str(made)
    print(f"done: {made}, curve in {args.out / 'loss.png'}; vmonarch generate --weights {used}")


def clip_cache(
    args: argparse.Namespace, found: Found, dtype: str, folder: pathlib.Path
) -> ClipCache:
    """The videos of `--data`, as the flags say, in `--cache` or in a folder by default.

    Raises:
      ValueError: there is no `--data`, or it or the size does not suit the model.
    """
    if args.data is None:
        raise ValueError("expected --data, a folder of videos with captions, with --weights")
    model = found.config
    settings = ClipSettings(
        frames=model.frames if args.frames is None else args.frames,
        size=args.size or model.size,
        fps=model.fps if args.fps is None else args.fps,
    )
    return ClipCache(found, find_clips(args.data), settings, args.cache or folder, dtype)


def part_of(args: argparse.Namespace, model: WanConfig) -> str:
    """The transformer that `--expert` names.

    Raises:
      ValueError: it is given of a model of one, or not given of a model of two.
    """
    if (experts := model.boundary is not None) != (args.expert is not None):
        raise ValueError(
            f"expected --expert {' or '.join(_EXPERTS)}: the model has two, and each is tuned alone"
            if experts
            else f"expected no --expert of a model of one, got {args.expert}"
        )
    return _EXPERTS[args.expert or "high"]


def first_frame_share(args: argparse.Namespace, model: WanConfig) -> float:
    """The share of `--first-frame-share`, or that of the model."""
    given = args.first_frame_share
    return (_FIRST_FRAME_SHARE if model.first_frame else 0.0) if given is None else given


def mesh_of(args: argparse.Namespace, there: bool = True) -> Sharding | None:
    """What `--mesh` says, or `None`: one device. To reckon with it, it need not be `there`."""
    return None if args.mesh is None else placement_of(args.mesh, there)


def _tuning(args: argparse.Namespace, model: WanConfig) -> Tuning:
    part = part_of(args, model)
    names = ("rank", "alpha", "projections")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.full and given:
        raise ValueError(f"expected no {', '.join(f'--{n}' for n in given)} with --full")
    salad = args.attention == "salad"
    if args.no_linear_branch and not salad:
        raise ValueError(f"expected no --no-linear-branch with --attention {args.attention}")
    return Tuning(
        attention=options.attention_of(args),
        lora=None if args.full else LoRA(**given),
        part=part,
        dtype=args.dtype or "bfloat16",
        remat=args.recompute or "full",
        linear_branch=salad and not args.no_linear_branch,
        first_frame_share=first_frame_share(args, model),
    )


def _train_config(args: argparse.Namespace, shift: float) -> TrainConfig:
    flow = FlowConfig(**{"shift": shift} | options.take_fields(args, FlowConfig))
    return train_config(args.full, **options.take_fields(args, TrainConfig), flow=flow)


def none_of(args: argparse.Namespace, names: tuple[str, ...], way: str) -> None:
    """Raises `ValueError` if flags are given that mean nothing with another one."""
    given = [f"--{n.replace('_', '-')}" for n in names if getattr(args, n) is not None]
    if given:
        raise ValueError(f"expected no {', '.join(given)} with {way}")
