"""MonarchAttention on a plain sequence of tokens."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import checks
from .dispatch import Backend, Implementation, dispatch
from .grid import positive_int
from .heads import by_heads, monarch_part
from .parts import Part


def monarch_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads value_dim"],
    *,
    block_size: int,
    steps: int = 2,
    key_mask: Bool[Array, "batch seq"] | None = None,
    pad: str = "post",
    c_r_floor: float = 0.0,
    entropy_gradient: bool = True,
    scale: float | None = None,
    implementation: Implementation = None,
    return_lse: bool = False,
    block_sizes: Any = None,
) -> Float[Array, "batch seq heads value_dim"] | Part:
    """MonarchAttention: a Monarch matrix over blocks of `block_size` consecutive tokens.

    The formulas are those of `vm.vmonarch_attention` with `l, k` counting blocks and `j, i`
    positions in a block. A sequence that is no multiple of `block_size` is padded.

    Args:
        query: `[batch, seq, heads, head_dim]`, any floating dtype; scores and sums are float32.
        key: as `query`.
        value: `[batch, seq, heads, value_dim]`.
        block_size: tokens of a block, b.
        steps: iterations, each an R step and an L step.
        key_mask: `[batch, seq]`, True for tokens that count. A masked token draws no attention
            and, as a query, weighs nothing in the mean queries; its own row is still computed.
            A row without any key gives zeros and `lse = -inf`.
        pad: "post" pads after the sequence, "pre" before it.
        c_r_floor: least attention mass by which a block's mean query is divided.
        entropy_gradient: whether gradients flow through the entropy `cL`.
        scale: of the logits; `None`: `head_dim**-0.5`.
        implementation: "reference", "xla", a sequence of names, or `None` for the best that
            works here.
        return_lse: also return the log-sum-exp.
        block_sizes: a `vm.BlockSizes`; changes the speed only.

    Returns:
        `out`, `[batch, seq, heads, value_dim]`, or the part `(out, lse)` with `lse`
        `[batch, seq, heads]` in float32.

    Raises:
        ValueError: if shapes, dtypes or options are wrong.
        NotImplementedError: if no named implementation can do the call.

    Example:
        >>> out = vm.monarch_attention(query, key, value, block_size=64)

    Reference: MonarchAttention (arXiv 2505.18698), algorithm 1. Its shift by
    `max(row maximum, eps)` underflows rows whose logits are all very negative; here the softmax
    is the plain stable one, and a block whose keys are all masked draws no attention.
    """
    query, key, value = checks.attention_inputs(query, key, value, same_length=True)
    batch, seq = query.shape[:2]
    size = positive_int("block_size", block_size)
    if pad not in ("pre", "post"):
        raise ValueError(f"`pad` must be 'pre' or 'post', got {pad!r}")
    key_mask = checks.mask_of("key_mask", key_mask, batch, seq)
    block_sizes = checks.block_sizes_of(block_sizes)
    settings = {
        "steps": checks.steps_of(steps),
        "c_r_floor": checks.finite("c_r_floor", c_r_floor, least=0),
        "entropy_gradient": bool(entropy_gradient),
        "scale": checks.scale_of(scale, query.shape[-1]),
        "block_sizes": block_sizes,
    }
    extra = -seq % size
    before, after = (extra, 0) if pad == "pre" else (0, extra)

    def blocks(x: Any) -> Any:
        """`[..., seq, d] -> [..., 1, blocks, block_size, d]`."""
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(before, after), (0, 0)])
        return x.reshape(*x.shape[:-2], 1, -1, size, x.shape[-1])

    mask = key_mask
    if mask is None and extra:
        mask = jnp.ones((batch, seq), bool)

    def part(backend: Backend) -> Part:
        def heads(backend: Backend, q: Any, k: Any, v: Any, mask: Any) -> Part:
            if mask is not None:
                mask = blocks(mask[..., None])[..., 0]
            cut = [blocks(x) for x in (q, k, v)]
            part = monarch_part(backend, cut[0], cut[1], cut[2], mask, mask, **settings)
            out = part.out.reshape(*part.out.shape[:2], -1, part.out.shape[-1])
            lse = part.lse.reshape(out.shape[:-1])
            return Part(out[:, :, before : before + seq], lse[:, :, before : before + seq])

        scores = (seq + extra) * size
        on = {"backend": backend, "block_sizes": block_sizes}
        return by_heads(heads, (query, key, value), mask, scores=scores, **on)

    out, lse = dispatch(implementation, part)
    return Part(out, lse) if return_lse else out
