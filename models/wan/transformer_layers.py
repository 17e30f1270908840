"""Linear maps and norms of the Wan transformer, and where its arrays are placed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import vmonarch_jax as vm
from vmonarch_jax.memory import Step

from ..params import Model
from .weights.entry import Entry

T = TypeVar("T")


class Placement(Protocol):
    """Where the arrays of a forward pass live; on a mesh, `sharding.Sharding`."""

    def constrain(self, x: Array, *logical: str | None) -> Array:
        """`x`, placed by one logical name, or `None`, for each of its axes."""
        ...

    def gather(self, module: Model, entries: Iterable[Entry], under: str = "") -> Model:
        """`module` with its parameters laid out for computing; `under` is before their names."""
        ...

    def attend(
        self, method: Any, q: Array, k: Array, v: Array, grid: Any, state: Any = None,
        step: Step | None = None,
    ) -> Any:  # fmt: skip
        """Attention of `[batch, seq, heads, head_dim]` arrays; `grid=None`: on other keys.

        With a state `(out, new state)`.
        """
        ...

    def constrain_states(self, states: T) -> T:
        """States of all layers, `[layers, batch, heads, ...]`, placed as attention wants them."""
        ...


class OneDevice:
    """The `Placement` of no mesh at all."""

    def constrain(self, x: Array, *logical: str | None) -> Array:
        """`x` itself."""
        del logical
        return x

    def gather(self, module: Model, entries: Iterable[Entry], under: str = "") -> Model:
        """`module` itself."""
        del entries, under
        return module

    def attend(
        self, method: Any, q: Array, k: Array, v: Array, grid: Any, state: Any = None,
        step: Step | None = None,
    ) -> Any:  # fmt: skip
        """What the method says."""
        if grid is None:
            return method(q, k, v)
        out, after = vm.attend(method, q, k, v, grid=grid, state=state, step=step)
        return out if state is None else (out, after)

    def constrain_states(self, states: T) -> T:
        """The states themselves."""
        return states


def kernel(rngs: nnx.Rngs, shape: Sequence[int], inputs: int, param_dtype: Any) -> nnx.Param:
    """A random kernel, uniform, of variance one over `inputs`; stored weights replace it."""
    draw = jax.random.uniform(rngs.params(), tuple(shape), jnp.float32, -1, 1)
    return nnx.Param((draw * (3 / inputs) ** 0.5).astype(param_dtype))


class Linear(nnx.Module):
    """`x @ kernel + bias` in the dtype of `x`; the last axis of `x` becomes `outputs`.

    Args:
      inputs: width of `x`.
      outputs: one axis or several, so that a head or a part needs no split afterwards.
    """

    def __init__(
        self, inputs: int, *outputs: int, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
    ) -> None:
        self.kernel = kernel(rngs, (inputs, *outputs), inputs, param_dtype)
        self.bias = nnx.Param(jnp.zeros(outputs, param_dtype))

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        """The map of the last axis."""
        return jnp.tensordot(x, as_dtype(x, self.kernel), 1, precision=exact(x)) + as_dtype(
            x, self.bias
        )


class ToHeads(nnx.Module):
    """A projection of tokens that writes heads-major, as attention kernels read."""

    def __init__(self, dim: int, heads: int, head_dim: int, *, rngs: nnx.Rngs, param_dtype: Any):
        self.kernel = kernel(rngs, (dim, heads, head_dim), dim, param_dtype)
        self.bias = nnx.Param(jnp.zeros((heads, head_dim), param_dtype))

    def __call__(
        self, x: Float[Array, "batch seq dim"]
    ) -> Float[Array, "batch heads seq head_dim"]:
        """The heads of each token, in the dtype of `x`."""
        heads = jax.lax.platform_dependent(
            x, as_dtype(x, self.kernel), cuda=by_tokens, default=by_heads
        )
        return heads + as_dtype(x, self.bias)[:, None]


def by_heads(
    x: Float[Array, "batch seq dim"], kernel: Float[Array, "dim heads head_dim"]
) -> Float[Array, "batch heads seq head_dim"]:
    """The heads of each token, by a product that may write them heads-major."""
    # Each video has the weights to itself, else a TPU writes a head of all videos together, and
    # copies them apart for the kernels.
    weights = jnp.broadcast_to(kernel, (len(x), *kernel.shape))
    return jnp.einsum("znc,zchd->zhnd", x, weights, precision=exact(x))


def by_tokens(
    x: Float[Array, "batch seq dim"], kernel: Float[Array, "dim heads head_dim"]
) -> Float[Array, "batch heads seq head_dim"]:
    """The same by a product that writes token-major, and its axes under other names.

    Kernels of a GPU read token-major. For the other product XLA may transpose the kernels of all
    layers there, 2 GiB each in the 14B model.
    """
    return jnp.tensordot(x, kernel, 1, precision=exact(x)).swapaxes(1, 2)


class FromHeads(nnx.Module):
    """The projection of all heads of a token back to the residual stream."""

    def __init__(self, heads: int, head_dim: int, dim: int, *, rngs: nnx.Rngs, param_dtype: Any):
        self.kernel = kernel(rngs, (heads, head_dim, dim), heads * head_dim, param_dtype)
        self.bias = nnx.Param(jnp.zeros(dim, param_dtype))

    def __call__(
        self, x: Float[Array, "batch seq heads head_dim"]
    ) -> Float[Array, "batch seq dim"]:
        """The update of each token, in the dtype of `x`."""
        # Heads before channels, as they lie: einsum would sum in the order of their letters, which
        # costs XLA on a GPU a transpose.
        tokens = jnp.tensordot(x, as_dtype(x, self.kernel), ((2, 3), (0, 1)), precision=exact(x))
        return tokens + as_dtype(x, self.bias)


class HeadsNorm(nnx.Module):
    """RMS norm of a token's heads taken together, with weights, in float32."""

    def __init__(self, heads: int, head_dim: int, eps: float, *, param_dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((heads, head_dim), param_dtype))
        self.eps = eps

    def __call__(
        self, x: Float[Array, "batch heads seq head_dim"]
    ) -> Float[Array, "batch heads seq head_dim"]:
        """`x / rms(x) * scale`; the mean is over heads and their channels."""
        x = x.astype(jnp.float32)
        mean = jnp.square(x).mean((1, 3), keepdims=True)
        return x * jax.lax.rsqrt(mean + self.eps) * self.scale[...].astype(jnp.float32)[:, None]


class LayerNorm(nnx.Module):
    """Layer norm with weights, in float32."""

    def __init__(self, dim: int, eps: float, *, param_dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))
        self.bias = nnx.Param(jnp.zeros(dim, param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
        """`layer_norm(x) * scale + bias`."""
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return layer_norm(x, self.eps) * scale + bias


def layer_norm(x: Float[Array, "*rows dim"], eps: float) -> Float[Array, "*rows dim"]:
    """Layer norm without weights, in float32.

    The variance is `mean(x**2) - mean(x)**2`: both means are sums over x as it comes, which a TPU
    adds up while it makes x; one of the distances to the mean would read x again.
    """
    x = x.astype(jnp.float32)
    mean, square = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
    variance = jnp.maximum(square - jnp.square(mean), 0)  # a rounding below zero is zero
    return (x - mean) * jax.lax.rsqrt(variance + eps)


def as_dtype(x: Array, parameter: nnx.Param) -> Array:
    """The parameter in the dtype of `x`."""
    return parameter[...].astype(x.dtype)


def exact(x: Array) -> jax.lax.Precision | None:
    """Float32 means float32: the default precision of a TPU would round it to bfloat16."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
