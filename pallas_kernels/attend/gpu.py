"""`attend` on a Hopper GPU; the gradient by cuDNN, with a mask by a kernel of ours.

The products of the backward pass are five for one value, by cuDNN as by a kernel of ours, whose
speed is not known. Where cuDNN can't take it (masked keys, values of another width than the keys, a
machine without it), ours does; where neither can, that of "xla", which computes everything again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..block_sizes import BlockSizes
from ..gpu import cudnn as library
from ..gpu.checks import check
from ..gpu.order import by_entry, from_entries
from ..numerics import MASKED
from . import cudnn, xla
from .gpu_backward import softmax_rows_backward, unserved
from .gpu_forward import softmax_rows

Part = tuple[tuple[Float[Array, "g n _"], ...], Float[Array, "g n"]]


def attend(
    q: Float[Array, "g n d"],
    k: Float[Array, "g s d"],
    values: tuple[Float[Array, "g s _"], ...],
    *,
    scale: float,
    bias: Float[Array, "g s"] | None = None,
    mask: Bool[Array, "g s"] | None = None,
    gains: tuple[float, ...] | None = None,
    known: Part | None = None,
    entries: int = 1,
    block_sizes: BlockSizes,
) -> Part:
    """`(outs, lse)` of softmax attention of groups of rows.

        lse[g,n] = logsumexp_s (scale q . k) ;  out = gain * sum_s exp(x - lse) values

    `known` is the result, where a caller kept it from an earlier forward pass: nothing is computed
    then, but the gradient is still that of the attention. `entries` says of how many entries of a
    batch the groups are the heads; it changes only where arrays lie.

    Keys of a false `mask` have no weight, and a row without any other gets zeros and -inf.

    Raises:
        NotImplementedError: for a dtype or a size that the kernel cannot serve, for a bias, and
            where there is no Hopper GPU.
    """
    check(q, k, *values)
    if bias is not None:
        raise NotImplementedError("the GPU kernel of attention takes no bias")
    gains = tuple(gains or (1.0,) * len(values))
    known = jax.lax.stop_gradient(known)
    return _attend(float(scale), gains, entries, block_sizes, q, k, tuple(values), mask, known)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(scale, gains, entries, block_sizes, q, k, values, mask, known):
    del block_sizes
    if known is not None:
        return known
    bias = None if mask is None else jnp.where(mask, 0.0, MASKED)
    outs, lse, _ = softmax_rows(
        *_by_entry((q, k, values, bias), entries),
        scale=scale, gains=gains, shared=False, entropy=False, name="attend",
    )  # fmt: skip
    return jax.tree.map(from_entries, (tuple(outs), lse))


def _by_entry(arrays: Any, entries: int) -> Any:
    return jax.tree.map(lambda x: by_entry(x, entries), arrays)


def _forward(scale, gains, entries, block_sizes, q, k, values, mask, known):
    part: Any = _attend(scale, gains, entries, block_sizes, q, k, values, mask, known)
    return part, (q, k, values, mask, part)


def _backward(scale, gains, entries, block_sizes, saved: Any, gradient: Any):
    q, k, values, mask, (outs, lse) = saved
    settings: Any = {"scale": scale, "gains": gains}
    by_library = mask is None and not library.unserved(by_entry(q, entries), k, values)
    if by_library or not unserved(k, values, **settings, shared=False):
        *arrays, mask = _by_entry((q, k, values, outs, lse, *gradient, mask), entries)
        if by_library:
            found = cudnn.backward(*arrays, **settings)
        else:
            found = softmax_rows_backward(
                *arrays, **settings, shared=False, name="attend_backward", mask=mask
            )
        return (*jax.tree.map(from_entries, found), None, None)

    def again(q, k, values):
        outs, lse = xla.attend(q, k, values, mask=mask, **settings, block_sizes=block_sizes)
        return tuple(out.astype(v.dtype) for out, v in zip(outs, values, strict=True)), lse

    _, pullback = jax.vjp(again, q, k, values)
    return (*pullback(gradient), None, None)


_attend.defvjp(_forward, _backward)
