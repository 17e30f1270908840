"""What `vmonarch drop-branches --weights` takes and does."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from ... import cli_options as options
from ...flow import FlowConfig
from ...params import split_params
from ...pipeline import batches
from ...salad import kept_layers
from ..linear_branch import drop_linear_branches
from ..pipeline import LoRAFile, WanPipeline
from ..weights.detect import Found, detect
from ..weights.load import load_part
from ..weights.lora import linear_layers_of, without_branches
from .command import (
    DATA_FLAGS,
    add_data_options,
    clip_cache,
    first_frame_share,
    mesh_of,
    none_of,
    part_of,
)
from .gates import mean_gates
from .tune import save_model


def add_wan_drop_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a Wan model; `--batches` and the like are there already."""
    folder = pathlib.Path
    group = parser.add_argument_group(
        "a Wan model (with --weights)",
        "Defaults: batches of one video; shift, size, frames and frame rate of the model.",
    )
    group.add_argument(
        "--lora", type=folder, metavar="FILE",
        help="that the branches are in: --out is such a file; without it a folder of weights",
    )  # fmt: skip
    group.add_argument("--frames", type=int, metavar="N", help="frames of the videos")
    add_data_options(group, cache="cache beside --out, where a run has it")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="default bfloat16")
    group.add_argument("--quiet", action="store_true", default=None, help="no progress bar")


def check_no_wan_drop_options(args: argparse.Namespace) -> None:
    """Raises `ValueError` for flags that only a Wan model has."""
    none_of(args, ("lora", "frames", *DATA_FLAGS, "dtype", "quiet"), "--from")


def run_wan_drop(args: argparse.Namespace) -> None:
    """Measures the branches of a Wan model, and writes it without those of the smallest gates.

    Raises:
      ValueError: a flag, the weights or the data are wrong, or there are no branches.
    """
    found = detect(args.weights)
    part = part_of(args, found.config)
    _check(args, found)
    attention = options.attention_of(args)
    dtype = args.dtype or "bfloat16"
    sharding = mesh_of(args)
    cache = clip_cache(args, found, dtype, args.out.parent / "cache")
    size, videos = 1 if args.batch_size is None else args.batch_size, len(cache.clips)
    if not 1 <= size <= videos:
        raise ValueError(f"expected --batch-size of 1 to the {videos} videos, got {size}")
    lora = [] if args.lora is None else [LoRAFile(args.lora, part)]
    pipeline = WanPipeline.open(found, dtype, sharding, lora)  # checks the file, loads nothing yet
    args.out.parent.mkdir(parents=True, exist_ok=True)
    source = cache.fill(progress=not args.quiet)
    gates = mean_gates(
        pipeline.part(part),
        pipeline.config,
        _some(batches(source, batch_size=size), args.batches),
        jnp.asarray(source.empty_text()),
        attention=attention,
        part=part,
        flow=FlowConfig(**{"shift": found.config.shift} | options.take_fields(args, FlowConfig)),
        first_frame_share=first_frame_share(args, found.config),
        seed=args.seed,
        sharding=sharding,
    )
    pipeline.free()
    kept = kept_layers(tuple(gates), gates, args.share)
    if args.lora is not None:
        without_branches(args.lora, args.out, set(gates).difference(kept))
    else:
        params = split_params(load_part(found, part, None, sharding))[1]
        sizes, params = drop_linear_branches(found.config.transformer, params, gates, args.share)
        config = dataclasses.replace(found.config, transformer=sizes)
        save_model(args.out, dataclasses.replace(found, config=config), part, params)
    for layer, gate in gates.items():
        print(f"layer {layer}: mean gate {gate:.3f}{'' if layer in kept else ', dropped'}")
    print(f"done: {args.out}")


def _check(args: argparse.Namespace, found: Found) -> None:
    """Raises `ValueError` where the branches are not what can be dropped."""
    own = found.config.transformer.linear_layers
    if args.lora is None:
        if not own:
            raise ValueError(
                f"expected --lora, or weights with linear branches, got {args.weights}"
            )
        if found.config.boundary is not None:
            raise ValueError(
                f"{found.config.name}: expected one expert, because the branches of both go "
                "together and each has gates of its own; got two"
            )
        if args.out.resolve().is_relative_to(args.weights.resolve()):
            raise ValueError(
                f"expected --out outside of the weights {args.weights}, got {args.out}"
            )
        return
    if own:
        raise ValueError(
            "expected weights without linear branches with --lora: a file of differences "
            f"can't take them out; got some in the layers {own}"
        )
    if not linear_layers_of(args.lora):
        raise ValueError(f"expected a LoRA with linear branches, got none in {args.lora}")
    if args.out.suffix != ".safetensors" or args.out.resolve() == args.lora.resolve():
        raise ValueError(f"expected --out of another .safetensors file, got {args.out}")


def _some(endless: Any, count: int) -> Iterator[dict[str, Any]]:
    for batch in itertools.islice(endless, count):
        yield dict(batch)
