"""Guided attention with its blocks chosen: an exact part and a Monarch part, merged."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.l_step import xla as l_xla

from . import checks
from .block_sparse import top_blocks
from .dispatch import Backend, Implementation, dispatch
from .grid import Tiling
from .guided_gap import curvature_gap, monarch_settings
from .heads import by_heads, dense_part
from .methods import VMonarch
from .monarch import monarch_factors
from .parts import Part, merge_attention, with_rows
from .video import token_rows

# Largest Monarch block, in tokens, that goes to the block-sparse kernel.
KERNEL_BLOCK = 256


def attend_chosen(
    method: VMonarch,
    exact_blocks: int,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads value_dim"],
    cut: Tiling,
    indices: Int[Array, "batch heads query_blocks exact_blocks"] | None,
    *,
    implementation: Implementation = None,
    block_sizes: Any = None,
) -> Part:
    """Guided attention with given exact blocks; `None`: those of mass times curvature."""
    settings, sizes = monarch_settings(method, query), checks.block_sizes_of(block_sizes)
    frames = checks.frames_of(method.recompute_frames, cut.grid)
    exactly = {"scale": settings["scale"], "block_sizes": sizes}
    _, m, b = cut.sizes

    def heads(backend: Backend, q: Any, k: Any, v: Any, indices: Any) -> Part:
        if len(frames) == cut.grid.frames:
            return dense_part(backend, q, k, v, None, **exactly)
        lead = q.shape[:2]
        # One tile: [z, h, 1, m, b, d] as groups of [m, b, d].
        q4, k4, v4 = (cut.split(x).reshape(-1, m, b, x.shape[-1]) for x in (q, k, v))
        on = {**settings, "backend": backend, "block_sizes": sizes}
        qt, r = monarch_factors(q4, k4, v4, None, None, **on)
        if indices is None:
            known = jax.lax.stop_gradient((q4, qt, k4, r.al, r.cl))
            gap = curvature_gap(*known, **exactly)
            indices, _ = top_blocks(gap, exact_blocks)
        else:  # heads are the third axis, as `by_heads` wants it
            indices = indices.swapaxes(1, 2).reshape(-1, m, exact_blocks)
        left = np.flatnonzero(~dense_blocks(cut, frames))
        exact = _exact_part(backend, q4, k4, v4, indices, left, **exactly)
        left_out = jnp.put_along_axis(
            jnp.zeros((*indices.shape[:2], m), bool), indices, True, axis=-1, inplace=False
        )
        # The TPU's L step has no room for a mask of pairs; XLA's serves on any device.
        last = l_xla.last if backend.name == "pallas_tpu" else backend.l_last
        out, lse = last(q4, r.al, r.cl, r.ys[0], left_out=left_out, block_sizes=sizes)
        part = merge_attention([exact, Part(out.astype(v.dtype), lse)])
        part = (x.reshape(*lead, 1, m, b, -1) for x in part)
        out, lse = (cut.join(x) for x in part)
        part = Part(out, lse[..., 0])
        if not frames:
            return part
        rows = token_rows(frames, cut.grid)
        dense = dense_part(backend, q[:, :, rows], k, v, None, **exactly)
        return with_rows(part, rows, dense)

    scores = cut.scores + len(frames) * cut.grid.frame_tokens * cut.grid.tokens
    scores += m * exact_blocks * b * b
    masks = None if indices is None else indices.swapaxes(1, 2)
    arrays = (query, key, value)

    return dispatch(
        implementation,
        lambda backend: by_heads(
            heads, arrays, masks, scores=scores, backend=backend, block_sizes=sizes
        ),
    )


def _exact_part(
    backend: Backend,
    q: Float[Array, "g m b d"],
    k: Float[Array, "g m b d"],
    v: Float[Array, "g m b e"],
    indices: Int[Array, "g m r"],
    rows: Int[np.ndarray, " rows"],
    *,
    scale: float,
    block_sizes: BlockSizes,
) -> Part:
    """Exact attention of the query blocks `rows` on their key blocks; nothing for the others."""
    groups, m, b, _ = q.shape
    keep = indices.shape[-1]
    if b <= KERNEL_BLOCK and backend.block_sparse is not None:
        counts = np.zeros(m, np.int32)
        counts[rows] = keep
        flat = (x.reshape(groups, m * b, x.shape[-1]) for x in (q, k, v))
        with contextlib.suppress(NotImplementedError):  # then dense attention's kernel serves
            out, lse = backend.block_sparse(
                *flat, indices, jnp.broadcast_to(counts, (groups, m)),
                block=b, length=m * b, scale=scale, block_sizes=block_sizes,
            )  # fmt: skip
            return Part(out.reshape(groups, m, b, -1), lse.reshape(groups, m, b))
    # Long blocks fill the dense kernel by themselves, and need not suit the block-sparse one: their
    # key blocks are laid side by side, r times k and v.
    chosen = indices[:, rows]

    def beside(x: Any) -> Any:
        x = jnp.take_along_axis(x[:, None], chosen[..., None, None], axis=2)
        return x.reshape(groups * len(rows), keep * b, x.shape[-1])

    (out,), lse = backend.attend(
        q[:, rows].reshape(-1, *q.shape[2:]), beside(k), (beside(v),),
        scale=scale, block_sizes=block_sizes,
    )  # fmt: skip
    whole = jnp.zeros((groups, m, b, v.shape[-1]), v.dtype)
    nothing = jnp.full((groups, m, b), -jnp.inf, lse.dtype)
    out = out.astype(v.dtype).reshape(groups, len(rows), b, -1)
    return Part(whole.at[:, rows].set(out), nothing.at[:, rows].set(lse.reshape(groups, -1, b)))


def dense_blocks(cut: Tiling, frames: tuple[int, ...]) -> Bool[np.ndarray, " m"]:
    """The query blocks whose rows are all recomputed densely: exact blocks would serve nobody."""
    rows = np.zeros((cut.grid.tokens, 1), bool)
    rows[token_rows(frames, cut.grid)] = True
    return np.asarray(cut.split(rows, numpy=True))[0].all((1, 2))
