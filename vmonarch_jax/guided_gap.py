"""Where Monarch attention is most wrong: the gap of each pair of a query and a key block.

    gap[l,k] = sum_j exp(lse_true[l,j,k] - lse) - exp(F[l,j,k] - lse) >= 0

with `lse_true` the log-sum-exp of row `(l, j)` over key block k, `F` what Monarch has for it, and
`lse` the row's dense one. F is a tangent plane of the convex `lse_true`, hence the sign. Over k it
sums to `sum_j (1 - exp(-KL))` of the rows' divergences, and making a set of blocks exact takes
exactly their gaps away from it: the largest ones are the best choice.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.numerics import accumulator, precision
from vmonarch_jax.pallas_kernels.varying import varying

from . import checks
from .dispatch import Backend, Implementation, dispatch
from .grid import Tiling
from .heads import by_heads, dense_part
from .methods import VMonarch
from .monarch import monarch_factors
from .parts import Part


def dense_gap(
    method: VMonarch,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads value_dim"],
    cut: Tiling,
    *,
    implementation: Implementation = None,
    block_sizes: Any = None,
) -> tuple[Part, Float[Array, "batch heads query_blocks key_blocks"]]:
    """Dense attention, and the gap of `method` in every pair of its blocks."""
    settings, sizes = monarch_settings(method, query), checks.block_sizes_of(block_sizes)
    exactly = {"scale": settings["scale"], "block_sizes": sizes}
    _, m, b = cut.sizes

    def call(plain: Backend) -> tuple[Part, Any]:
        def heads(backend: Backend, q: Any, k: Any, v: Any, masks: Any) -> tuple[Part, Any]:
            del masks
            part, lead = dense_part(backend, q, k, v, None, **exactly), q.shape[:2]
            known = jax.lax.stop_gradient((q, k, part.lse[..., None]))
            q, k, lse = (cut.split(x).reshape(-1, m, b, x.shape[-1]) for x in known)
            # No gradient, so nothing for a backend that keeps results to keep.
            mass = _dense_mass(plain, q, k, lse[..., 0], **exactly)
            on = {**settings, "backend": plain, "block_sizes": sizes}
            _, r = monarch_factors(q, k, None, None, None, **on)
            gap = mass - monarch_mass(q, r.al, r.cl, lse[..., 0], block_sizes=sizes)
            return part, gap.reshape(*lead, m, m)

        arrays, scores = (query, key, value), cut.grid.tokens**2
        return by_heads(heads, arrays, None, scores=scores, backend=plain, block_sizes=sizes)

    part, gap = dispatch(implementation, call)
    return part, jax.lax.stop_gradient(gap.swapaxes(1, 2))


def _dense_mass(
    backend: Backend,
    q: Float[Array, "g m b d"],
    k: Float[Array, "g m b d"],
    lse: Float[Array, "g m b"],
    *,
    scale: float,
    block_sizes: BlockSizes,
) -> Float[Array, "g m m"]:
    """The dense weight of every pair of blocks: `vm.block_mass`, in blocks of any size."""
    groups, m, b, d = q.shape
    q, lse = q.reshape(groups, m * b, d), lse.reshape(groups, m * b)
    if backend.block_mass is not None:
        with contextlib.suppress(NotImplementedError):  # then dense attention's kernel serves
            return backend.block_mass(
                q, k.reshape(q.shape), lse,
                block=b, length=m * b, scale=scale, block_sizes=block_sizes,
            )  # fmt: skip

    def one(k: Any) -> Any:  # the log-sum-exp over one key block; one column of values is little
        _, own = backend.attend(q, k, (k[..., :1],), scale=scale, block_sizes=block_sizes)
        return jnp.exp(own - lse).reshape(groups, m, b).sum(-1)

    return jnp.moveaxis(jax.lax.map(one, k.swapaxes(0, 1)), 0, -1)


def monarch_settings(method: VMonarch, query: Any) -> dict[str, Any]:
    """What `monarch_factors` wants of a method value."""
    return {
        "steps": method.steps,
        "c_r_floor": method.c_r_floor,
        "entropy_gradient": method.entropy_gradient,
        "scale": checks.scale_of(method.scale, query.shape[-1]),
    }


def monarch_mass(
    q: Float[Array, "g m n d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    lse: Float[Array, "g m n"],
    *,
    block_sizes: BlockSizes,
) -> Float[Array, "g m M"]:
    """`sum_j exp(F[l,j,k] - lse[l,j])`: the weight that Monarch puts on every pair of blocks."""

    def mass(q: Any, al: Any, cl: Any, lse: Any) -> Any:
        return jnp.exp(_logits(q, al, cl) - lse[..., None]).sum(2)

    return _over_positions(mass, block_sizes, q, al, cl, lse)


def curvature_gap(
    q: Float[Array, "g m n d"],
    qt: Float[Array, "g M n d"],
    k: Float[Array, "g M b d"],
    al: Float[Array, "g M n d"],
    cl: Float[Array, "g M n"],
    *,
    scale: float,
    block_sizes: BlockSizes,
) -> Float[Array, "g m M"]:
    """A guess of the gap from what the R step has: mass times curvature.

        sum_j softmax_k F[l,j,k] . 1/2 scale^2 |q[l,j] - qt[k,j]|^2 tr(C[k,j]) / d

    The second-order term of `lse_true - F` is `1/2 x^T C x` with `x = scale (q - qt)` and C the
    covariance of the keys under R. Here C is taken for a multiple of the identity, and its trace
    for `mean_i |K[k,i]|^2 - |sum_i R K|^2`: keys of a block have nearly one length, always so
    after QK-norm. Over `sampled_positions` alone, which choose as well as all of them; then the two
    products cost half of one of an L step.
    """
    some = sampled_positions(q.shape[2])
    q, qt, al, cl = (x[:, :, some] for x in (q, qt, al, cl))
    wide = accumulator(q.dtype)
    squares = jnp.square(k.astype(wide)).sum(-1).mean(-1)[..., None]  # [g, M, 1]
    mean = jnp.square(al.astype(wide)).sum(-1) / scale**2
    spread = jnp.maximum(squares - mean, 0) * (scale**2 / (2 * q.shape[-1]))  # [g, M, n]

    def guess(q: Any, qt: Any, al: Any, cl: Any, spread: Any) -> Any:
        weights = jax.nn.softmax(_logits(q, al, cl), axis=-1)
        of_q, of_qt = (jnp.square(x.astype(wide)).sum(-1) for x in (q, qt))
        # Rounding can bring a distance of nothing below zero.
        far = of_q[..., None] + of_qt.swapaxes(1, 2)[:, None] - 2 * _dot(q, qt)
        return (weights * jnp.maximum(far, 0) * spread.swapaxes(1, 2)[:, None]).sum(2)

    return _over_positions(guess, block_sizes, q, qt, al, cl, spread)


def sampled_positions(b: int) -> slice:
    """Every fourth position of a block, or more of them where fewer than four would be left."""
    stride = max(1, min(4, b // 4))
    return slice(stride // 2, None, stride)


def _logits(q: Any, al: Any, cl: Any) -> Float[Array, "g m n M"]:
    return _dot(q, al) - cl.swapaxes(1, 2)[:, None]


def _dot(x: Any, y: Any) -> Float[Array, "g m n M"]:
    wide, exact = accumulator(x.dtype), precision(x.dtype)
    return jnp.einsum("gljd,gkjd->gljk", x, y, precision=exact, preferred_element_type=wide)


def _over_positions(
    function: Callable[..., Float[Array, "g m M"]], block_sizes: BlockSizes, *arrays: Any
) -> Float[Array, "g m M"]:
    """The sum of `function` over chunks of positions, the third axis of every array."""
    groups, rows, length = arrays[0].shape[:3]
    blocks = arrays[1].shape[1]
    most = max(1, min(length, block_sizes.scores() // (groups * rows * blocks)))
    size = max(n for n in range(1, most + 1) if length % n == 0)
    if size == length:
        return function(*arrays)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=2)

    def add(total: Any, start: Any) -> Any:
        return total + function(*(cut(x, start) for x in arrays)), None

    zeros = varying(jnp.zeros((groups, rows, blocks), accumulator(arrays[0].dtype)), arrays)
    return jax.lax.scan(add, zeros, jnp.arange(0, length, size))[0]
