"""The `generate` subcommand."""

from __future__ import annotations

import argparse
import math
import pathlib

from ... import cli_options as options
from ...attention_schedule import Attention, AttentionSchedule
from ..clip import FITS
from ..pipeline import LoRAFile
from ..samplers import SAMPLERS
from ..sharding import AXES
from ..unipc import SPACINGS
from .run import Job, generate, plan

# Flags that a request takes; what is not given is the model's own.
_REQUEST = (
    "negative_prompt", "size", "frames", "steps", "guidance", "guidance_low", "shift", "sampler",
    "spacing", "image_fit", "seed",
)  # fmt: skip


def add_generate(commands) -> None:
    """`vmonarch generate`: a video from a prompt by a Wan model, under any attention method."""
    parser = commands.add_parser(
        "generate", help="make a video with a Wan model",
        description="Makes a video with a Wan model under any attention method.",
        usage="vmonarch generate --weights DIR --prompt TEXT [--out FILE.mp4] [options]",
    )  # fmt: skip
    folder = pathlib.Path
    parser.add_argument(
        "--weights", type=folder, required=True, metavar="DIR",
        help="as downloaded, in the original layout or that of Diffusers",
    )  # fmt: skip
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to show")
    negative = parser.add_mutually_exclusive_group()
    negative.add_argument(
        "--negative-prompt", metavar="TEXT", help="what to keep away from; default none"
    )
    negative.add_argument(
        "--negative-prompt-file", type=folder, metavar="FILE", help="a file that says so, in UTF-8"
    )
    parser.add_argument("--image", type=folder, metavar="FILE", help="the first frame")
    parser.add_argument("--last-image", type=folder, metavar="FILE", help="the last frame")
    parser.add_argument(
        "--out", type=folder, default=folder("video.mp4"), metavar="FILE",
        help="an .mp4, with its settings beside it as .json; default video.mp4",
    )  # fmt: skip
    group = parser.add_argument_group("video", "Defaults: as the model's authors sample it.")
    group.add_argument(
        "--size", type=options.size2, metavar="WIDTHxHEIGHT",
        help="in pixels; with --image the default area has the image's shape",
    )  # fmt: skip
    group.add_argument("--frames", type=int, metavar="N", help="4 n + 1, such as 81")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--guidance", type=float, metavar="W", help="1 is none, at half the cost")
    group.add_argument("--guidance-low", type=float, metavar="W", help="of the expert of low noise")
    group.add_argument("--shift", type=float, metavar="S", help="of the noise levels")
    group.add_argument("--sampler", choices=SAMPLERS, help="default unipc")
    group.add_argument(
        "--sampler-spacing", dest="spacing", choices=SPACINGS,
        help="of the noise levels: as in Diffusers (default), or as in the original repository",
    )  # fmt: skip
    group.add_argument(
        "--image-fit", choices=FITS,
        help="what the image encoder sees: the middle square, as in Diffusers (default), or all of "
        "the image, as in the original repository",
    )  # fmt: skip
    group.add_argument("--seed", type=int, metavar="N", help="default 0")
    group = parser.add_argument_group("LoRA")
    files = {"type": folder, "action": "append", "default": [], "metavar": "FILE"}
    group.add_argument("--lora", **files, help="merged onto the transformer; may be repeated")
    group.add_argument("--lora-low", **files, help="likewise, onto the expert of low noise")
    group.add_argument("--lora-strength", type=float, default=1.0, metavar="S", help="default 1")
    group = options.add_attention(parser, "vmonarch")
    group.add_argument(
        "--dense-steps", type=int, default=0, metavar="N",
        help="first denoising steps under dense attention, whatever the method; default 0",
    )  # fmt: skip
    group.add_argument(
        "--dense-layers", type=_numbers, default=(), metavar="N,N",
        help="layers under dense attention, such as --dense-layers=0,-1 for the outermost",
    )  # fmt: skip
    group = parser.add_argument_group("results")
    group.add_argument(
        "--compare", choices=options.METHODS, metavar="METHOD",
        help="make the video under this method too, with its defaults; write both side by side, "
        "this one on the right, and report PSNR, SSIM and the certificate of each layer",
    )  # fmt: skip
    group.add_argument("--png", action="store_true", help="write the frames as PNG files too")
    group.add_argument(
        "--resume", action="store_true",
        help="go on with a run that was interrupted, from what it kept in FILE.mp4.partial",
    )  # fmt: skip
    group.add_argument(
        "--dry-run", action="store_true",
        help="check everything, say what would be loaded, the memory and the FLOPs, and stop",
    )  # fmt: skip
    group = parser.add_argument_group("memory and devices")
    group.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16"
    )
    group.add_argument(
        "--two-calls", action="store_true", help="guidance in two calls, in half the memory"
    )
    group.add_argument(
        "--mesh", type=options.mesh_axes, metavar="AXIS=N,...",
        help=f"devices along {', '.join(AXES)}, such as context=4; default: one device",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in _REQUEST}
    if args.negative_prompt_file is not None:
        given["negative_prompt"] = _text_of(args.negative_prompt_file)
    if not math.isfinite(args.lora_strength):
        raise ValueError(f"expected a --lora-strength that is finite, got {args.lora_strength}")
    job = Job(
        weights=args.weights,
        request={"prompt": args.prompt} | {n: v for n, v in given.items() if v is not None},
        out=args.out,
        attention=_attention(args),
        image=args.image,
        last_image=args.last_image,
        dtype=args.dtype,
        batched=not args.two_calls,
        mesh=args.mesh,
        compare=None if args.compare is None else options.METHODS[args.compare](),
        frames=args.png,
        resume=args.resume,
        lora=tuple(
            LoRAFile(path, part, args.lora_strength)
            for part, paths in (("transformer", args.lora), ("transformer_2", args.lora_low))
            for path in paths
        ),
    )
    if args.dry_run:
        print(plan(job))
        return
    metadata = generate(job)
    print(f"{job.out} in {metadata['seconds']} s under {job.attention}")
    if job.compare is not None:
        print(f"left: that; right: under {job.compare}")


def _attention(args: argparse.Namespace) -> Attention:
    method = options.attention_of(args)
    if args.dense_steps < 0:
        raise ValueError(f"expected --dense-steps >= 0, got {args.dense_steps}")
    if len(set(args.dense_layers)) < len(args.dense_layers):
        raise ValueError(f"expected each of --dense-layers once, got {args.dense_layers}")
    if not args.dense_steps and not args.dense_layers:
        return method
    dense = options.METHODS["dense"]()
    return AttentionSchedule(
        method, warmup_steps=args.dense_steps, warmup=dense,
        layers=tuple((layer, dense) for layer in args.dense_layers),
    )  # fmt: skip


def _text_of(path: pathlib.Path) -> str:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a file of text in UTF-8, got none") from error
    if not text:
        raise ValueError(f"{path}: expected a negative prompt, got an empty file")
    return text


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,1, got {text!r}") from None
