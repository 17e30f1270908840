"""Block-sparse attention: exact on chosen pairs of blocks of tokens, nothing elsewhere."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from . import checks
from .dispatch import Backend, Implementation, dispatch
from .grid import positive_int
from .parts import Part


class Blocks(NamedTuple):
    """Which key blocks each query block attends to, as a pytree of two arrays.

    Args:
        indices: `[batch, heads, query_blocks, budget]`, int32; distinct within a row. What stands
            behind the count of its row is ignored.
        counts: `[batch, heads, query_blocks]`, int32, each at most `budget`.
    """

    indices: Int[Array, "batch heads query_blocks budget"]
    counts: Int[Array, "batch heads query_blocks"]


def block_sparse_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads value_dim"],
    blocks: Blocks | Int[Array, "batch heads _ _"] | Bool[Array, "batch heads _ _"],
    block_size: int = 64,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    return_lse: bool = False,
    block_sizes: Any = None,
) -> Float[Array, "batch seq heads value_dim"] | Part:
    """Softmax attention of every query on the keys of the key blocks that its block is given.

        out[n] = sum_s softmax_s(scale q[n] . k[s]) v[s],  s in the key blocks of n's query block

    Blocks are runs of `block_size` tokens; the last one may be shorter. Matmul FLOPs a head:
    `2 block_size^2 (d + e)` for each kept pair of blocks. The result is a part: with its
    log-sum-exp it merges with attention on other keys, and is certified, as any other.

    Args:
        query: `[batch, seq, heads, head_dim]`.
        key: `[batch, keys, heads, head_dim]`; `keys` may differ from `seq`.
        value: `[batch, keys, heads, value_dim]`.
        blocks: a `vm.Blocks`, or its indices alone (all of them count), or a boolean map
            `[batch, heads, query_blocks, key_blocks]`, True where a pair is kept. Under `jit` a map
            is given the room of a full one, and `vm.Blocks` is leaner.
        block_size: tokens of a block.
        scale: of the logits; `None`: `head_dim**-0.5`.
        implementation: "reference", "xla", "pallas_tpu", a sequence of names, or `None` for the
            best that works here.
        return_lse: also return the log-sum-exp.
        block_sizes: a `vm.BlockSizes`; changes the speed only.

    Returns:
        `out`, `[batch, seq, heads, value_dim]`, or the part `(out, lse)` with `lse`
        `[batch, seq, heads]` in float32. A row without any key gives zeros and `lse = -inf`.

    Raises:
        ValueError: if shapes, dtypes or options are wrong, or (outside of `jit`, where they have
            values) a count or an index is out of range or an index comes twice in a row.
        NotImplementedError: if no named implementation can do the call.

    Example:
        >>> near = jnp.abs(jnp.arange(8)[:, None] - jnp.arange(8)) <= 1
        >>> near = jnp.broadcast_to(near, (batch, heads, 8, 8))
        >>> out = vm.block_sparse_attention(query, key, value, near, block_size=64)
    """
    query, key, value = checks.attention_inputs(query, key, value, same_length=False)
    cut = _Cut(query, key, positive_int("block_size", block_size))
    found = _blocks_of(blocks, cut)
    scale = checks.scale_of(scale, query.shape[-1])
    block_sizes = checks.block_sizes_of(block_sizes)
    flat = [x.reshape(-1, *x.shape[2:]) for x in found]

    def part(backend: Backend) -> Part:
        q, k, v = cut.rows(query), cut.keys(key), cut.keys(value)
        out, lse = _kernel(backend, "block_sparse")(
            q, k, v, *flat,
            block=cut.size, length=key.shape[1], scale=scale, block_sizes=block_sizes,
        )  # fmt: skip
        return Part(cut.tokens(out), cut.tokens(lse))

    out, lse = dispatch(implementation, part)
    return Part(out, lse) if return_lse else out


def block_mass(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    lse: Float[Array, "batch seq heads"],
    block_size: int = 64,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    block_sizes: Any = None,
) -> Float[Array, "batch heads query_blocks key_blocks"]:
    """The softmax weight in every pair of blocks, from a log-sum-exp that is already known.

        mass[p,c] = sum over n in query block p, s in key block c of exp(scale q[n] . k[s] - lse[n])

    With the dense log-sum-exp a row of blocks sums to its number of tokens. With one of another
    denoising step it is what AdaSpa calls its cached search. One pass over the keys; the scores of
    a chunk alone are ever held. No gradient flows through it: it is there to choose by.

    Args:
        query: `[batch, seq, heads, head_dim]`.
        key: `[batch, keys, heads, head_dim]`.
        lse: `[batch, seq, heads]`.
        block_size: tokens of a block; the last one may be shorter.
        scale: of the logits; `None`: `head_dim**-0.5`.
        implementation: as `vm.block_sparse_attention`.
        block_sizes: a `vm.BlockSizes`; changes the speed only.

    Returns:
        `[batch, heads, query_blocks, key_blocks]`, float32.

    Raises:
        ValueError: if shapes, dtypes or options are wrong.

    Example:
        >>> out, lse = vm.dense_attention(query, key, value, return_lse=True)
        >>> mass = vm.block_mass(query, key, lse, block_size=64)

    Reference: AdaSpa (arXiv 2502.21079), its search with cached log-sum-exps.
    """
    query, key, _ = checks.attention_inputs(query, key, key, same_length=False)
    lse = jnp.asarray(lse)
    if lse.shape != query.shape[:3]:
        raise ValueError(f"`lse` must be [batch, seq, heads] = {query.shape[:3]}, got {lse.shape}")
    cut = _Cut(query, key, positive_int("block_size", block_size))
    scale = checks.scale_of(scale, query.shape[-1])
    block_sizes = checks.block_sizes_of(block_sizes)
    query, key, lse = jax.lax.stop_gradient((query, key, lse))

    def mass(backend: Backend) -> Array:
        lines = cut.rows(lse[..., None], fill=jnp.inf)[..., 0]
        return _kernel(backend, "block_mass")(
            cut.rows(query), cut.keys(key), lines,
            block=cut.size, length=key.shape[1], scale=scale, block_sizes=block_sizes,
        )  # fmt: skip

    return cut.heads_of(dispatch(implementation, mass))


def dense_attention_mass(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads value_dim"],
    block_size: int = 64,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    block_sizes: Any = None,
) -> tuple[Array, Array, Array]:
    """Dense attention with its log-sum-exp and the mass of every pair of blocks.

    The same as `vm.dense_attention` followed by `vm.block_mass`, with the scores computed once
    where an implementation has a kernel for it.

    Args:
        query: `[batch, seq, heads, head_dim]`.
        key: `[batch, keys, heads, head_dim]`.
        value: `[batch, keys, heads, value_dim]`.
        block_size: tokens of a block; the last one may be shorter.
        scale: of the logits; `None`: `head_dim**-0.5`.
        implementation: as `vm.block_sparse_attention`.
        block_sizes: a `vm.BlockSizes`; changes the speed only.

    Returns:
        `(out, lse, mass)`, shaped as those two functions return them; no gradient through the mass.

    Raises:
        ValueError: if shapes, dtypes or options are wrong.

    Example:
        >>> out, lse, mass = vm.dense_attention_mass(query, key, value)
    """
    query, key, value = checks.attention_inputs(query, key, value, same_length=False)
    cut = _Cut(query, key, positive_int("block_size", block_size))
    scale = checks.scale_of(scale, query.shape[-1])
    block_sizes = checks.block_sizes_of(block_sizes)

    def call(backend: Backend) -> tuple[Array, Array, Array]:
        q, k, v = cut.rows(query), cut.keys(key), cut.keys(value)
        how: dict[str, Any] = {
            "block": cut.size, "length": key.shape[1], "scale": scale, "block_sizes": block_sizes,
        }  # fmt: skip
        if backend.attend_mass is not None:
            out, lse, mass = backend.attend_mass(q, k, v, rows=query.shape[1], **how)
            return cut.tokens(out), cut.tokens(lse), mass
        mask = jnp.broadcast_to(jnp.arange(k.shape[1]) < key.shape[1], k.shape[:2])
        (out,), lse = backend.attend(
            q, k, (v,), scale=scale, block_sizes=block_sizes,
            mask=None if k.shape[1] == key.shape[1] else mask,
        )  # fmt: skip
        real = jnp.arange(q.shape[1]) < query.shape[1]
        known = jax.lax.stop_gradient((q, k, jnp.where(real, lse, jnp.inf)))
        mass = _kernel(backend, "block_mass")(*known, **how)
        return cut.tokens(out.astype(value.dtype)), cut.tokens(lse), mass

    out, lse, mass = dispatch(implementation, call)
    return out, lse, jax.lax.stop_gradient(cut.heads_of(mass))


def top_blocks(
    scores: Float[Array, "*rows blocks"], keep: int, always: Sequence[int] = ()
) -> tuple[Int[Array, "*rows keep"], Int[Array, "*rows"]]:
    """The `keep` best blocks of every row, as the indices and counts of a `vm.Blocks`.

    Args:
        scores: `[..., blocks]`; of equal ones the lower index wins.
        keep: blocks of a row, those of `always` included.
        always: blocks that every row keeps, whatever their score.

    Returns:
        `(indices, counts)`: int32, in the order of the keys, so that a kernel walks forward.

    Raises:
        ValueError: if `keep` is not in `1..blocks`, or `always` does not fit.

    Example:
        >>> blocks = vm.Blocks(*vm.top_blocks(mass, keep=8))
    """
    blocks = scores.shape[-1]
    always = sorted({int(index) for index in always})
    if always and not 0 <= always[0] <= always[-1] < blocks:
        raise ValueError(f"`always` must hold blocks in 0..{blocks - 1}, got {tuple(always)}")
    if not max(1, len(always)) <= keep <= blocks:
        raise ValueError(f"`keep` must lie in {max(1, len(always))}..{blocks}, got {keep}")
    if always:
        scores = scores.at[..., jnp.array(always)].set(jnp.inf)
    _, indices = jax.lax.top_k(scores, keep)
    indices = jnp.sort(indices, axis=-1).astype(jnp.int32)
    return indices, jnp.full(scores.shape[:-1], keep, jnp.int32)


class _Cut:
    """How token-major arrays become groups of whole blocks for a kernel, and back."""

    def __init__(self, query: Array, key: Array, size: int) -> None:
        self.size = size
        self.batch, self.seq, self.heads = query.shape[:3]
        self.query_blocks, self.key_blocks = (-(-x.shape[1] // size) for x in (query, key))

    def rows(self, x: Array, fill: float = 0.0) -> Array:
        """`[batch, seq, heads, d] -> [groups, padded seq, d]`."""
        return self._groups(x, self.query_blocks, fill)

    def keys(self, x: Array) -> Array:
        """`[batch, keys, heads, d] -> [groups, padded keys, d]`."""
        return self._groups(x, self.key_blocks, 0.0)

    def _groups(self, x: Array, blocks: int, fill: float) -> Array:
        x = x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])
        more = blocks * self.size - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, more), (0, 0)), constant_values=fill) if more else x

    def tokens(self, x: Array) -> Array:
        """`[groups, padded seq, ...] -> [batch, seq, heads, ...]`."""
        return self.heads_of(x[:, : self.seq]).swapaxes(1, 2)

    def heads_of(self, x: Array) -> Array:
        """`[groups, ...] -> [batch, heads, ...]`."""
        return x.reshape(self.batch, self.heads, *x.shape[1:])


def _kernel(backend: Backend, name: str) -> Any:
    kernel = getattr(backend, name)
    if kernel is None:
        raise NotImplementedError(f"{backend.name!r} has no kernel for it")
    return kernel


def _blocks_of(blocks: Any, cut: _Cut) -> Blocks:
    """The caller's `blocks` as checked indices and counts of every batch entry and head."""
    lead = (cut.batch, cut.heads, cut.query_blocks)
    if not isinstance(blocks, Blocks):
        array: Any = blocks if isinstance(blocks, np.ndarray) else jnp.asarray(blocks)
        if array.dtype == bool:
            if array.shape != (*lead, cut.key_blocks):
                raise ValueError(
                    "a boolean `blocks` must be [batch, heads, query_blocks, key_blocks] = "
                    f"{(*lead, cut.key_blocks)}, got {array.shape}"
                )
            return _of_map(array)
        if array.ndim != 4:
            raise ValueError(
                "`blocks` must be a vm.Blocks, indices [batch, heads, query_blocks, budget] or a "
                f"boolean map [batch, heads, query_blocks, key_blocks], got {array.shape}"
            )
        blocks = Blocks(array, jnp.full(array.shape[:3], array.shape[3], jnp.int32))
    indices, counts = (jnp.asarray(x) for x in blocks)
    for name, array in (("indices", indices), ("counts", counts)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"`blocks.{name}` must be integers, got {array.dtype}")
    if indices.ndim != 4 or indices.shape[:3] != lead or not indices.shape[3]:
        raise ValueError(
            f"`blocks.indices` must be [batch, heads, query_blocks, budget] = {(*lead, 'any')}, "
            f"got {indices.shape}"
        )
    if counts.shape != lead:
        raise ValueError(
            f"`blocks.counts` must be [batch, heads, query_blocks] = {lead}, got {counts.shape}"
        )
    if not isinstance(indices, jax.core.Tracer) and not isinstance(counts, jax.core.Tracer):
        _check_values(np.asarray(indices), np.asarray(counts), cut.key_blocks)
    return Blocks(indices.astype(jnp.int32), counts.astype(jnp.int32))


def _of_map(keep: Any) -> Blocks:
    """The indices of a boolean map, in order, with room for the longest row."""
    room = keep.shape[-1]
    if not isinstance(keep, jax.core.Tracer):
        room = max(1, int(np.asarray(keep).sum(-1).max()))
    keep = jnp.asarray(keep)
    # A stable sort of "left out" brings the kept ones to the front in their order.
    indices = jnp.argsort(~keep, axis=-1, stable=True)[..., :room]
    return Blocks(indices.astype(jnp.int32), keep.sum(-1, dtype=jnp.int32))


def _check_values(indices: np.ndarray, counts: np.ndarray, key_blocks: int) -> None:
    """What only shows in the values: range, and blocks that come twice."""
    budget = indices.shape[-1]
    if counts.size and not 0 <= counts.min() <= counts.max() <= budget:
        raise ValueError(
            f"`blocks.counts` must lie in 0..{budget}, got {counts.min()}..{counts.max()}"
        )
    used = np.arange(budget) < counts[..., None]
    kept = indices[used]
    if kept.size and not 0 <= kept.min() <= kept.max() < key_blocks:
        raise ValueError(
            f"`blocks.indices` must lie in 0..{key_blocks - 1}, got {kept.min()}..{kept.max()}"
        )
    # Slots that are not used get numbers of their own, which equal nothing.
    lined = np.sort(np.where(used, indices, key_blocks + np.arange(budget)), axis=-1)
    if (lined[..., 1:] == lined[..., :-1]).any():
        raise ValueError("`blocks.indices` must be distinct within a row, got one twice")
