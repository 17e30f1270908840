"""Monarch attention of one query tile: the alternating updates, on one page.

A Monarch matrix `A[(l,j),(k,i)] = L[j,l,k] R[k,j,i]` with row-stochastic factors stands in for
`softmax(s Q K^T)`. Softmax is the maximiser of `<A, s Q K^T> + H(A)` over row-stochastic A; over
Monarch matrices each factor has a closed form given the other, and the two are updated in turn.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes

from .dispatch import Backend
from .parts import Part


def monarch_tile(
    q: Float[Array, "m b d"],
    k: Float[Array, "M b d"],
    v: Float[Array, "M b e"],
    queries: Bool[Array, "m b"] | None,
    keys: Bool[Array, "M b"] | None,
    *,
    steps: int,
    c_r_floor: float,
    entropy_gradient: bool,
    scale: float,
    backend: Backend,
    block_sizes: BlockSizes,
) -> Part:
    """`(out, lse)` of `m` query blocks on `M` key blocks of `b` positions each.

    One iteration is an R step and an L step:

        R step   x[k,j,i] = s qt[k,j] . K[k,i] ;  R = softmax_i x ;  lse[k,j] = logsumexp_i x
                 aL[k,j]  = s sum_i R[k,j,i] K[k,i] ;  Y[k,j] = sum_i R[k,j,i] V[k,i]
                 cL[k,j]  = sum_i R log R = qt[k,j] . aL[k,j] - lse[k,j]
        L step   F[l,j,k] = q[l,j] . aL[k,j] - cL[k,j] ;  L[j,l,:] = softmax_k F
                 middle:  qt[k,j] = sum_l L[j,l,k] q[l,j] / max(sum_l L[j,l,k], floor)
                 last:    out[l,j] = sum_k L[j,l,k] Y[k,j] ;  lse[l,j] = logsumexp_k F

    It starts from `L = I`, which makes the mean query of key block k the query block of the same
    place in its own tile: `M` is a whole number of tiles of `m` blocks. `queries` and `keys` say
    which positions are real (`None`: all). A padded query weighs nothing in the means, a masked
    key draws no attention, and a key block without any key is left out of L.
    """
    tiles = k.shape[0] // q.shape[0]
    key_blocks = None if keys is None else keys.any(-1)
    # A padded or masked query starts nothing either: what it holds must not matter.
    first = q if queries is None else jnp.where(queries[..., None], q, 0)
    qt = jnp.tile(first, (tiles, 1, 1))
    for _ in range(steps - 1):
        al, cl, _ = _r_step(qt, k, (), keys, scale, entropy_gradient, backend, block_sizes)
        qt = backend.l_middle(
            q, al, cl,
            floor=c_r_floor, queries=queries, key_blocks=key_blocks, block_sizes=block_sizes,
        ).astype(k.dtype)  # fmt: skip
    al, cl, (y,) = _r_step(qt, k, (v,), keys, scale, entropy_gradient, backend, block_sizes)
    out, lse = backend.l_last(q, al, cl, y, key_blocks=key_blocks, block_sizes=block_sizes)
    return Part(out.astype(v.dtype), lse)


def _r_step(qt, k, values, keys, scale, entropy_gradient, backend, block_sizes):
    """`aL`, `cL` and the averages Y of `values`: plain attention of `qt[k]` on block k."""
    gains = (scale, *(1.0 for _ in values))
    (al, *y), lse = backend.attend(
        qt, k, (k, *values), scale=scale, mask=keys, gains=gains, block_sizes=block_sizes
    )
    # Rounded to the dtype that the L step multiplies in, and the entropy taken from the rounded
    # value: then F = lse + (q - qt) . aL stays the tangent plane, exact at q = qt, whatever the
    # rounding.
    al = al.astype(k.dtype)
    # The identity: the logits are linear in K, so sum_i R x = qt . aL needs no pass of its own.
    cl = jnp.sum(qt.astype(lse.dtype) * al.astype(lse.dtype), axis=-1) - lse
    if keys is not None:
        cl = jnp.where(keys.any(-1, keepdims=True), cl, 0)  # lse is -inf there, and unused
    if not entropy_gradient:
        cl = jax.lax.stop_gradient(cl)
    return al, cl, tuple(value.astype(v.dtype) for value, v in zip(y, values, strict=True))
