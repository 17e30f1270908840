"""Low-rank adapters (LoRA) inside a Wan transformer: what is trained beside frozen weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ...params import Params
from ..transformer import WanTransformer
from ..transformer_layers import FromHeads, Linear, ToHeads, as_dtype, exact


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections of the blocks get an adapter, and how large.

    Formula: `y = x W + b + alpha / rank * (x A) B`, with `A [in, rank]` and `B [rank, out]`.

    Attributes:
      rank: columns of A.
      alpha: strength; `None`: the rank, which makes the factor 1.
      projections: names inside a block, or beginnings of them: "attn" (self-attention's q, k, v and
        out), "attn.q", "cross", "mlp_in", "mlp_out".

    Raises:
      ValueError: a number is out of range, or there are no projections.
    """

    rank: int = 32
    alpha: float | None = None
    projections: tuple[str, ...] = ("attn",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "projections", tuple(self.projections))
        if self.rank < 1:
            raise ValueError(f"expected rank >= 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"expected alpha > 0, got {self.alpha}")
        if not self.projections:
            raise ValueError("expected at least one projection, got none")

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Adapted(nnx.Module):
    """A projection with an adapter beside it; its own parameters keep their names.

    A starts uniform within one over the root of its inputs and B at zero, so that the model starts
    as it was, as in PEFT.

    Args:
      base: the projection, its parameters stacked along the layers.
      lora: the adapter's size.
      rngs: keys of A.
    """

    def __init__(self, base: Linear | ToHeads | FromHeads, lora: LoRA, *, rngs: nnx.Rngs) -> None:
        self.kernel, self.bias = base.kernel, base.bias
        self.kind = type(base)
        self.scale = lora.scale
        layers, *shape = base.kernel.shape
        axes = 2 if self.kind is FromHeads else 1
        inputs, outputs = math.prod(shape[:axes]), math.prod(shape[axes:])
        bound = inputs**-0.5
        draw = jax.random.uniform(
            rngs.params(), (layers, inputs, lora.rank), minval=-bound, maxval=bound
        )
        self.lora_a = nnx.Param(draw)
        self.lora_b = nnx.Param(jnp.zeros((layers, lora.rank, outputs)))

    def __call__(self, x: Array) -> Array:
        """What the projection gives, and the adapter's update of it, in the dtype of `x`."""
        # the projection's own code, on the parameters that are here under the names it knows
        base = self.kind.__call__(self, x)  # pyright: ignore[reportArgumentType]
        a, b, precision = as_dtype(x, self.lora_a), as_dtype(x, self.lora_b), exact(x)
        flat = x.reshape(*x.shape[:2], -1)
        low = jnp.matmul(flat, a, precision=precision) * self.scale
        if self.kind is ToHeads:
            b = b.reshape(len(b), *self.kernel.shape[-2:])
            return base + jnp.einsum("znr,rhd->zhnd", low, b, precision=precision)
        return base + jnp.matmul(low, b, precision=precision)


def projections_of(model: WanTransformer) -> tuple[str, ...]:
    """Names of the projections inside a block, such as "attn.q" and "mlp_in", sorted."""
    return tuple(
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(model.blocks)
        if isinstance(module, Linear | ToHeads | FromHeads)
    )


def chosen_projections(model: WanTransformer, wanted: Sequence[str]) -> tuple[str, ...]:
    """The projections that names, or beginnings of names, stand for.

    Raises:
      ValueError: a name stands for none.
    """
    known = projections_of(model)
    chosen: list[str] = []
    for word in wanted:
        found = [name for name in known if name == word or name.startswith(f"{word}.")]
        if not found:
            groups = [*dict.fromkeys(name.split(".")[0] for name in known if "." in name), *known]
            raise ValueError(f"expected projections of {', '.join(groups)}, got {word!r}")
        chosen += found
    return tuple(dict.fromkeys(chosen))


def adapt(model: WanTransformer, lora: LoRA, *, rngs: nnx.Rngs) -> WanTransformer:
    """Puts adapters into a model, in place, and returns it.

    Raises:
      ValueError: a projection is unknown.

    Example:
      model = nnx.eval_shape(lambda: adapt(WanTransformer(config, rngs=rngs), LoRA(), rngs=rngs))
    """
    for name in chosen_projections(model, lora.projections):
        *path, last = name.split(".")
        parent: Any = model.blocks
        for attribute in path:
            parent = getattr(parent, attribute)
        setattr(parent, last, Adapted(getattr(parent, last), lora, rngs=rngs))
    return model


def split_adapters(params: Params) -> tuple[Params, Params]:
    """`(adapters, base)`: the parameters of the adapters, and those that stay as they are."""
    ours = {name for name in params if name.endswith((".lora_a", ".lora_b"))}
    adapters = {name: params[name] for name in params if name in ours}
    return adapters, {name: params[name] for name in params if name not in ours}


def deltas_of(adapters: Params) -> dict[str, tuple[Array, Array]]:
    """A and B of each adapted kernel, as `save_lora` takes them."""
    return {
        f"{name.removesuffix('.lora_a')}.kernel": (a, adapters[f"{name.removesuffix('a')}b"])
        for name, a in adapters.items()
        if name.endswith(".lora_a")
    }
