"""The R step by cuDNN's flash attention: its values are K, then V, and the entropy is free.

Two calls where a kernel of our own takes one, because cuDNN wants values as wide as the keys.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..attend.cudnn import added, backward
from ..block_sizes import BlockSizes
from ..gpu import cudnn
from ..gpu.order import by_frame, by_group
from ..numerics import scaled
from .step import RStep


def r_step(
    qt: Float[Array, "g M n d"],
    k: Float[Array, "g M b d"],
    values: tuple[Float[Array, "g M b d"], ...],
    *,
    scale: float,
    keys: Bool[Array, "g M b"] | None = None,
    entropy_gradient: bool = False,
    known: RStep | None = None,
    entries: int = 1,
    unscaled: bool = False,
    block_sizes: BlockSizes,
) -> RStep:
    """Attention of `qt[k]` on block k with values K, then V; `cL` by the identity.

        lse = logsumexp_i (scale qt . K) ;  aL = scale R K ;  Y = R V ;  cL = qt . aL - lse

    `entries` says of how many entries of a batch the groups are the heads; it changes only where
    arrays lie. `unscaled`: aL is `R K`, for an L step that scales, which spares a pass over it.

    `known` is the result, where a caller kept it from an earlier forward pass: nothing is computed
    then, but the gradient is still that of the R step.

    Raises:
        NotImplementedError: for masked keys, or what else cuDNN can't do.
    """
    del block_sizes
    if keys is not None:
        raise NotImplementedError("takes no masked keys, and no blocks that do not divide the grid")
    cudnn.check(by_frame(qt, entries), k, tuple(values))
    known = jax.lax.stop_gradient(known)
    settings = float(scale), entropy_gradient, entries, unscaled
    step: Any = _r_step(*settings, qt, k, tuple(values), known)
    return step if entropy_gradient else step._replace(cl=jax.lax.stop_gradient(step.cl))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _r_step(scale, entropy_gradient, entries, unscaled, qt, k, values, known):
    del entropy_gradient
    if known is not None:
        return known
    qt, k, values = _by_frame((qt, k, values), entries)
    mean, lse = cudnn.forward(qt, k, k, scale)
    al = mean if unscaled else scaled(mean, scale)
    ys = tuple(cudnn.forward(qt, k, v, scale)[0] for v in values)
    cl = jnp.sum(qt.astype(lse.dtype) * al.astype(lse.dtype), axis=-1)
    cl = (cl * scale if unscaled else cl) - lse
    return _by_group(RStep(al, ys, cl, lse), entries)


def _by_frame(arrays: Any, entries: int) -> Any:
    return jax.tree.map(lambda x: by_frame(x, entries), arrays)


def _by_group(arrays: Any, entries: int) -> Any:
    return jax.tree.map(lambda x: by_group(x, entries), arrays)


def _forward(scale, entropy_gradient, entries, unscaled, qt, k, values, known):
    step = _r_step(scale, entropy_gradient, entries, unscaled, qt, k, values, known)
    return step, (qt, k, values, step)


def _backward(scale, entropy_gradient, entries, unscaled, saved: Any, gradient: RStep):
    return backward_of_step(scale, entropy_gradient, saved, gradient, entries, unscaled)


def backward_of_step(
    scale: float,
    entropy_gradient: bool,
    saved: Any,
    gradient: RStep,
    entries: int = 1,
    unscaled: bool = False,
    gradients: Callable[..., Any] | None = None,
) -> Any:
    """By the gradient of attention; that of cL enters through `cL = qt . aL - lse`.

    `gradients` is that of attention with values `[K | V]`, dk whole; `None`: by calls of cuDNN.
    """
    (qt, k, values, step), gradient = _by_frame((saved, gradient), entries)
    dal, dlse, through = gradient.al, gradient.lse, None
    if entropy_gradient:
        wide = gradient.cl[..., None] * (scale if unscaled else 1)
        dal = (dal + wide * qt.astype(wide.dtype)).astype(dal.dtype)
        through = wide * step.al.astype(wide.dtype)
        dlse = dlse - gradient.cl
    dq, dk, dvalues = (gradients or _by_calls)(
        qt, k, values, (step.al, *step.ys), step.lse, (dal, *gradient.ys), dlse,
        scale=scale, gains=(1.0 if unscaled else scale, *(1.0 for _ in values)),
    )  # fmt: skip
    if through is not None:
        dq = (dq + through).astype(qt.dtype)
    return (*_by_group((dq, dk, dvalues), entries), None)


def _by_calls(qt, k, values, *others, **settings):
    dq, dk, (dmean, *dvalues) = backward(qt, k, (k, *values), *others, **settings)
    return dq, added([dk, dmean]), tuple(dvalues)


_r_step.defvjp(_forward, _backward)
