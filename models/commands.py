"""The subcommands of `vmonarch`; each `add_*` adds a parser whose `run` does the work."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import vmonarch_jax as vm

from . import cli_options as options
from .config import CONFIGS
from .demo import add_demo
from .export import export_params, load_model, load_params
from .flow import FlowConfig
from .pictures import save_gif, save_strip
from .pipeline import MotionVideos, batches
from .salad import add_branches, check_share, drop_branches, mean_gates
from .sampler import SOLVERS, sample
from .step import OPTIMIZERS, TrainConfig
from .train import train
from .wan.finetune.command import add_wan_options, check_no_wan_options, run_wan
from .wan.finetune.drop import add_wan_drop_options, check_no_wan_drop_options, run_wan_drop
from .wan.generate.command import add_generate

# Of tuning a small model.
_TUNING = {"steps": 300, "learning_rate": 2e-4, "warmup_steps": 20}
# Of its adapters, under SALAD.
_RANK = 16
# Of videos that no training has seen, unless it was given this seed.
_HELD_OUT = 77


def _add_run(parser: argparse.ArgumentParser, attention: str = "dense", **defaults: float) -> None:
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of the run"
    )
    options.add_attention(parser, attention)
    options.add_fields(parser, TrainConfig, defaults=defaults)
    options.add_fields(parser, FlowConfig)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default adamw")
    parser.add_argument("--frames", type=int, metavar="N", help="of the training videos")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matmuls")
    small = "of a model of this package: "
    parser.add_argument(
        "--scan-layers", action="store_true", default=None,
        help=f"{small}one program for all layers",
    )  # fmt: skip
    parser.add_argument(
        "--remat", action="store_true", default=None,
        help=f"{small}compute each layer anew in the backward pass",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help=f"{small}processes that render videos"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _run(args: argparse.Namespace, model_config, initial, rank: int | None = None) -> None:
    wanted = {name: getattr(args, name) for name in ("frames", "dtype", "scan_layers", "remat")}
    model_config = dataclasses.replace(
        model_config, **{name: value for name, value in wanted.items() if value is not None}
    )
    flow = FlowConfig(**options.take_fields(args, FlowConfig))
    config = TrainConfig(**options.take_fields(args, TrainConfig), flow=flow)
    train(
        args.out, model_config, config, attention=options.attention_of(args), initial=initial,
        adapter_rank=rank, workers=args.workers, progress=not args.quiet,
    )  # fmt: skip
    print(f"done: weights in {args.out / 'export'}, curve in {args.out / 'loss.png'}")


def add_train(commands) -> None:
    """`vmonarch train`: a new model, or the run in `--out` goes on."""
    parser = commands.add_parser("train", help="train a model, or go on with a run")
    parser.add_argument("--config", choices=CONFIGS, default="tiny", help="default tiny")
    _add_run(parser)
    parser.set_defaults(run=lambda args: _run(args, CONFIGS[args.config], None))


def add_finetune(commands) -> None:
    """`vmonarch finetune`: trained weights, another attention method, a few hundred steps."""
    parser = commands.add_parser("finetune", help="tune a trained model to another attention")
    way = parser.add_mutually_exclusive_group(required=True)
    folder = {"type": pathlib.Path, "metavar": "DIR"}
    way.add_argument("--from", dest="source", **folder, help="exported model of this package")
    way.add_argument("--weights", **folder, help="weights of a Wan model; see below")
    _add_run(parser, attention="vmonarch", **_TUNING)
    add_wan_options(parser)
    # `None`: not given, because the two ways have defaults of their own
    fields = (*dataclasses.fields(TrainConfig), *dataclasses.fields(FlowConfig))
    parser.set_defaults(workers=None, **{field.name: None for field in fields})
    parser.set_defaults(optimizer="adamw", schedule="cosine", run=_run_finetune)


def _run_finetune(args: argparse.Namespace) -> None:
    if args.weights is not None:
        run_wan(args)
        return
    check_no_wan_options(args)
    rank = args.rank
    if args.full and rank is not None:
        raise ValueError(f"expected no --rank with --full, got {rank}")
    if rank is not None and rank < 1:  # before the folder is this run's
        raise ValueError(f"expected --rank >= 1, got {rank}")
    if rank is None and args.attention == "salad" and not args.full:
        rank = _RANK
    for name, value in {"workers": 0, **_TUNING}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    model_config, params = load_params(args.source)
    if args.attention == "salad":
        model_config, params = add_branches(model_config, params)
    _run(args, model_config, params, rank)


def add_drop_branches(commands) -> None:
    """`vmonarch drop-branches`: a SALAD model without the linear branches that do least."""
    parser = commands.add_parser(
        "drop-branches", help="take the linear branches of the smallest gates out of a model"
    )
    way = parser.add_mutually_exclusive_group(required=True)
    folder = {"type": pathlib.Path, "metavar": "DIR"}
    way.add_argument("--from", dest="source", **folder, help="exported model with branches")
    way.add_argument("--weights", **folder, help="weights of a Wan model; see below")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="PATH", help="the model without them"
    )
    parser.add_argument("--share", type=float, default=0.2, metavar="S", help="default 0.2")
    parser.add_argument("--batches", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default 4")
    parser.add_argument(
        "--seed", type=int, default=_HELD_OUT,
        help=f"of the videos, or of times and noise alone; default {_HELD_OUT}",
    )  # fmt: skip
    options.add_fields(parser, FlowConfig)
    options.add_attention(parser, "salad")
    add_wan_drop_options(parser)
    # `None`: not given, because the two ways have defaults of their own
    parser.set_defaults(**{field.name: None for field in dataclasses.fields(FlowConfig)})
    parser.set_defaults(run=_run_drop_branches)


def _run_drop_branches(args: argparse.Namespace) -> None:
    check_share(args.share)  # before anything is measured
    if args.batches < 1:
        raise ValueError(f"expected --batches >= 1, got {args.batches}")
    if args.weights is not None:
        run_wan_drop(args)
        return
    check_no_wan_drop_options(args)
    attention = options.attention_of(args)
    model = load_model(args.source, attention=attention)
    source = MotionVideos(args.seed, frames=model.config.frames, size=model.config.height)
    size = 4 if args.batch_size is None else args.batch_size
    some = itertools.islice(batches(source, batch_size=size), args.batches)
    flow = FlowConfig(**options.take_fields(args, FlowConfig))
    gates = mean_gates(model, some, flow=flow, seed=args.seed)
    model_config, params = drop_branches(*load_params(args.source), gates, args.share)
    export_params(args.out, model_config, params, note=str(attention))
    for layer, gate in gates.items():
        dropped = "" if layer in model_config.linear_layers else ", dropped"
        print(f"layer {layer}: mean gate {gate:.3f}{dropped}")
    print(f"done: {args.out}")


def add_sample(commands) -> None:
    """`vmonarch sample`: videos from noise, as a GIF and a strip of frames."""
    parser = commands.add_parser("sample", help="sample videos from a trained model")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="exported model")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/sample"))
    parser.add_argument(
        "--video", action="append", metavar="MOTION:PHOTO", help="may be given more than once"
    )
    options.add_attention(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--shift", type=float, default=6.0)
    parser.add_argument("--solver", choices=SOLVERS, default="euler")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_run_sample)


def _run_sample(args: argparse.Namespace) -> None:
    wanted = args.video or ["pan_left:coffee", "zoom_in:chelsea", "rotate_cw:rocket"]
    pairs = [text.partition(":")[::2] for text in wanted]
    label = jnp.array([options.label_of(motion) for motion, _ in pairs])
    caption = jnp.array(np.stack([options.caption_of(photo or "none") for _, photo in pairs]))
    attention = options.attention_of(args)
    model = load_model(args.model, attention=attention)
    if not model.config.caption_dim:
        caption = None
    began = time.perf_counter()
    with tqdm(total=args.steps, desc="sampling") as bar:

        def on_step(step: int, x: jax.Array) -> None:
            jax.block_until_ready(x)
            bar.update()

        videos = sample(
            model, jax.random.key(args.seed), label, caption, steps=args.steps,
            guidance=args.guidance, shift=args.shift, solver=args.solver,
            on_step=on_step,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    gif, strip = args.out.with_suffix(".gif"), args.out.with_suffix(".png")
    save_gif(gif, np.asarray(videos))
    save_strip(strip, np.asarray(videos))
    print(f"{len(pairs)} videos under {attention} in {seconds:.1f} s: {gif}, {strip}")


def add_explain(commands) -> None:
    """`vmonarch explain`: what a method costs on a grid, and which kernel runs it here."""
    parser = commands.add_parser("explain", help="say what a method does and costs on a grid")
    parser.add_argument("--grid", type=options.shape3, default=(21, 30, 52), metavar="TxHxW")
    options.add_attention(parser, "vmonarch")
    parser.set_defaults(run=_run_explain)


def _run_explain(args: argparse.Namespace) -> None:
    print(vm.explain(options.attention_of(args), vm.VideoGrid(*args.grid)))


#: What `vmonarch` offers, in the order of its help.
COMMANDS = (
    add_train,
    add_finetune,
    add_drop_branches,
    add_sample,
    add_demo,
    add_generate,
    add_explain,
)
