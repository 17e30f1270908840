"""Command-line flags that several commands share, and how they become values."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import vmonarch_jax as vm
from vmonarch_jax.corrected import DTYPES
from vmonarch_jax.dispatch import BACKENDS, dispatch, names
from vmonarch_jax.salad import SPARSE

from .labels import MOTIONS, PHOTOS
from .layers import AttentionMethod
from .wan.sharding import AXES

METHODS: dict[str, type] = {
    "dense": vm.Dense,
    "vmonarch": vm.VMonarch,
    "tiled": vm.TiledMonarch,
    "window": vm.SlidingWindow,
    "salad": vm.Salad,
    "adaspa": vm.AdaSpa,
    "guided": vm.Guided,
    "corrected": vm.Corrected,
}


def shape3(text: str) -> tuple[int, int, int]:
    """Reads `1x8x8`; argparse turns the `ValueError` into its message."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"expected FRAMESxHEIGHTxWIDTH such as 1x8x8, got {text!r}"
        )
    return shape


def size2(text: str) -> tuple[int, int]:
    """Reads `832x480`, width first."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 832x480, got {text!r}")
    return width, height


def mesh_axes(text: str) -> dict[str, int]:
    """Reads `context=4,tensor=2`: devices along some axes of a mesh."""
    try:
        sizes = {axis: int(size) for axis, size in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        sizes = {}
    if not sizes or not sizes.keys() <= set(AXES):
        raise argparse.ArgumentTypeError(f"expected AXIS=N,... of {', '.join(AXES)}, got {text!r}")
    return sizes


# Of the fields of `TrainConfig` and `FlowConfig`.
_FIELD_HELP = {
    "steps": "of the optimizer",
    "batch_size": "videos a step",
    "learning_rate": "its peak",
    "warmup_steps": "of the linear rise to the learning rate",
    "weight_decay": "of matrices",
    "clip_norm": "global norm that gradients are clipped to",
    "beta2": "of Adam",
    "ema_decay": "of the moving average, which is what is kept; 0: none",
    "seed": "of new weights, the order of the data, times and noise",
    "save_every": "steps between checkpoints",
    "keep": "checkpoints that are kept, the newest",
    "shift": "of the times that are drawn, towards the noise",
    "logit_mean": "of the normal whose sigmoid a time is",
    "logit_std": "its standard deviation",
    "label_dropout": "share of videos without their class",
    "caption_dropout": "share of videos without their caption",
}


def add_fields(
    parser: argparse.ArgumentParser,
    config: type,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Adds one flag for each number in a dataclass, `--like-this` for `like_this`."""
    for field in dataclasses.fields(config):
        default = defaults.get(field.name, field.default)
        if not isinstance(default, int | float):
            continue
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=default,
            metavar="N",
            help="; ".join([*filter(None, [_FIELD_HELP.get(field.name)]), f"default {default}"]),
        )


def take_fields(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """Returns the values of those flags that belong to a dataclass and are not `None`."""
    names = {field.name for field in dataclasses.fields(config)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return {name: value for name, value in given.items() if value is not None}


def steps_list(text: str) -> tuple[int, ...]:
    """Reads `10,30`."""
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError:
        steps = (-1,)
    if min(steps) < 0:
        raise argparse.ArgumentTypeError(f"expected steps from 0 such as 10,30, got {text!r}")
    return steps


def implementations(text: str) -> tuple[str, ...]:
    """Reads `pallas_gpu,cudnn,xla`: implementations, to be tried in turn."""
    try:
        return names(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# Flags of attention methods: the field that each one sets, and how it is read.
_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "--steps-attention": ("steps", {"type": int, "metavar": "N", "help": "alternating updates"}),
    "--recompute-frames": (
        "recompute_frames",
        {"type": int, "metavar": "N", "help": "first frames with exact attention"},
    ),
    "--block": (
        "block",
        {
            "type": shape3,
            "metavar": "TxHxW",
            "help": "block in tokens; default: a frame, of tiled a row",
        },
    ),
    "--tile": (
        "tile",
        {
            "type": shape3,
            "metavar": "TxHxW",
            "help": "tile in tokens; default: all tokens, of tiled a frame, of window and salad a "
            "box of a block's size",
        },
    ),
    "--window": (
        "window",
        {"type": shape3, "metavar": "TxHxW", "help": "in tokens; default: by --sparsity"},
    ),
    "--sparse": ("sparse", {"choices": SPARSE, "help": "a window, or the best blocks"}),
    "--sparsity": (
        "sparsity",
        {"type": float, "metavar": "S", "help": "share of the key blocks that are left out"},
    ),
    "--block-size": ("block_size", {"type": int, "metavar": "N", "help": "tokens of a block"}),
    "--warmup-attention": (
        "warmup_steps",
        {"type": int, "metavar": "N", "help": "first sampling steps, dense"},
    ),
    "--search-steps": (
        "search_steps",
        {"type": steps_list, "metavar": "N,N", "help": "sampling steps that search for blocks"},
    ),
    "--exact-blocks": (
        "exact_blocks",
        {"type": int, "metavar": "N", "help": "key blocks with exact attention"},
    ),
    "--refresh-every": (
        "every",
        {
            "type": int,
            "metavar": "N",
            "help": "refresh on every Nth sampling step; default: of corrected 10",
        },
    ),
    "--refresh-steps": (
        "refresh_steps",
        {"type": steps_list, "metavar": "N,N", "help": "refresh on these sampling steps instead"},
    ),
    "--residual": ("dtype", {"choices": DTYPES, "help": "dtype of what it keeps"}),
}


def add_attention(parser: argparse.ArgumentParser, default: str = "dense") -> Any:
    """Adds the flags that choose an attention method; returns their group."""
    group = parser.add_argument_group(
        "attention", "In brackets: the methods that take the option, with their defaults."
    )
    group.add_argument("--attention", choices=METHODS, default=default, help=f"default {default}")
    group.add_argument(
        "--corrected-method", choices=METHODS,
        help="of corrected: the method; options that corrected lacks are this one's; "
        "default vmonarch",
    )  # fmt: skip
    for flag, (_, how) in _FIELDS.items():
        told: dict[str, Any] = how | {"help": _help(flag)}
        group.add_argument(flag, dest=_dest(flag), **told)
    group.add_argument(
        "--implementation", type=implementations, metavar="NAME,...",
        help=f"kernels of all attention, tried in turn: {', '.join(BACKENDS)}; on a GPU nothing "
        "but xla is taken unless it is named, such as pallas_gpu,cudnn,xla",
    )  # fmt: skip
    return group


def _help(flag: str) -> str:
    """What a flag is, and the methods that have it, with their defaults."""
    name, how = _FIELDS[flag]
    found = []
    for method, kind in METHODS.items():
        default = {field.name: field.default for field in dataclasses.fields(kind)}.get(name, ())
        if default != ():
            text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            found.append(method if default is None else f"{method} ({text})")
    return f"{how['help']} [{', '.join(found)}]"


@contextlib.contextmanager
def implementation_of(args: argparse.Namespace) -> Iterator[None]:
    """Attention inside runs on the implementations that the flags name, if they do.

    What a command makes does not depend on them but for rounding, so they are no part of what a
    run that goes on is compared with.

    Raises:
      NotImplementedError: none of them can run on this device, with the reason of each.
    """
    chosen = getattr(args, "implementation", None)
    with vm.default_implementation(chosen):
        if chosen is not None:
            dispatch(None, lambda backend: backend)  # before anything slow
        yield


def attention_of(args: argparse.Namespace) -> AttentionMethod:
    """Returns the method that the flags describe.

    `corrected` and `guided` are made around a method: options that they do not have are its own.

    Raises:
      ValueError: an option is out of range, or the method has no such option.
    """
    given = {flag: getattr(args, _dest(flag)) for flag in _FIELDS}
    given = {flag: value for flag, value in given.items() if value is not None}
    names = [args.attention]
    if args.attention == "corrected":
        names.append(args.corrected_method or "vmonarch")
    elif args.corrected_method is not None:
        raise ValueError(f"expected no --corrected-method with --attention {args.attention}")
    if names[-1] == "guided":
        names.append("vmonarch")
    chosen: list[tuple[type, dict[str, Any]]] = []
    for kind in (METHODS[name] for name in names):
        fields = {field.name for field in dataclasses.fields(kind)}
        own = [flag for flag in given if _FIELDS[flag][0] in fields]
        chosen.append((kind, {_FIELDS[flag][0]: given.pop(flag) for flag in own}))
    if given:
        known = [flag for flag, (name, _) in _FIELDS.items() if any(
            name == field.name for kind, _ in chosen for field in dataclasses.fields(kind)
        )]  # fmt: skip
        expected = f"options of it ({', '.join(known)})" if known else "no options"
        raise ValueError(
            f"expected {expected} with --attention {' of '.join(names)}, got {', '.join(given)}"
        )
    kind, options = chosen.pop()
    method = kind(**options)
    for kind, options in reversed(chosen):
        method = kind(method, **options)
    return method


def _dest(flag: str) -> str:
    # a name of its own: training has warm-up steps too
    return "attention" + flag[1:].replace("-", "_")


def label_of(text: str) -> int:
    """Returns the class of a motion's name, or of a number; "none" is the null class."""
    names = (*MOTIONS, "none")
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise ValueError(f"expected a motion of {', '.join(names)}, got {text!r}")


def caption_of(text: str) -> np.ndarray:
    """Returns the caption vector of a photograph's name; `first>second` for a cut, "none" for none.

    Raises:
      ValueError: a name is not one of `PHOTOS`.
    """
    caption = np.zeros(len(PHOTOS), np.float32)
    if text == "none":
        return caption
    for name, weight in zip(text.split(">", 1), (1.0, 0.5), strict=False):
        if name not in PHOTOS:
            raise ValueError(f"expected a photograph of {', '.join(PHOTOS)}, got {name!r}")
        caption[PHOTOS.index(name)] = weight
    return caption
