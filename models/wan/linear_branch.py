"""SALAD's linear branch beside a Wan model's self-attention, and how a model gets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import vmonarch_jax as vm

from ..params import Params
from ..salad import kept_layers
from .config import TransformerConfig
from .embeddings import rotate
from .keys_transformer import transformer_entries
from .sharding import Sharding
from .transformer_layers import Placement, as_dtype, exact

#: What the names of a branch's parameters begin with.
BRANCH = "blocks.attn.linear."


class LinearBranch(nnx.Module):
    """A gated linear attention that sees every token, to be added to a sparse one's output.

    Formula, with `linear = vm.linear_attention(q, k, v, rotate=rotate)` of q and k after their norm
    and before they are turned, and `gate(x) = sigmoid(mean_n x[n] . w + b)`:
    `gate(x) * concat_heads(linear) W`, cut into heads again. W, w and b start at zero, so a new
    branch adds nothing. It is the branch of `vm.nn.SaladAttention`.

    Tokens that are split over a mesh's `context` are summed by the compiler: it reduces a state of
    `head_dim x head_dim` a head, a mean key a head and a mean token between the devices.

    Reference: SALAD (arXiv 2601.16515), section 3.
    """

    def __init__(self, config: TransformerConfig, *, param_dtype: Any) -> None:
        dim = config.dim
        self.kernel = nnx.Param(jnp.zeros((config.heads, config.head_dim, dim), param_dtype))
        self.gate = Gate(dim, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        q: Float[Array, "batch heads seq head_dim"],
        k: Float[Array, "batch heads seq head_dim"],
        v: Float[Array, "batch heads seq head_dim"],
        rope: tuple[Array, Array],
        place: Placement,
    ) -> Float[Array, "batch seq heads head_dim"]:
        """What is added to the heads of each token, in the dtype of `x`."""

        def turn(features: Array) -> Array:
            return rotate(features.swapaxes(1, 2), *rope).swapaxes(1, 2)

        heads = (
            place.constrain(a.astype(x.dtype), "batch", "heads", "seq", None) for a in (q, k, v)
        )
        # Token-major in name: XLA puts the turns into the products.
        linear = vm.linear_attention(*(a.swapaxes(1, 2) for a in heads), rotate=turn)
        linear = place.constrain(linear, "batch", "seq", "heads", None)
        kernel = as_dtype(x, self.kernel)
        out = jnp.einsum("znhd,hdc->znc", linear, kernel, precision=exact(x))
        out = place.constrain(out, "batch", "seq", None).reshape(linear.shape)
        out = place.constrain(out, "batch", "seq", "heads", None)
        return (self.gate(x)[..., None, None] * out).astype(x.dtype)


class Gate(nnx.Module):
    """The share of the linear branch that is let through, from the mean token."""

    def __init__(self, dim: int, *, param_dtype: Any) -> None:
        self.kernel = nnx.Param(jnp.zeros((dim, 1), param_dtype))
        self.bias = nnx.Param(jnp.zeros(1, param_dtype))

    def __call__(self, x: Float[Array, "batch seq dim"]) -> Float[Array, "batch 1"]:
        """One number in (0, 1) for each sample, in float32."""
        mean = x.mean(1, dtype=jnp.float32)
        logit = jnp.matmul(mean, as_dtype(mean, self.kernel), precision=exact(mean))
        return jax.nn.sigmoid(logit + as_dtype(mean, self.bias))


def with_linear_layers(config: TransformerConfig, layers: Iterable[int]) -> TransformerConfig:
    """The transformer with branches in these layers, beside those that have one.

    Raises:
      ValueError: there is no such layer.
    """
    both = tuple(sorted({*config.linear_layers, *layers}))
    return dataclasses.replace(config, linear_layers=both)


def add_linear_branches(
    config: TransformerConfig,
    params: Params,
    layers: Iterable[int] | None = None,
    placement: Sharding | None = None,
) -> tuple[TransformerConfig, Params]:
    """Returns a transformer with linear branches in more layers, which gives what it gave before.

    Args:
      config: of the transformer.
      params: its parameters, as published weights give them or with branches already.
      layers: that get a branch, beside those that have one; `None`: all.
      placement: where new parameters lie on a mesh, or `None`: on the default device.

    Raises:
      ValueError: there is no such layer.

    Example:
      found = detect("Wan2.1-T2V-1.3B-Diffusers")
      params = split_params(load_part(found, "transformer"))[1]
      config, params = add_linear_branches(found.config.transformer, params)
    """
    known = config.linear_layers
    config = with_linear_layers(config, range(config.layers) if layers is None else layers)
    new = sorted({*config.linear_layers}.difference(known))
    if not new:
        return config, params
    entries = [entry for entry in transformer_entries(config) if entry.name.startswith(BRANCH)]
    places = {} if placement is None else placement.param_shardings(entries)
    dtype, branches = params["blocks.attn.out.kernel"].dtype, {}
    for entry in entries:
        if entry.name in params:
            # what a layer without a branch has in the stack was never used
            branches[entry.name] = params[entry.name].at[jnp.array(new)].set(0)
            continue
        # as they are loaded: the gate is float32
        kind = jnp.float32 if ".gate." in entry.name else dtype
        branches[entry.name] = jnp.zeros(entry.full_shape, kind, device=places.get(entry.name))
    return config, params | branches


def drop_linear_branches(
    config: TransformerConfig, params: Params, gates: Mapping[int, float], share: float = 0.2
) -> tuple[TransformerConfig, Params]:
    """Returns a transformer without the linear branches of the smallest gates.

    They are no longer computed. Their parameters stay in the stack of all layers, where nothing
    reads them, as long as another layer has a branch.

    Args:
      config: of the transformer.
      params: its parameters.
      gates: the mean gate of each branch (`finetune.gates.mean_gates`).
      share: of the branches that go, rounded to whole ones; the paper drops about a fifth.

    Raises:
      ValueError: the share is not in [0, 1], or the gates are not those of the branches.

    Reference: SALAD (arXiv 2601.16515).
    """
    left = kept_layers(config.linear_layers, gates, share)
    config = dataclasses.replace(config, linear_layers=left)
    if left:
        return config, params
    return config, {name: value for name, value in params.items() if not name.startswith(BRANCH)}
