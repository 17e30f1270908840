"""SALAD's recipe: linear branches put into a trained model, tuned, and the idle ones taken out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from vmonarch_jax.nn import SaladAttention

from .config import VideoDiTConfig
from .dit import VideoDiT
from .flow import FlowConfig, flow_loss
from .lora import init_adapters, merge_adapters
from .params import Params, split_params

Batch = TypeVar("Batch")

#: Parameters of a linear branch, by the end of their names.
_BRANCH = (".attention.linear_out.kernel", ".attention.gate.kernel", ".attention.gate.bias")


def add_branches(
    config: VideoDiTConfig, params: Params, layers: Iterable[int] | None = None
) -> tuple[VideoDiTConfig, Params]:
    """Returns a model with linear branches in more layers, which gives what it gave before.

    Args:
      config: of the model.
      params: its parameters.
      layers: that get a branch, beside those that have one; `None`: all.

    Raises:
      ValueError: there is no such layer.
    """
    wanted = {*(range(config.depth) if layers is None else layers)}
    new = wanted.difference(config.linear_layers)
    if not new:
        return config, params
    both = sorted(wanted.union(config.linear_layers))
    config = dataclasses.replace(config, linear_layers=tuple(both))
    # what a branch starts with is not drawn: its projection and gate are zero
    layer = SaladAttention(config.dim, config.heads, rngs=nnx.Rngs(0))
    own = {f".attention.{name}": value for name, value in split_params(layer)[1].items()}
    branches = {f"blocks.{n}{end}": jnp.copy(own[end]) for n in sorted(new) for end in _BRANCH}
    return config, params | branches


def split_for_tuning(params: Params, rank: int, seed: int) -> tuple[Params, Params]:
    """`(trained, frozen)`: adapters of q, k, v and output projections with the branches; the rest.

    Args:
      params: of a model.
      rank: of the adapters.
      seed: of the adapters.

    Raises:
      ValueError: the rank is not positive.
    """
    parts = {".attention.qkv.kernel": 3, ".attention.out.kernel": 1}
    kernels = {name: n for name in params for end, n in parts.items() if name.endswith(end)}
    branches = {name: value for name, value in params.items() if name.endswith(_BRANCH)}
    adapters = init_adapters(params, kernels, rank, jax.random.key(seed))
    return adapters | branches, {n: value for n, value in params.items() if n not in branches}


def merge_tuned(trained: Params, frozen: Params) -> Params:
    """Returns the parameters of the model, without adapters: the inverse of `split_for_tuning`."""
    branches = {name: value for name, value in trained.items() if name.endswith(_BRANCH)}
    return merge_adapters(frozen, trained) | branches


def mean_gates(
    model: VideoDiT,
    batches: Iterable[Mapping[str, Any]],
    *,
    flow: FlowConfig | None = None,
    seed: int = 0,
) -> dict[int, float]:
    """Returns the mean gate of each layer's linear branch over batches of videos.

    Args:
      model: as it is used, under its attention method.
      batches: of `video`, `label` and `caption`, as in training.
      flow: how times are drawn; `None`: as in training by default.
      seed: of times and noise.

    Raises:
      ValueError: the model has no linear branch, or there is no batch.
    """
    layers = model.config.linear_layers
    rebuild, params = split_params(model)

    @jax.jit
    def gates(params, batch, key):
        copy, seen = rebuild(params), []
        # unrolled and without remat, so that what is seen belongs to this very trace
        copy.config = dataclasses.replace(copy.config, scan_layers=False, remat=False)
        for layer in layers:
            attention: Any = copy.blocks[layer].attention
            attention.on_gate = seen.append
        flow_loss(
            copy,
            batch["video"],
            batch["label"],
            batch["caption"] if copy.config.caption_dim else None,
            key,
            null_label=copy.config.classes,
            config=flow or FlowConfig(),
        )
        return jnp.stack([gate.mean() for gate in seen])

    return average_gates(layers, lambda batch, key: gates(params, dict(batch), key), batches, seed)


def average_gates(
    layers: tuple[int, ...],
    gates: Callable[[Batch, Key[Array, ""]], Array],
    batches: Iterable[Batch],
    seed: int,
) -> dict[int, float]:
    """Returns the mean gate of each layer's linear branch over batches, of any model.

    Args:
      layers: of the model that have a branch.
      gates: the mean gate of each of them in one batch; the key draws times and noise.
      batches: of what the model is trained on.
      seed: of the keys.

    Raises:
      ValueError: no layer has a branch, or there is no batch.
    """
    if not layers:
        raise ValueError("expected a model with linear branches, got linear_layers ()")
    key = jax.random.key(seed)
    found = [
        np.asarray(gates(batch, jax.random.fold_in(key, number)))
        for number, batch in enumerate(batches)
    ]
    if not found:
        raise ValueError("expected at least one batch of videos, got none")
    return dict(zip(layers, np.mean(found, axis=0).tolist(), strict=True))


def check_share(share: float) -> None:
    """Raises `ValueError` for a share of the branches that is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"expected share in [0, 1], got {share}")


def kept_layers(
    layers: tuple[int, ...], gates: Mapping[int, float], share: float
) -> tuple[int, ...]:
    """Returns the layers that keep their linear branch when those of the smallest gates go.

    Args:
      layers: that have one.
      gates: the mean gate of each.
      share: of the branches that go, rounded to whole ones.

    Raises:
      ValueError: the share is not in [0, 1], or the gates are not those of the layers.
    """
    check_share(share)
    if set(gates) != set(layers):
        raise ValueError(f"expected gates of the layers {layers}, got {tuple(sorted(gates))}")
    rising = sorted(gates, key=lambda layer: gates[layer])
    idle = rising[: math.floor(share * len(rising) + 0.5)]
    return tuple(layer for layer in layers if layer not in idle)


def drop_branches(
    config: VideoDiTConfig, params: Params, gates: Mapping[int, float], share: float = 0.2
) -> tuple[VideoDiTConfig, Params]:
    """Returns a model without the linear branches of the smallest gates.

    Args:
      config: of the model.
      params: its parameters.
      gates: from `mean_gates`.
      share: of the branches that go, rounded to whole ones; the paper drops about a fifth.

    Raises:
      ValueError: the share is not in [0, 1], or the gates are not those of the model's branches.

    Reference: SALAD (arXiv 2601.16515).
    """
    kept = kept_layers(config.linear_layers, gates, share)
    idle = set(config.linear_layers).difference(kept)
    gone = tuple(f"blocks.{layer}{end}" for layer in idle for end in _BRANCH)
    config = dataclasses.replace(config, linear_layers=kept)
    return config, {name: value for name, value in params.items() if name not in gone}
