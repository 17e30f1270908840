"""What the study measures of an attention method, on q, k, v and on samples."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnames=("method", "grid"))
def attention_errors(q, k, v, dense, *, method: Any, grid: Any) -> tuple[Any, Any]:
    """Relative output error and mean KL of each head, both `[batch, heads]`.

    `dense` is the exact `(out, lse)`: with it the KL of a row, `lse_dense - lse`
    (`vm.attention_gap`), costs no second dense pass.
    """
    out, lse = method(q, k, v, grid=grid, return_lse=True)
    exact, exact_lse = dense
    kl = jnp.maximum(exact_lse - lse, 0).mean(axis=1)
    return relative_errors(out, exact), kl


def relative_errors(out: Any, exact: Any) -> Any:
    """`|out - exact| / |exact|` of each head, `[batch, heads]`, for `[batch, seq, heads, dim]`."""
    length = functools.partial(jnp.linalg.norm, axis=(1, 3))
    return length(out - exact) / length(exact)


def by_layer(x: Any, levels: int, videos: int) -> Any:
    """`[level * layer * video, heads]` as `[level, layer, heads]`, averaged over videos."""
    x = np.asarray(x)
    return x.reshape(levels, -1, videos, x.shape[-1]).mean(axis=2)


def psnr(video: Any, reference: Any) -> float:
    """Mean over videos of the peak signal-to-noise ratio in dB; values in [-1, 1]."""
    error = np.square(np.clip(video, -1, 1) - np.clip(reference, -1, 1)).mean(axis=(1, 2, 3, 4))
    with np.errstate(divide="ignore"):
        return float(np.mean(10 * np.log10(4 / error)))


def motion(video: Any) -> Any:
    """Mean absolute change from each frame to the next, `[frames - 1]`."""
    return np.abs(np.diff(np.asarray(video), axis=1)).mean(axis=(0, 2, 3, 4))


def jumps(video: Any) -> float:
    """How much more changes into every second frame than within the pairs; 1: no difference.

    Two frames a block would show here: a seam after every second frame.
    """
    change = motion(video)
    return float(change[1::2].mean() / change[0::2].mean()) if len(change) > 1 else 1.0
