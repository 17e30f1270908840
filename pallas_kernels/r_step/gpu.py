"""The R step on a Hopper GPU: one kernel with `[K | V]` as its values, and one for the gradient.

The latter makes 7 products of rows x keys x d, where cuDNN makes two calls of 5. Without V it is 5
by either: there cuDNN's goes first, because ours has not been timed. Each stands in where the other
can't take values or masked keys; where neither can, the gradient is that of "xla", which computes
everything again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..attend.gpu_backward import softmax_rows_backward, unserved
from ..attend.gpu_forward import softmax_rows
from ..block_sizes import BlockSizes
from ..gpu import cudnn as library
from ..gpu.checks import check
from ..gpu.order import by_frame, by_group
from ..numerics import MASKED, scaled
from . import cudnn, xla
from .step import RStep


def r_step(
    qt: Float[Array, "g M n d"],
    k: Float[Array, "g M b d"],
    values: tuple[Float[Array, "g M b _"], ...],
    *,
    scale: float,
    keys: Bool[Array, "g M b"] | None = None,
    entropy_gradient: bool = False,
    known: RStep | None = None,
    entries: int = 1,
    unscaled: bool = False,
    block_sizes: BlockSizes,
) -> RStep:
    """aL, Y, cL and the log-sum-exp of each row, from one reading of K and V.

        lse = logsumexp_i (scale qt . K) ;  aL = scale R K ;  Y = R V ;  cL = qt . aL - lse

    `known` is the result, where a caller kept it from an earlier forward pass: nothing is computed
    then, but the gradient is still that of the R step. `entries` says of how many entries of a
    batch the groups are the heads; it changes only where arrays lie. `unscaled`: aL is `R K`, for
    an L step that scales, which spares passes over its gradient. `keys` says which keys are real
    (`None`: all); a block without any has an aL and a Y of zeros.

    Raises:
        NotImplementedError: for a dtype or a size that the kernel cannot serve, and where there is
            no Hopper GPU.
    """
    check(qt, k, *values)
    known = jax.lax.stop_gradient(known)
    settings = float(scale), entropy_gradient, (entries, unscaled), block_sizes
    step: Any = _r_step(*settings, qt, k, tuple(values), keys, known)
    return step if entropy_gradient else step._replace(cl=jax.lax.stop_gradient(step.cl))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _r_step(scale, entropy_gradient, form, block_sizes, qt, k, values, keys, known):
    del entropy_gradient, block_sizes
    if known is not None:
        return known
    entries, unscaled = form
    bias = None if keys is None else jnp.where(keys, 0.0, MASKED)
    arrays = jax.tree.map(lambda x: by_frame(x, entries), (qt, k, values, bias))
    (al, *ys), lse, cl = softmax_rows(
        *arrays,
        scale=scale, gains=(1.0 if unscaled else scale, *(1.0 for _ in values)),
        shared=True, entropy=True, name="r_step",
    )  # fmt: skip
    step: Any = RStep(al, tuple(ys), cl, lse)  # pyright: ignore[reportArgumentType]
    step = jax.tree.map(lambda x: by_group(x, entries), step)
    if keys is None:
        return step
    some = keys.any(-1, keepdims=True)  # elsewhere the log-sum-exp is -inf, and unused
    return step._replace(cl=jnp.where(some, step.cl, 0))


def _forward(scale, entropy_gradient, form, block_sizes, qt, k, values, keys, known):
    step = _r_step(scale, entropy_gradient, form, block_sizes, qt, k, values, keys, known)
    return step, (qt, k, values, keys, step)


def _backward(scale, entropy_gradient, form, block_sizes, saved: Any, gradient: RStep):
    qt, k, values, keys, step = saved
    entries, unscaled = form
    gains = (1.0 if unscaled else scale, *(1.0 for _ in values))
    ours = not unserved(k, values, scale=scale, gains=gains, shared=True)
    by_library = keys is None and not library.unserved(by_frame(qt, entries), k, values)
    if ours or by_library:
        kernel = functools.partial(
            softmax_rows_backward, shared=True, name="r_step_backward",
            mask=None if keys is None else by_frame(keys, entries),
        )  # fmt: skip
        gradients = kernel if ours and (values or not by_library) else None
        saved = qt, k, values, step
        *found, _ = cudnn.backward_of_step(
            scale, entropy_gradient, saved, gradient, entries, unscaled, gradients
        )
        return *found, None, None

    def again(qt, k, values):
        step = xla.r_step(
            qt, k, values,
            scale=scale, keys=keys, entropy_gradient=entropy_gradient, block_sizes=block_sizes,
        )  # fmt: skip
        # Without a scale there is no aL to tell its average from, nor any use for one.
        return step._replace(al=scaled(step.al, 1 / (scale or 1))) if unscaled else step

    _, pullback = jax.vjp(again, qt, k, values)
    return (*pullback(gradient), None, None)


_r_step.defvjp(_forward, _backward)
