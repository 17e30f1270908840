"""Classifier-free guidance: one call on a doubled batch, or two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def guided(
    velocity: Callable[..., Float[Array, "batch *shape"]],
    inputs: tuple[Any, ...],
    text: Float[Array, "batch text_tokens text_dim"],
    negative: Float[Array, "batch text_tokens text_dim"] | None,
    guidance: float | Float[Array, ""],
    *,
    batched: bool = True,
) -> Float[Array, "batch *shape"]:
    """The velocity under classifier-free guidance: `v(negative) + g (v(text) - v(negative))`.

    Args:
      velocity: the model, called as `velocity(*inputs, text)`.
      inputs: noised latents, times and whatever else each sample of the batch has; trees of arrays
        whose first axis is the batch, `None` where there is nothing.
      text: states of the prompt.
      negative: states of the negative prompt; `None` for no guidance, and half the cost.
      guidance: g.
      batched: one call on a doubled batch; else two calls, in half the memory.
    """
    if negative is None:
        return velocity(*inputs, text)
    if batched:
        doubled = jax.tree.map(lambda array: jnp.concatenate([array, array]), inputs)
        both = velocity(*doubled, jnp.concatenate([text, negative]))
        wanted, unwanted = jnp.split(both, 2)
    else:
        wanted, unwanted = velocity(*inputs, text), velocity(*inputs, negative)
    return unwanted + guidance * (wanted - unwanted)
