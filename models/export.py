"""Small checkpoints of averaged weights, for shipping and for starting from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

import vmonarch_jax as vm

from .arrays import read_arrays, write_arrays
from .config import VideoDiTConfig
from .dit import VideoDiT
from .layers import AttentionMethod
from .params import Params, check_params, split_params
from .salad import add_branches

_FORMAT = "vmonarch-video-dit-1"


def _digest(params: Mapping[str, Array | np.ndarray]) -> str:
    """SHA-256 over names and raw values: storage formats do not always check what they read."""
    total = hashlib.sha256()
    for name in sorted(params):
        total.update(name.encode())
        total.update(np.asarray(params[name]).tobytes())
    return total.hexdigest()


def _rounded(params: Mapping[str, Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value).astype(jnp.bfloat16) for name, value in params.items()}


def export_params(
    folder: pathlib.Path,
    config: VideoDiTConfig,
    params: Mapping[str, Array],
    *,
    note: str = "",
    base: pathlib.Path | None = None,
) -> None:
    """Writes parameters as bfloat16: `folder/config.json` and `folder/params/`.

    All of it is written beside `folder` first and renamed at the end, replacing what was there.

    Args:
      folder: where to.
      config: the model's configuration.
      params: from `split_params`, or the averaged ones of a training state.
      note: kept in the file for people to read, such as the attention it was trained under.
      base: the exported model that it was tuned from; what tuning left as it was is not written
        again, and the base must stay where it is, seen from `folder`.
    """
    folder = pathlib.Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    small = _rounded(params)
    own, note_of_base = small, {}
    if base is not None:
        known = _rounded(load_params(base)[1])
        own = {
            name: value
            for name, value in small.items()
            if name not in known or not np.array_equal(known[name], value)
        }
        note_of_base = {"base": os.path.relpath(pathlib.Path(base).absolute(), folder)}
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        partial.chmod(0o755)
        write_arrays(partial / "params", own)
        meta = {
            "format": _FORMAT,
            "config": dataclasses.asdict(config),
            "note": note,
            "sha256": _digest(small),
            **note_of_base,
        }
        (partial / "config.json").write_text(json.dumps(meta, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_params(folder: pathlib.Path) -> tuple[VideoDiTConfig, Params]:
    """Returns the configuration and the parameters, in float32.

    Raises:
      ValueError: a file is missing or damaged, or the two do not fit each other; the message says
        which file, what was expected and what was got.
    """
    folder = pathlib.Path(folder).absolute()
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: expected the configuration of an exported model, got no file")
    try:
        meta = json.loads(path.read_text())
        found = meta["format"]
        if found != _FORMAT:
            raise ValueError(f"{path}: expected format {_FORMAT!r}, got {found!r}")
        config = VideoDiTConfig(**meta["config"])
        digest, base = meta["sha256"], meta.get("base")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the configuration of an exported model, "
            f"got {type(error).__name__}: {error}"
        ) from error
    arrays = folder / "params"
    params = read_arrays(arrays)
    expected = split_params(nnx.eval_shape(lambda: VideoDiT(config, rngs=nnx.Rngs(0))))[1]
    if base is not None:
        below = _rounded(load_params(folder / base)[1])
        params = {name: below[name] for name in below if name in expected} | params
    check_params(params, expected, arrays)
    if _digest(params) != digest:
        raise ValueError(f"{arrays}: expected values of SHA-256 {digest}, got {_digest(params)}")
    return config, {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def load_model(
    folder: pathlib.Path,
    *,
    attention: AttentionMethod | Sequence[AttentionMethod] = vm.Dense(),  # noqa: B008 (frozen)
    **overrides: Any,
) -> VideoDiT:
    """Returns an exported model under any attention method.

    Args:
      folder: what `export_params` wrote.
      attention: the method, or one a layer.
      **overrides: fields of the configuration that leave the parameters alone: `dtype`,
        `scan_layers`, `remat`; and `linear_layers`, layers that get a linear branch unless they
        have one, which changes nothing before it is trained.

    Raises:
      ValueError: as `load_params`, and for an override that would change a parameter's shape.
    """
    config, params = load_params(folder)
    config, params = add_branches(config, params, overrides.pop("linear_layers", ()))
    config = dataclasses.replace(config, **overrides)
    model = nnx.eval_shape(lambda: VideoDiT(config, attention=attention, rngs=nnx.Rngs(0)))
    rebuild, expected = split_params(model)
    check_params(params, expected, folder)
    return rebuild(params)
