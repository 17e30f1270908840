"""The R step on any device: `attend` with a group a key block."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..attend.xla import attend
from ..block_sizes import BlockSizes
from .step import RStep


def r_step(
    qt: Float[Array, "g M n d"],
    k: Float[Array, "g M b d"],
    values: tuple[Float[Array, "g M b _"], ...],
    *,
    scale: float,
    keys: Bool[Array, "g M b"] | None = None,
    entropy_gradient: bool = False,
    block_sizes: BlockSizes,
) -> RStep:
    """Plain attention of `qt[k]` on block k with values `[K, V]`; `cL` by the identity.

    The logits are linear in K, so the entropy needs no pass of its own: `sum_i R x = qt . aL`.
    """

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    def whole(x: Array) -> Array:
        return x.reshape(*k.shape[:2], *x.shape[1:])

    (al, *ys), lse = attend(
        flat(qt), flat(k), (flat(k), *map(flat, values)),
        scale=scale, mask=None if keys is None else flat(keys),
        gains=(scale, *(1.0 for _ in values)), block_sizes=block_sizes,
    )  # fmt: skip
    al, lse = whole(al.astype(k.dtype)), whole(lse)
    cl = jnp.sum(qt.astype(lse.dtype) * al.astype(lse.dtype), axis=-1) - lse
    if keys is not None:
        cl = jnp.where(keys.any(-1, keepdims=True), cl, 0)  # lse is -inf there, and unused
    if not entropy_gradient:
        cl = jax.lax.stop_gradient(cl)
    ys = tuple(whole(y.astype(v.dtype)) for y, v in zip(ys, values, strict=True))
    return RStep(al, ys, cl, lse)
