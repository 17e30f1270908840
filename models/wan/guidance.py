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
    memory: tuple[Any, ...] | None = None,
) -> Any:
    """The velocity under classifier-free guidance: `v(negative) + g (v(text) - v(negative))`.

    Args:
      velocity: the model, called as `velocity(*inputs, text)`.
      inputs: noised latents, times and whatever else each sample of the batch has; trees of arrays
        whose first axis is the batch, `None` where there is nothing.
      text: states of the prompt.
      negative: states of the negative prompt; `None` for no guidance, and half the cost.
      guidance: g.
      batched: one call on a doubled batch; else two calls, in half the memory.
      memory: what the model remembers, for each of its calls here; `velocity` then takes it as
        `memory=` and returns a pair with that of the next step.

    Returns:
      The velocity; with a memory, also that of each call.
    """

    def call(n, inputs, text):
        if memory is None:
            return velocity(*inputs, text), None
        return velocity(*inputs, text, memory=memory[n])

    if negative is None:
        v, after = call(0, inputs, text)
        return v if memory is None else (v, (after,))
    if batched:
        doubled = jax.tree.map(lambda array: jnp.concatenate([array, array]), inputs)
        both, *after = call(0, doubled, jnp.concatenate([text, negative]))
        wanted, unwanted = jnp.split(both, 2)
    else:
        results = call(0, inputs, text), call(1, inputs, negative)
        (wanted, unwanted), after = zip(*results, strict=True)
    v = unwanted + guidance * (wanted - unwanted)
    return v if memory is None else (v, tuple(after))
