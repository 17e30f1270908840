"""LoRA files: merged onto our parameters from the common formats, and written for Diffusers."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ...params import Params
from .configs import read_json
from .entry import Entry
from .stored import Stored, Tensor, read_metadata, write_safetensors

# Endings of a key, what they hold, and under which name it is kept.
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "weight",
    ".diff_b": "bias",
}
# What stands before a module's name, outermost first.
_PREFIXES = ("base_model.model.", "model.", "transformer.", "diffusion_model.")
_WRITTEN = {"diffusers": "transformer.", "original": "diffusion_model."}
_KOHYA = "lora_unet_"
_BRANCH_KEY = re.compile(r"blocks[._](\d+)[._](?:attn1|self_attn)[._]linear_branch[._]")
_METADATA = "lora_adapter_metadata"


def merge_lora(
    params: Mapping[str, Array],
    file: str | pathlib.Path,
    entries: Iterable[Entry],
    strength: float = 1.0,
) -> Params:
    """Parameters with a LoRA added: `W + strength * alpha / rank * (B A)`.

    Formats, told apart key by key: PEFT and Diffusers (`transformer.blocks.0.attn1.to_q.lora_A
    .weight`), original keys (`diffusion_model.blocks.0.self_attn.q.lora_down.weight`), Kohya
    (`lora_unet_blocks_0_self_attn_q.lora_down.weight`), with `.alpha` or with the metadata of
    Diffusers or PEFT where they have it; full differences of weights (`.diff`) and biases
    (`.diff_b`, `lora_B.bias`). Sums are in float32; one layer's difference at a time is on the
    host, and each parameter keeps its dtype and its place on the mesh.

    Args:
      params: ours by name, layers stacked; they are left as they are.
      file: a safetensors file.
      entries: the table of the parameters.
      strength: factor of the whole difference.

    Raises:
      ValueError: a key is unknown or misshapen, or half of a pair is missing; all are named.

    Example:
      rebuild, params = split_params(model)
      model = rebuild(merge_lora(params, "style.safetensors", transformer_entries(config), 0.8))

    Departure: Diffusers drops differences of norms; here they count.
    """
    merged: Params = dict(params)
    copied: set[str] = set()
    for entry, layer, difference in _differences(pathlib.Path(file), tuple(entries)):
        value = jnp.asarray(merged[entry.name])
        if entry.name not in copied:
            copied.add(entry.name)
            value = jnp.copy(value)  # which the sum may then overwrite
        delta = entry.ours(np.float32(strength) * difference().reshape(entry.stored))
        merged[entry.name] = _adder(value.sharding, bool(entry.layers))(value, delta, layer)
    return merged


def linear_layers_of(file: str | pathlib.Path) -> tuple[int, ...]:
    """Layers whose linear branches a LoRA file changes; reads the file's header only.

    A model needs these branches before the file can be merged onto it: `add_linear_branches`.
    """
    found = (_BRANCH_KEY.search(key) for key in Stored([pathlib.Path(file)]))
    return tuple(sorted({int(match[1]) for match in found if match}))


def without_branches(
    file: str | pathlib.Path, out: str | pathlib.Path, layers: Iterable[int]
) -> None:
    """Writes a LoRA file again without the linear branches of some layers; one tensor at a time.

    A model that gets the new file has no branches there, if no other file has any.

    Args:
      file: a safetensors file.
      out: the new one; it appears when it is complete.
      layers: whose branches are left out.
    """
    file, gone = pathlib.Path(file), set(layers)
    stored = Stored([file])
    kept = {}
    for key, tensor in stored.items():
        match = _BRANCH_KEY.search(key)
        if match is None or int(match[1]) not in gone:
            kept[key] = tensor.shape, np.dtype(tensor.dtype)
    write_safetensors(pathlib.Path(out), kept, lambda key: stored[key].read(), read_metadata(file))


def check_lora(file: str | pathlib.Path, entries: Iterable[Entry]) -> None:
    """Raises the `ValueError` that `merge_lora` would; reads the file's header only."""
    _differences(pathlib.Path(file), tuple(entries))


@functools.cache
def _adder(sharding: Any, stacked: bool) -> Callable[[Array, np.ndarray, int], Array]:
    def add(value: Array, delta: Array, layer: Array) -> Array:
        row = value[layer] if stacked else value
        summed = (row.astype(jnp.float32) + delta).astype(value.dtype)
        return value.at[layer].set(summed) if stacked else summed

    return jax.jit(add, donate_argnums=0, out_shardings=sharding)


#: A parameter, the layer of it, and what is added there, in the stored shape.
Difference = tuple[Entry, int, Callable[[], np.ndarray]]


def _differences(file: pathlib.Path, entries: tuple[Entry, ...]) -> list[Difference]:
    """What a file adds to which parameter; nothing is read yet but the factors."""
    targets = _targets(entries)
    scaling = _scaling(file)
    problems, modules = [], {}
    for key, tensor in Stored([file]).items():
        ending = next((e for e in _ENDINGS if key.endswith(e)), None)
        module = None if ending is None else _module(key.removesuffix(ending), targets)
        if ending is None or module is None:
            problems.append(f"unexpected {key} of {tensor.shape} (no parameter of ours)")
        elif _ENDINGS[ending] in modules.setdefault(module, {}):
            problems.append(f"{key}: expected one of its kind, got a second")
        else:
            modules[module][_ENDINGS[ending]] = (key, tensor)
    found: list[Difference] = []
    for module, tensors in modules.items():
        try:
            found += _of_module(module, tensors, targets, scaling)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"{file}: expected a LoRA of this model, got {len(problems)} problems:\n  "
            + "\n  ".join(problems)
        )
    if not found:
        raise ValueError(f"{file}: expected a LoRA of this model, got no tensors")
    return found


#: The parameter of a module's weight or bias, and the layer of it.
Targets = dict[tuple[str, str], tuple[Entry, int]]


def _targets(entries: tuple[Entry, ...]) -> Targets:
    """Parameters by Diffusers' name of their module and by "weight" or "bias".

    A module's other names lead to the same place: `_module` knows them by these keys, too.
    """
    found: Targets = {}
    for entry in entries:
        names = zip(entry.keys("diffusers"), entry.keys("original"), strict=True)
        for layer, keys in enumerate(names):
            for key in keys:
                module, _, kind = key.rpartition(".")
                if kind not in ("weight", "bias"):
                    module, kind = key, "weight"
                for name in (module, _KOHYA + module.replace(".", "_")):
                    found[name, kind] = entry, layer
    return found


def _module(name: str, targets: Targets) -> str | None:
    """The module's name as the table has it, without what others put before it."""
    for prefix in ("", *_PREFIXES):
        name = name.removeprefix(prefix)
        if (name, "weight") in targets or (name, "bias") in targets:
            return name
    return None


def _of_module(
    module: str,
    tensors: Mapping[str, tuple[str, Tensor]],
    targets: Targets,
    scaling: Callable[[str, int], float],
) -> list[Difference]:
    found: list[Difference] = []
    factor = 1.0
    if "down" in tensors or "up" in tensors or "alpha" in tensors:
        if not ("down" in tensors and "up" in tensors):
            raise ValueError(f"{module}: expected a pair of matrices, got {_keys(tensors)}")
        (down_key, down), (up_key, up) = tensors["down"], tensors["up"]
        entry, layer = _target(targets, module, "weight", down_key)
        rank = down.shape[0] if down.shape else 0
        rows, columns = entry.stored[0], math.prod(entry.stored[1:])
        if (
            len(entry.stored) < 2
            or up.shape[:2] != (rows, rank)
            or math.prod(up.shape[2:]) != 1
            or math.prod(down.shape[1:]) != columns
            or not rank
        ):
            raise ValueError(
                f"{down_key} and {up_key} (our {entry.name}): expected matrices whose product is "
                f"{entry.stored}, got {down.shape} and {up.shape}"
            )
        if "alpha" in tensors:
            factor = float(tensors["alpha"][1].read().reshape(())) / rank
        else:
            factor = scaling(module, rank)

        def product(
            up: Tensor = up, down: Tensor = down, rank: int = rank, factor: float = factor
        ) -> np.ndarray:
            left = up.read().astype(np.float32).reshape(-1, rank)
            return left @ (down.read().astype(np.float32).reshape(rank, -1) * np.float32(factor))

        found.append((entry, layer, product))
    for kind, where, scale in (
        ("weight", "weight", 1.0), ("bias", "bias", 1.0), ("up_bias", "bias", factor),
    ):  # fmt: skip
        if kind not in tensors:
            continue
        key, tensor = tensors[kind]
        entry, layer = _target(targets, module, where, key)
        if math.prod(tensor.shape) != math.prod(entry.stored):
            raise ValueError(
                f"{key} (our {entry.name}): expected {entry.stored}, got {tensor.shape}"
            )

        def whole(tensor: Tensor = tensor, scale: float = scale) -> np.ndarray:
            return tensor.read().astype(np.float32) * np.float32(scale)

        found.append((entry, layer, whole))
    return found


def _keys(tensors: Mapping[str, tuple[str, Tensor]]) -> str:
    return ", ".join(key for key, _ in tensors.values())


def _target(targets: Targets, module: str, kind: str, key: str) -> tuple[Entry, int]:
    if (module, kind) not in targets:
        raise ValueError(f"{key}: expected a module with a {kind}, got {module}, which has none")
    return targets[module, kind]


def _scaling(file: pathlib.Path) -> Callable[[str, int], float]:
    """Alpha over rank of a module, from Diffusers' metadata or PEFT's `adapter_config.json`."""
    beside = file.with_name("adapter_config.json")
    text = read_metadata(file).get(_METADATA) if file.suffix == ".safetensors" else None
    if text is not None:
        try:
            settings = dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: expected json in {_METADATA}, got {text!r}") from error
        settings = {name.split(".", 1)[-1]: value for name, value in settings.items()}
    elif file.name == "adapter_model.safetensors" and beside.is_file():
        settings = read_json(beside)
    else:
        return lambda module, rank: 1.0
    if settings.get("use_dora"):
        raise ValueError(f"{file}: expected plain LoRA, got DoRA")
    patterns = settings.get("alpha_pattern") or {}

    def scaling(module: str, rank: int) -> float:
        alpha = settings.get("lora_alpha", rank)
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    return scaling


def save_lora(
    path: str | pathlib.Path,
    deltas: Mapping[str, tuple[Any, Any]],
    entries: Iterable[Entry],
    scale: float = 1.0,
    convention: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    whole: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Writes a LoRA in PEFT's format, which Diffusers' `load_lora_weights` and others read.

    Args:
      path: the safetensors file.
      deltas: by parameter name, `A [layers, in, rank]` and `B [layers, rank, out]` (without layers
        where the parameter has none): the parameter, flattened to `[in, out]`, moves by
        `scale * A @ B`.
      entries: the table of the parameters.
      scale: usually alpha / rank; it is multiplied into B, so that readers need no alpha.
      convention: "diffusers" (`transformer.`) or "original" (`diffusion_model.`) names.
      metadata: strings to keep in the file.
      whole: by parameter name, differences that are no product of thin matrices, in our layout;
        they are written as `.diff` and `.diff_b`, which `merge_lora` reads.

    Raises:
      ValueError: names are unknown or no matrices, or shapes do not fit: all are named; or the
        convention is neither.

    Example:
      save_lora("style.safetensors", {"blocks.attn.q.kernel": (a, b)}, transformer_entries(config))
    """
    if convention not in _WRITTEN:
        raise ValueError(f"expected convention of diffusers or original, got {convention!r}")
    known = {entry.name: entry for entry in entries}
    problems = []
    for name, (a, b) in deltas.items():
        entry = known.get(name)
        if entry is None or len(entry.stored) != 2 or entry.axes != (1, 0):
            problems.append(f"{name}: expected a matrix of the model, got none by that name")
            continue
        stack = (entry.layers,) if entry.layers else ()
        outputs, inputs = entry.stored
        rank = a.shape[-1]
        want = (*stack, inputs, rank), (*stack, rank, outputs)
        if (tuple(a.shape), tuple(b.shape)) != want:
            problems.append(f"{name}: expected {want[0]} and {want[1]}, got {a.shape}, {b.shape}")
    for name, value in whole.items():
        shape = known[name].full_shape if name in known else None
        if shape != tuple(value.shape):
            problems.append(f"{name}: expected a parameter of {shape}, got {tuple(value.shape)}")
    if problems or not deltas:
        raise ValueError(f"{path}: " + ("\n  ".join(problems) or "expected a LoRA, got no tensors"))
    prefix = _WRITTEN[convention]
    sources: dict[str, tuple[Any, int | None, float]] = {}
    for name, (a, b) in deltas.items():
        entry = known[name]
        for layer, key in enumerate(entry.keys(convention)):
            base = prefix + key.removesuffix(".weight")
            row = layer if entry.layers else None
            sources[f"{base}.lora_A.weight"] = a, row, 1.0
            sources[f"{base}.lora_B.weight"] = b, row, scale

    differences: dict[str, tuple[Entry, Any, int | None]] = {}
    for name, value in whole.items():
        entry = known[name]
        for layer, key in enumerate(entry.keys(convention)):
            module, _, kind = key.rpartition(".")
            ending = {"weight": "diff", "bias": "diff_b"}[kind]
            row = layer if entry.layers else None
            differences[f"{prefix}{module}.{ending}"] = entry, value, row

    def read(key: str) -> np.ndarray:
        if key in differences:
            entry, value, row = differences[key]
            return entry.theirs(np.asarray(value if row is None else value[row]), convention)
        value, row, factor = sources[key]
        value = np.asarray(value if row is None else value[row])
        return (value.T.astype(np.float32) * np.float32(factor)).astype(value.dtype)

    tensors = {
        key: (tuple(value.shape[:-3:-1]), np.dtype(value.dtype))
        for key, (value, _, _) in sources.items()
    }
    for key, (entry, value, _) in differences.items():
        tensors[key] = entry.shape_in(convention), np.dtype(value.dtype)
    write_safetensors(pathlib.Path(path), tensors, read, metadata)
