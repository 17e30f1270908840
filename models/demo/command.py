"""The `demo` subcommand."""

from __future__ import annotations

import argparse
import pathlib

from .run import DemoConfig, run_demo


def add_demo(commands) -> None:
    """`vmonarch demo`: the same noise under each attention method, as pictures and numbers."""
    parser = commands.add_parser(
        "demo", help="compare attention methods on sampled videos, or on your own"
    )
    default = DemoConfig()
    folder = pathlib.Path
    parser.add_argument("--out", type=folder, default=default.out, help="default out/demo")
    parser.add_argument(
        "--input", type=folder, metavar="FILE", help="your own video, photograph or folder of them"
    )
    parser.add_argument(
        "--strength", type=float, default=default.strength, metavar="T",
        help="how much noise the input gets, above 0, at most 1; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps; default 12")
    parser.add_argument(
        "--guidance", type=float, default=default.guidance, help="default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="a small run, to try it out")
    parser.add_argument("--model-dense", type=folder, metavar="DIR", help="exported model")
    parser.add_argument(
        "--model-tuned", type=folder, metavar="DIR", help="the same, tuned to VMonarch"
    )
    parser.add_argument("--model-salad", type=folder, metavar="DIR", help="the same, to SALAD")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    names = ("out", "input", "strength", "steps", "guidance", "seed", "quick")
    values = {name: getattr(args, name) for name in names}
    models = {"dense": args.model_dense, "tuned": args.model_tuned, "salad": args.model_salad}
    run_demo(DemoConfig(**values, **models))
