"""What a call would do: which implementation runs, why, and what it costs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vmonarch_jax.pallas_kernels.numerics import accumulator
from vmonarch_jax.pallas_kernels.tpu import chips, mode

from . import checks, flops, memory
from .dispatch import Implementation, attempts, dispatch
from .grid import VideoGrid, positive_int
from .methods import Dense, VMonarch
from .units import bytes_text


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a call, over one head of one batch entry.

    Args:
        name: under which it is launched.
        blocks: its block sizes, by name.
        flops: of its matmuls.
        bytes: that it moves between HBM and VMEM, re-reads counted.
        cycles: static cycles recorded for this shape on this chip; `None`: not recorded.
        vmem: bytes of VMEM recorded; `None`: not recorded.
    """

    name: str
    blocks: tuple[tuple[str, int], ...]
    flops: int
    bytes: int
    cycles: int | None
    vmem: int | None

    def __str__(self) -> str:
        words = [f"{self.flops:.3g} FLOPs", f"{bytes_text(self.bytes)} moved"]
        if self.cycles is not None:
            words.append(f"{self.cycles:,} cycles")
        if self.vmem is not None:
            words.append(f"{bytes_text(self.vmem)} of VMEM")
        words += [f"{name} {size}" for name, size in self.blocks]
        return f"{self.name}: " + ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `vm.explain` found; `str()` of it is the report.

    Args:
        method: the method value.
        grid: the token grid.
        implementation: the name of the implementation that runs.
        passed_over: `(name, reason)` of those tried before it.
        tiling: `(tiles, blocks in a tile, positions in a block)`; `None` for dense attention.
        flops: matmul FLOPs of the forward pass, all heads.
        dense_flops: the same of dense attention.
        qkvo_bytes: bytes of query, key, value and output, each once.
        score_bytes: bytes of the largest chunk of scores held at once; `None` where all of them
            are, or where the kernels keep none of them in memory.
        chip: the TPU chip that the kernels' blocks are for; `None` without kernels.
        kernels: the Pallas kernels of the call, in order.
        notes: one line each.
    """

    method: Any
    grid: VideoGrid
    implementation: str
    passed_over: tuple[tuple[str, str], ...]
    tiling: tuple[int, int, int] | None
    flops: int
    dense_flops: int
    qkvo_bytes: int
    score_bytes: int | None
    chip: str | None
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        frames, height, width = self.grid.shape
        lines = [
            f"{self.method}",
            f"grid            {frames} x {height} x {width} = {self.grid.tokens:,} tokens",
        ]
        if self.tiling is not None:
            tiles, blocks, positions = self.tiling
            lines.append(
                f"structure       {tiles} tile(s) of {blocks} blocks of {positions} tokens"
            )
        lines += [
            f"runs on         {self.implementation!r} ({jax.default_backend()})",
            *(f"  passed over   {name!r}: {reason}" for name, reason in self.passed_over),
            f"matmul FLOPs    {self.flops:.4g} forward, {self._against_dense()}",
            f"q, k, v, out    {bytes_text(self.qkvo_bytes)}",
        ]
        if self.score_bytes is not None:
            lines.append(f"scores at once  {bytes_text(self.score_bytes)} at most")
        if self.kernels:
            lines.append(f"kernels         for one head, on {self.chip}:")
            lines += [f"  {kernel}" for kernel in self.kernels]
        lines += [f"note            {note}" for note in self.notes]
        return "\n".join(lines)

    def _against_dense(self) -> str:
        count, dense = self.flops, self.dense_flops
        if count == dense:
            return "those of dense attention"
        if count < dense:
            return f"{dense / count:.2f}x fewer than dense ({dense:.4g})"
        return f"{count / dense:.2f}x those of dense ({dense:.4g})"


def explain(
    method: Any,
    grid: Any,
    *,
    heads: int = 12,
    head_dim: int = 128,
    batch: int = 1,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = None,
    block_sizes: Any = None,
) -> Explanation:
    """Which kernel runs for `method` on `grid`, why, and what it costs; nothing is computed.

    Args:
        method: a method value.
        grid: a `vm.VideoGrid` or `(frames, height, width)`, in tokens.
        heads: number of heads.
        head_dim: of query, key and value.
        batch: entries of the batch.
        dtype: of query, key and value.
        implementation: as in the call.
        block_sizes: as in the call.

    Returns:
        An `Explanation`; print it.

    Raises:
        ValueError: if an option is wrong.
        TypeError: if `method` is no method value.
        NotImplementedError: if no named implementation can do the call.

    Example:
        >>> print(vm.explain(vm.VMonarch(), vm.VideoGrid(21, 30, 52)))
    """
    grid = VideoGrid.of(grid)
    batch = positive_int("batch", batch)
    block_sizes = checks.block_sizes_of(block_sizes)
    size = jnp.dtype(dtype).itemsize
    count = batch * flops.attention(method, grid, heads=heads, head_dim=head_dim)
    # A joint sequence: text tokens beside the grid's.
    tokens = grid.tokens + getattr(method, "text_tokens", 0)
    dense = batch * flops.attention(Dense(), (1, 1, tokens), heads=heads, head_dim=head_dim)
    chosen = dispatch(implementation, lambda backend: backend)
    tried = attempts(implementation)
    before = tried[: [name for name, _, _ in tried].index(chosen.name)]
    passed = [(name, reason) for name, _, reason in before]
    notes, tiling = [], None
    if isinstance(method, VMonarch):
        cut = flops.tiling_of(method, grid)
        tiling = cut.sizes
        if cut.padded != grid.shape:
            notes.append(f"padded from {grid.shape} to {cut.padded} to fit whole blocks")
        frames = checks.frames_of(method.recompute_frames, grid)
        if frames:
            share = batch * 4 * len(frames) * grid.frame_tokens * grid.tokens * head_dim * heads
            notes.append(f"exact rows of {len(frames)} frame(s): {share / count:.0%} of the FLOPs")
    tell = getattr(method, "notes", None)
    if tell is not None:
        notes += tell(grid, heads=heads, head_dim=head_dim, batch=batch, dtype=dtype)
    if memory.remembers(method):
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "dtype": dtype}
        state = jax.eval_shape(lambda: memory.init_state(method, grid, **sizes))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        if held:
            notes.append(f"remembers {bytes_text(held)} a layer between denoising steps")
    if count >= dense and not isinstance(method, Dense):
        notes.append("no fewer FLOPs than dense attention: use vm.Dense() here")
    score_bytes, chip, kernels = None, None, ()
    if chosen.keeps:
        chip = chips.current().name
        kernels = _kernels(method, grid, head_dim, dtype, chosen.name, block_sizes)
    elif chosen.loops:
        score_bytes = block_sizes.scores() * accumulator(dtype).itemsize
    else:
        notes.append("holds all scores at once: for small sizes and for checking")
    return Explanation(
        method=method,
        grid=grid,
        implementation=chosen.name,
        passed_over=tuple(passed),
        tiling=tiling,
        flops=count,
        dense_flops=dense,
        qkvo_bytes=4 * batch * tokens * heads * head_dim * size,
        score_bytes=score_bytes,
        chip=chip,
        kernels=kernels,
        notes=tuple(notes),
    )


def _kernels(method, grid, head_dim, dtype, implementation, block_sizes) -> tuple[Kernel, ...]:
    """The kernels that a call traces for one head; they are launched for all heads at once."""
    tokens = grid.tokens + getattr(method, "text_tokens", 0)
    x = jax.ShapeDtypeStruct((1, tokens, 1, head_dim), dtype)

    def call(q: Any, k: Any, v: Any) -> Any:
        return method(q, k, v, grid=grid, implementation=implementation, block_sizes=block_sizes)

    with mode.recording() as launches:
        jax.eval_shape(call, x, x, x)
    return tuple(
        Kernel(
            name=launch.name,
            blocks=launch.blocks,
            flops=launch.flops,
            bytes=launch.moved,
            cycles=launch.entry["cycles"] if launch.entry else None,
            vmem=launch.entry["vmem"] if launch.entry else None,
        )
        for launch in launches
    )
