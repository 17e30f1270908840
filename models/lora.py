"""Low-rank adapters (LoRA) as changes of parameters, which the model itself knows nothing of."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from .params import Params


def init_adapters(
    params: Params, kernels: Mapping[str, int], rank: int, key: Key[Array, ""]
) -> Params:
    """Returns new adapters, `X.lora_a` and `X.lora_b` for a kernel `X.kernel`.

    Formula: `kernel + A B`, with `A [in, rank]` uniform within one over the root of `in`, and
    `B [rank, out]` zero, as in PEFT; so nothing changes at the start. A kernel that is several
    projections side by side has such a pair for each, A beside A and B below B.

    Args:
      params: by name, with these kernels `[in, parts * out]` among them.
      kernels: parts of each kernel, by name.
      rank: columns of A, of each part.
      key: draws A.

    Raises:
      ValueError: the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"expected rank >= 1, got {rank}")
    adapters = {}
    for number, (name, parts) in enumerate(sorted(kernels.items())):
        inputs, outputs = params[name].shape
        draw = jax.random.uniform(
            jax.random.fold_in(key, number),
            (inputs, parts * rank),
            minval=-(inputs**-0.5),
            maxval=inputs**-0.5,
        )
        stem = name.removesuffix(".kernel")
        adapters[f"{stem}.lora_a"] = draw
        adapters[f"{stem}.lora_b"] = jnp.zeros((parts * rank, outputs // parts))
    return adapters


def merge_adapters(params: Params, adapters: Params) -> Params:
    """Returns the parameters with the adapters' products added to their kernels."""
    merged = dict(params)
    for name, a in adapters.items():
        if not name.endswith(".lora_a"):
            continue
        stem = name.removesuffix(".lora_a")
        kernel, b = params[f"{stem}.kernel"], adapters[f"{stem}.lora_b"]
        parts = kernel.shape[1] // b.shape[1]
        a, b = a.reshape(len(a), parts, -1), b.reshape(parts, -1, b.shape[1])
        update = jnp.einsum("ipr,pro->ipo", a, b).reshape(kernel.shape)
        merged[f"{stem}.kernel"] = kernel + update.astype(kernel.dtype)
    return merged
