"""Command-line flags that several commands share, and how they become values."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

import vmonarch_jax as vm

from .labels import MOTIONS, PHOTOS
from .layers import AttentionMethod
from .wan.sharding import AXES

METHODS = {"dense": vm.Dense, "vmonarch": vm.VMonarch, "tiled": vm.TiledMonarch}


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
            help=f"default {default}",
        )


def take_fields(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """Returns the values of those flags that belong to a dataclass and are not `None`."""
    names = {field.name for field in dataclasses.fields(config)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return {name: value for name, value in given.items() if value is not None}


def add_attention(parser: argparse.ArgumentParser, default: str = "dense") -> None:
    """Adds the flags that choose an attention method."""
    group = parser.add_argument_group("attention")
    group.add_argument("--attention", choices=METHODS, default=default, help=f"default {default}")
    group.add_argument("--steps-attention", type=int, metavar="N", help="alternating steps")
    group.add_argument(
        "--recompute-frames", type=int, metavar="N", help="first frames with exact attention"
    )
    group.add_argument("--block", type=shape3, metavar="TxHxW", help="block shape in tokens")
    group.add_argument("--tile", type=shape3, metavar="TxHxW", help="tile shape in tokens")


def attention_of(args: argparse.Namespace) -> AttentionMethod:
    """Returns the method that the flags describe.

    Raises:
      ValueError: an option is out of range, or the method has no such option.
    """
    given = {
        "steps": args.steps_attention,
        "recompute_frames": args.recompute_frames,
        "block": args.block,
        "tile": args.tile,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.attention == "dense" and given:
        raise ValueError(f"expected no options ({', '.join(given)}) with --attention dense")
    return METHODS[args.attention](**given)


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
