"""A rule for `vmap` of calls that have none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..varying import varying


def flat_vmap(function: Callable[..., tuple[Array, ...]], *arrays: Array) -> Any:
    """`function` of arrays; under `vmap` the mapped axis joins the first one of each."""

    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> Any:
        return function(*arrays)

    @call.def_vmap
    def mapped(size: int, batched: Any, *arrays: Array) -> tuple[Any, Any]:
        whole = [
            x if there else jnp.broadcast_to(x, (size, *x.shape))
            for x, there in zip(arrays, batched, strict=True)
        ]
        joined = [x.reshape(-1, *x.shape[2:]) for x in whole]
        results = flat_vmap(function, *joined)
        apart = tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)
        return apart, (True,) * len(apart)

    return varying(call(*arrays), arrays)
