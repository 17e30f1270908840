"""The mean gates of a tuned Wan model's linear branches, which say what can be dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...flow import FlowConfig
from ...params import split_params
from ...salad import average_gates
from ..config import WanConfig
from ..sharding import Sharding
from ..transformer import Methods, WanTransformer
from .loss import noised, times_of


def mean_gates(
    model: WanTransformer,
    config: WanConfig,
    batches: Iterable[dict[str, Any]],
    empty: Float[Array, "length text_dim"],
    *,
    attention: Methods,
    part: str = "transformer",
    flow: FlowConfig | None = None,
    first_frame_share: float = 0.0,
    seed: int = 0,
    sharding: Sharding | None = None,
) -> dict[int, float]:
    """Returns the mean gate of each layer's linear branch over batches of videos.

    Videos are noised as in tuning. A gate is that of the whole model at work: what stands before a
    layer has its branches and the attention method.

    Args:
      model: the transformer, tuned, with its adapters merged.
      config: of the whole model.
      batches: of cached clips, as `CachedClips` gives them, with the batch in front.
      empty: text states of a sample that loses its caption.
      attention: the method, or methods, that the model is used with.
      part: "transformer", or "transformer_2": the expert of low noise.
      flow: how times are drawn; `None`: with the model's shift, as in tuning by default.
      first_frame_share: share of samples that are given their first frame (TI2V-5B).
      seed: of times and noise.
      sharding: where parameters and activations lie on a mesh, or `None`: one device.

    Raises:
      ValueError: the model has no linear branch, or there is no batch.

    Example:
      gates = mean_gates(model, found.config, batches, empty, attention=vm.Salad())
      config, params = drop_linear_branches(model.config, split_params(model)[1], gates)
    """
    rebuild, params = split_params(model)
    flow = FlowConfig(shift=config.shift) if flow is None else flow
    span = times_of(config, part)

    @jax.jit
    def gates(params, batch, key):
        x, time, text, _, _ = noised(
            batch, empty, key, flow=flow, span=span, first_frame_share=first_frame_share
        )
        image = batch.get("image")
        found = rebuild(params).gates(x, time, text, image, attention=attention, sharding=sharding)
        return jnp.mean(found, axis=0)

    return average_gates(
        model.config.linear_layers, lambda batch, key: gates(params, batch, key), batches, seed
    )
