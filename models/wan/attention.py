"""The two attentions of a Wan block: of the video on itself, and on text and image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

import vmonarch_jax as vm

from .config import TransformerConfig
from .embeddings import rotate
from .linear_branch import LinearBranch
from .transformer_layers import FromHeads, HeadsNorm, Placement, ToHeads

#: Attention of token-major q, k, v: the layer's method on the grid, and what it remembers then.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class _Projections(nnx.Module):
    """What both attentions have: q, k and v, the norms of q and k, and the way back."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any) -> None:
        dim, heads, size = config.dim, config.heads, config.head_dim
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.q = ToHeads(dim, heads, size, **options)
        self.k = ToHeads(dim, heads, size, **options)
        self.v = ToHeads(dim, heads, size, **options)
        self.q_norm = HeadsNorm(heads, size, config.eps, param_dtype=param_dtype)
        self.k_norm = HeadsNorm(heads, size, config.eps, param_dtype=param_dtype)
        self.out = FromHeads(heads, size, dim, **options)


class SelfAttention(_Projections):
    """Attention of the video's tokens on each other, under any method.

    Formula: `q, k = rotate(norm(q)), rotate(norm(k))`, `out = attend(q, k, v)[0]`; the norm is over
    all heads of a token together. Where the configuration has `linear_layers`, SALAD's branch is
    added before the projection: `out + linear(x, norm(q), norm(k), v)`.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any) -> None:
        super().__init__(config, rngs=rngs, param_dtype=param_dtype)
        self.has_branch = bool(config.linear_layers)
        if self.has_branch:
            self.linear = LinearBranch(config, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        rope: tuple[Array, Array],
        attend: Attend,
        place: Placement,
        branch: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Any]:
        """The update of the residual stream, in the dtype of `x`, and what `attend` remembers.

        `branch` says whether the linear branch, if there is one, is used; `None`: it is.
        """
        # Norm and turn are float32, each rounded once, as in Diffusers.
        q, k = (a.astype(x.dtype) for a in (self.q_norm(self.q(x)), self.k_norm(self.k(x))))
        v = self.v(x)
        with jax.named_scope("rotation"):
            turned = [rotate(a, *rope).astype(x.dtype) for a in (q, k)]
        heads = (place.constrain(a, "batch", "heads", "seq", None) for a in (*turned, v))
        # Methods take token-major arrays and turn them heads-major: XLA cancels both turns.
        out, memory = attend(*(a.swapaxes(1, 2) for a in heads))
        if not self.has_branch:
            return self.out(out), memory

        def linear() -> Array:
            return self.linear(x, q, k, v, rope, place)

        def nothing() -> Array:
            return jnp.zeros_like(out)

        beside = linear() if branch is None else jax.lax.cond(branch, linear, nothing)
        return self.out(out + beside), memory


class CrossAttention(_Projections):
    """Dense attention of the video's tokens on the text, plus that on the image where there is one.

    Formula: `out(softmax(q k_text) v_text + softmax(q k_image) v_image)`: two softmaxes, summed.
    No mask: the zeros behind a short text are attended to, as the models were trained.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any) -> None:
        super().__init__(config, rngs=rngs, param_dtype=param_dtype)
        if config.image_dim:
            dim, heads, size = config.dim, config.heads, config.head_dim
            options = {"rngs": rngs, "param_dtype": param_dtype}
            self.image_k = ToHeads(dim, heads, size, **options)
            self.image_v = ToHeads(dim, heads, size, **options)
            self.image_k_norm = HeadsNorm(heads, size, config.eps, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        text: Float[Array, "batch length dim"],
        image: Float[Array, "batch n dim"] | None,
        place: Placement,
    ) -> Float[Array, "batch seq dim"]:
        """The update of the residual stream, in the dtype of `x`."""
        q = self.q_norm(self.q(x)).astype(x.dtype)
        q = place.constrain(q, "batch", "heads", "seq", None)
        out = _attend(place, q, self.k_norm(self.k(text)), self.v(text))
        if image is not None:
            keys, values = self.image_k_norm(self.image_k(image)), self.image_v(image)
            out = out + _attend(place, q, keys, values)
        return self.out(out)


def _attend(
    place: Placement,
    q: Float[Array, "batch heads seq head_dim"],
    k: Float[Array, "batch heads keys head_dim"],
    v: Float[Array, "batch heads keys head_dim"],
) -> Float[Array, "batch seq heads head_dim"]:
    k, v = (place.constrain(x.astype(q.dtype), "batch", "heads", "text", None) for x in (k, v))
    return place.attend(vm.Dense(), q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), None)
