"""Block-sparse attention on a TPU, with its gradient, and block masses, also of dense attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attend.tpu import attend
from ..block_sizes import BlockSizes
from . import walk
from .tpu_forward import forward


def block_sparse(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    indices: Int[Array, "g p c"],
    counts: Int[Array, "g p"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"]]:
    """`(out, lse)`; a row without keys gives zeros and -inf. Differentiable in q, k and v.

    Raises:
        NotImplementedError: for a dtype, a size or a block that the kernels cannot serve.
    """
    walk.check(block, q, k, v)
    if 0 in indices.shape:
        raise NotImplementedError("TPU kernels take no empty arrays")
    return _attend((block, length, float(scale), block_sizes), q, k, v, indices, counts)


def block_mass(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    lse: Float[Array, "g n"],
    *,
    block: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> Float[Array, "g p blocks"]:
    """The mass of every pair of blocks; a padded row has an infinite `lse`. It has no gradient.

    Raises:
        NotImplementedError: for a dtype, a size or a block that the kernel cannot serve.
    """
    from .tpu_mass import masses

    walk.check(block, q, k)
    return masses(q, k, lse, block=block, length=length, scale=scale, block_sizes=block_sizes)


def attend_mass(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    v: Float[Array, "g s e"],
    *,
    block: int,
    rows: int,
    length: int,
    scale: float,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g n e"], Float[Array, "g n"], Float[Array, "g p blocks"]]:
    """Dense `(out, lse)` and the mass of its weights; only the first `rows` queries have any.

    One pass, or `attend` and `block_mass` where the masses of a few rows do not fit in VMEM. `out`
    and `lse` are differentiable in q, k and v; the mass has no gradient.

    Raises:
        NotImplementedError: for a dtype, a size or a block that the kernels cannot serve.
    """
    from .tpu_attend_mass import attend_masses

    walk.check(block, q, k, v)
    how: dict[str, Any] = {
        "block": block, "length": length, "scale": float(scale), "block_sizes": block_sizes,
    }  # fmt: skip
    known = mass = None
    try:
        out, lse, mass = attend_masses(*jax.lax.stop_gradient((q, k, v)), rows=rows, **how)
        known = (out,), lse
    except NotImplementedError:
        pass
    mask = jnp.broadcast_to(jnp.arange(k.shape[1]) < length, k.shape[:2])
    (out,), lse = attend(
        q, k, (v,), scale=scale, mask=None if k.shape[1] <= length else mask, known=known,
        block_sizes=block_sizes,
    )  # fmt: skip
    if mass is None:
        lines = jnp.where(jnp.arange(q.shape[1]) < rows, lse, jnp.inf)
        mass = block_mass(*jax.lax.stop_gradient((q, k, lines)), **how)
    return out, lse, mass


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, indices, counts):
    block, length, scale, sizes = static
    return forward(
        q, k, v, indices, counts, block=block, length=length, scale=scale, block_sizes=sizes
    )


def _forward(static, q, k, v, indices, counts):
    part: Any = _attend(static, q, k, v, indices, counts)
    out, lse = part
    return (out, lse), (q, k, v, indices, counts, out, lse)


def _backward(static, saved: Any, gradient: Any):
    from .tpu_backward import backward

    block, length, scale, sizes = static
    dq, dk, dv = backward(
        *saved, *gradient, block=block, length=length, scale=scale, block_sizes=sizes
    )
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)
