"""Weights on disk: our own sharded format, and back to safetensors in both conventions."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from ...params import split_params
from ..config import WanConfig
from .configs import CLASSES, config_to_json, write_config, write_original
from .detect import NOTE, ORIGINAL_EXPERTS, STEMS
from .entry import Entry
from .parts import part_entries
from .restore import write_params
from .stored import write_safetensors

Path = pathlib.Path
#: A part: its module, or its parameters by name.
Weights = nnx.Module | Mapping[str, Any]

_LIBRARIES = {"text_encoder": "transformers", "image_encoder": "transformers"}
_PIPELINES = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"}


def save_weights(
    folder: str | Path,
    config: WanConfig,
    parts: Mapping[str, Weights],
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Saves converted weights, each device its share, with the configuration beside them.

    `detect` and `load_part` read the folder, onto the same mesh or any other. It appears when it
    is complete: an interrupted save leaves what was there before. On several hosts all call it,
    with a folder that all of them see.

    Args:
      folder: where to.
      config: the model.
      parts: "transformer" and so on: modules or parameters.
      tokenizer: a folder that is copied along, or `None`.
      overwrite: whether to replace a folder that is there.

    Raises:
      ValueError: the folder is there and `overwrite` is not set, or parameters are missing,
        unexpected or misshapen.

    Example:
      save_weights("wan-1.3B", found.config, {"transformer": model})
      model = load_part(detect("wan-1.3B"), "transformer", placement=sharding)
    """
    checked = {name: _checked(config, name, part) for name, part in parts.items()}
    with _atomic(Path(folder), overwrite) as temporary:
        for name, params in checked.items():
            write_params(temporary / name, params)
        _finish(temporary, config, "orbax", tokenizer, "tokenizer")


def export_weights(
    folder: str | Path,
    config: WanConfig,
    parts: Mapping[str, Weights],
    convention: str = "diffusers",
    dtype: Any = None,
    shard_bytes: int = 5_000_000_000,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes safetensors that Diffusers, or the original repository's readers, load.

    Diffusers: a folder a part, with `config.json`, and `model_index.json`. Original: `config.json`
    and the transformer's shards (two folders of them where there are two experts) beside
    `Wan2.1_VAE.safetensors` and so on. One tensor at a time is on the host.

    Args:
      folder: where to; it appears when it is complete.
      config: the model.
      parts: "transformer" and so on: modules or parameters.
      convention: "diffusers" or "original".
      dtype: of all tensors, or `None`: as they are.
      shard_bytes: what a file holds at most, unless one tensor is larger; of the original
        convention, the transformer's files.
      tokenizer: a folder that is copied along, or `None`.
      overwrite: whether to replace a folder that is there.

    Raises:
      ValueError: the convention is neither, the folder is there and `overwrite` is not set,
        parameters are missing, unexpected or misshapen, or there are several processes.

    Example:
      export_weights("tuned", found.config, {"transformer": model}, tokenizer=found.tokenizer)
    """
    if convention not in ("diffusers", "original"):
        raise ValueError(f"expected convention of diffusers or original, got {convention!r}")
    if shard_bytes < 1:
        raise ValueError(f"expected shard_bytes of at least 1, got {shard_bytes}")
    if jax.process_count() > 1:
        raise ValueError(f"expected one process, got {jax.process_count()}: save_weights first")
    checked = {name: _checked(config, name, part) for name, part in parts.items()}
    with _atomic(Path(folder), overwrite) as temporary:
        for name, params in checked.items():
            entries = part_entries(config, name)
            place, stem = _place(temporary, config, name, convention)
            place.mkdir(parents=True, exist_ok=True)
            # the original's readers know the other parts by one name of a file
            whole = convention == "original" and name not in ORIGINAL_EXPERTS
            limit = sys.maxsize if whole else shard_bytes
            _write_shards(place, stem, entries, params, convention, dtype, limit)
            if convention == "diffusers":
                _write_json(place / "config.json", write_config(name, config))
            elif name in ORIGINAL_EXPERTS:
                _write_json(place / "config.json", write_original(config))
        if convention == "diffusers":
            _write_index(temporary, config, tuple(checked), tokenizer is not None)
        where = "tokenizer" if convention == "diffusers" else "google/umt5-xxl"
        _finish(temporary, config, convention, tokenizer, where)


def _checked(config: WanConfig, name: str, part: Weights) -> Mapping[str, Any]:
    params = split_params(part)[1] if isinstance(part, nnx.Module) else part
    expected = {entry.name: entry.full_shape for entry in part_entries(config, name)}
    problems = [f"missing {key}" for key in expected.keys() - params.keys()]
    problems += [f"unexpected {key}" for key in params.keys() - expected.keys()]
    problems += [
        f"{key}: expected {shape}, got {tuple(params[key].shape)}"
        for key, shape in expected.items()
        if key in params and tuple(params[key].shape) != shape
    ]
    if problems:
        raise ValueError(f"{name} of {config.name}:\n  " + "\n  ".join(sorted(problems)))
    return params


@contextlib.contextmanager
def _atomic(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside, which becomes `folder` when all is written."""
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.unfinished")
    old = folder.with_name(f".{folder.name}.replaced")
    if _first_process() and old.exists():  # a run ended between the two renames below
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, folder)
    _together("mended")
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder}: expected no such folder (overwrite=True replaces it), got one")
    if _first_process():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _together("begin")
    yield temporary
    _together("written")
    if _first_process():
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    _together("renamed")


def _first_process() -> bool:
    return jax.process_index() == 0


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"wan weights {name}")


def _finish(
    folder: Path, config: WanConfig, convention: str, tokenizer: Path | None, place: str
) -> None:
    if not _first_process():
        return
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / place)
    _write_json(folder / NOTE, {"convention": convention, "config": config_to_json(config)})


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _place(folder: Path, config: WanConfig, part: str, convention: str) -> tuple[Path, str]:
    """The folder and the stem of a part's files."""
    if convention == "diffusers":
        return folder / part, STEMS[part]
    if part in ORIGINAL_EXPERTS:
        two = config.boundary is not None
        return folder / ORIGINAL_EXPERTS[part] if two else folder, STEMS[part]
    stems = {
        "vae": f"Wan2.{2 if config.vae.residual else 1}_VAE",
        "text_encoder": "models_t5_umt5-xxl-enc",
        "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
    }
    return folder, stems[part]


def _write_shards(
    folder: Path,
    stem: str,
    entries: tuple[Entry, ...],
    params: Mapping[str, Any],
    convention: str,
    dtype: Any,
    shard_bytes: int,
) -> None:
    sources: dict[str, list[tuple[Entry, int | None]]] = {}
    for entry in entries:
        for layer, key in enumerate(entry.keys(convention)):
            sources.setdefault(key, []).append((entry, layer if entry.layers else None))
    tensors = {
        key: (found[0][0].shape_in(convention), np.dtype(dtype or params[found[0][0].name].dtype))
        for key, found in sources.items()
    }

    def read(key: str) -> np.ndarray:
        pieces = []
        for entry, layer in sorted(sources[key], key=lambda source: source[0].piece):
            value = params[entry.name]
            value = np.asarray(value if layer is None else value[layer])
            pieces.append(entry.theirs(value, convention))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    shards: list[dict[str, Any]] = [{}]
    room, total = shard_bytes, 0
    for key, (shape, kind) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = (shape, kind)
        room, total = room - size, total + size
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0], read)
        return
    where = {}
    for n, shard in enumerate(shards, 1):
        name = f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, read)
        where |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_index(folder: Path, config: WanConfig, parts: tuple[str, ...], tokenizer: bool) -> None:
    """`model_index.json` and the scheduler's settings, from which Diffusers builds a pipeline."""
    named: dict[str, Any] = {
        part: [_LIBRARIES.get(part, "diffusers"), CLASSES[part][0]] if part in parts else [None] * 2
        for part in STEMS
        if part != "image_encoder" or config.image is not None
    }
    named["tokenizer"] = ["transformers", "T5TokenizerFast"] if tokenizer else [None] * 2
    named["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    index = {
        "_class_name": _PIPELINES["i2v" if config.needs_image else "t2v"],
        "boundary_ratio": config.boundary,
        "expand_timesteps": config.first_frame,
        **named,
    }
    _write_json(folder / "model_index.json", index)
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": config.shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "use_flow_sigmas": True,
    }
    _write_json(folder / "scheduler/scheduler_config.json", scheduler)
