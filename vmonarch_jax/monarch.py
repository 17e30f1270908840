"""Monarch attention of query tiles: the alternating updates, on one page.

A Monarch matrix `A[(l,j),(k,i)] = L[j,l,k] R[k,j,i]` with row-stochastic factors stands in for
`softmax(s Q K^T)`. Softmax is the maximiser of `<A, s Q K^T> + H(A)` over row-stochastic A; over
Monarch matrices each factor has a closed form given the other, and the two are updated in turn.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.r_step.step import RStep

from .dispatch import Backend
from .parts import Part


def monarch_tiles(
    q: Float[Array, "g m n d"],
    k: Float[Array, "g M b d"],
    v: Float[Array, "g M b e"],
    queries: Bool[Array, "g m n"] | None,
    keys: Bool[Array, "g M b"] | None,
    *,
    steps: int,
    c_r_floor: float,
    entropy_gradient: bool,
    scale: float,
    backend: Backend,
    block_sizes: BlockSizes,
) -> Part:
    """`(out, lse)` of `m` query blocks of `n` positions on `M` key blocks of `b` keys each.

    One iteration is an R step and an L step:

        R step   x[k,j,i] = s qt[k,j] . K[k,i] ;  R = softmax_i x ;  lse[k,j] = logsumexp_i x
                 aL[k,j]  = s sum_i R[k,j,i] K[k,i] ;  Y[k,j] = sum_i R[k,j,i] V[k,i]
                 cL[k,j]  = sum_i R log R = qt[k,j] . aL[k,j] - lse[k,j]
        L step   F[l,j,k] = q[l,j] . aL[k,j] - cL[k,j] ;  L[j,l,:] = softmax_k F
                 middle:  qt[k,j] = sum_l L[j,l,k] q[l,j] / max(sum_l L[j,l,k], floor)
                 last:    out[l,j] = sum_k L[j,l,k] Y[k,j] ;  lse[l,j] = logsumexp_k F

    It starts from `L = I`, which makes the mean query of key block k the query block of the same
    place in its own tile: `M` is a whole number of tiles of `m` blocks. Positions never meet, so
    several query tiles are simply more positions, `n = tiles * b`, of the same key blocks.
    `queries` and `keys` say which tokens are real (`None`: all). A padded query weighs nothing in
    the means, a masked key draws no attention, and a key block without any key is left out of L.
    """
    _, r = monarch_factors(
        q, k, v, queries, keys,
        steps=steps, c_r_floor=c_r_floor, entropy_gradient=entropy_gradient, scale=scale,
        backend=backend, block_sizes=block_sizes,
    )  # fmt: skip
    key_blocks = None if keys is None else keys.any(-1)
    out, lse = backend.l_last(
        q, r.al, r.cl, r.ys[0], key_blocks=key_blocks, block_sizes=block_sizes
    )
    return Part(out.astype(v.dtype), lse)


def monarch_factors(
    q: Float[Array, "g m n d"],
    k: Float[Array, "g M b d"],
    v: Float[Array, "g M b e"] | None,
    queries: Bool[Array, "g m n"] | None,
    keys: Bool[Array, "g M b"] | None,
    *,
    steps: int,
    c_r_floor: float,
    entropy_gradient: bool,
    scale: float,
    backend: Backend,
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "g M n d"], RStep]:
    """The iterations of `monarch_tiles` up to the last R step: its mean queries and its result.

    All that is missing is the last L step. Without `v` there is no Y.
    """
    r_step = functools.partial(
        backend.r_step,
        scale=scale, keys=keys, entropy_gradient=entropy_gradient, block_sizes=block_sizes,
    )  # fmt: skip
    key_blocks = None if keys is None else keys.any(-1)
    # A padded or masked query starts nothing either: what it holds must not matter.
    first = q if queries is None else jnp.where(queries[..., None], q, 0)
    tiles = k.shape[1] // q.shape[1]
    qt = first if tiles == 1 else jnp.tile(first, (1, tiles, 1, 1))
    for _ in range(steps - 1):
        r = r_step(qt, k, ())
        qt = backend.l_middle(
            q, r.al, r.cl,
            floor=c_r_floor, queries=queries, key_blocks=key_blocks, block_sizes=block_sizes,
        ).astype(k.dtype)  # fmt: skip
    return qt, r_step(qt, k, () if v is None else (v,))
