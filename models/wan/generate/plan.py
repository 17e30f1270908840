"""What a run would load, how much memory it needs and what it computes, without doing it."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

import vmonarch_jax as vm
from vmonarch_jax.units import bytes_text

from ...attention_schedule import Attention, flops_of_steps, runs_of
from ..config import WanConfig
from ..memory import let_go, state_bytes
from ..request import Request
from ..weights.detect import Found
from ..weights.parts import PARTS, matches, part_entries


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would do; `str()` of it is the report of `--dry-run`.

    Attributes:
      model: name and layout.
      files: files and their bytes, by part.
      weights: bytes of each part's parameters once loaded.
      grid: tokens.
      attention: of the denoising steps, `(first, end, names of the methods)`.
      memory: bytes on the device in each phase: weights, and the rest by estimate, of which
        attention's states are known.
      states: bytes of what attention remembers, at most.
      flops: of all denoising steps, and of the same under dense attention.
    """

    model: str
    files: dict[str, tuple[int, int]]
    weights: dict[str, int]
    grid: vm.VideoGrid
    attention: list[tuple[int, int, str]]
    memory: dict[str, tuple[int, int]]
    states: int
    flops: tuple[int, int]

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(sum(parts) for parts in self.memory.values())

    def __str__(self) -> str:
        lines = [
            self.model,
            f"tokens: {self.grid.tokens:,} ({'x'.join(map(str, self.grid.shape))})",
        ]
        for part, (count, size) in self.files.items():
            lines.append(
                f"load {part}: {count} file{'s' * (count > 1)}, {bytes_text(size)}; "
                f"{bytes_text(self.weights[part])} of weights"
            )
        for first, end, names in self.attention:
            lines.append(f"steps {first + 1} to {end}: {names}")
        for phase, (weights, rest) in self.memory.items():
            lines.append(
                f"memory of {phase}: {bytes_text(weights + rest)} "
                f"({bytes_text(weights)} of weights, about {bytes_text(rest)} more)"
            )
        total, dense = self.flops
        if self.states:
            lines.append(
                f"attention remembers: {bytes_text(self.states)}, kept on disk for --resume"
            )
        lines.append(f"peak memory: about {bytes_text(self.peak)}")
        lines.append(
            f"denoising: {total / 1e15:.3g} PFLOPs in matmuls; under dense attention alone "
            f"{dense / 1e15:.3g}, {dense / total:.2f} times as many"
        )
        return "\n".join(lines)


def make_plan(
    found: Found, config: WanConfig, request: Request, attention: Attention, batched: bool,
    image: bool,
) -> Plan:  # fmt: skip
    """Finds out what a run would take; reads no weights.

    Memory beside the weights is an estimate from the largest activations that a step holds at
    once; compilers reuse and fuse, and may need more or less.
    """
    grid = request.grid(config)
    parts = [part for part in found.parts if part != "image_encoder" or image]
    files = {part: _files(found, part) for part in parts}
    weights = {part: weight_bytes(config, part) for part in parts}
    samples = len(request.prompt) * (2 if batched and request.guided else 1)
    experts = dict.fromkeys(part for part, _ in request.experts(config))
    memory = {"encoding the text": (weights["text_encoder"], _text_bytes(config))}
    if image:
        if config.image is not None:
            memory["encoding the image"] = weights["image_encoder"], 0
        memory["encoding the first frame"] = weights["vae"], _vae_bytes(config, request, False)
    states = state_bytes(config, request, attention, batched)
    for part in experts:
        step = _step_bytes(config, grid, samples) + states[part]
        memory[f"denoising ({part})"] = weights[part], step
    memory["decoding"] = weights["vae"], _vae_bytes(config, request, True)
    flops = (
        denoising_flops(config, request, attention), denoising_flops(config, request, vm.Dense())
    )  # fmt: skip
    return Plan(
        f"{config.name} ({found.convention} layout, {config.transformer.dtype})",
        files, weights, grid, _named(attention, request.steps, config), memory,
        max(states.values()), flops,
    )  # fmt: skip


def weight_bytes(config: WanConfig, part: str) -> int:
    """Bytes of a part's parameters as the pipeline loads them."""
    dtype = jnp.float32 if part == "vae" else getattr(config, _FIELDS[part]).compute_dtype
    return sum(
        math.prod(entry.full_shape)
        * (4 if matches(entry.diffusers, PARTS[part].float32) else jnp.dtype(dtype).itemsize)
        for entry in part_entries(config, part)
    )


_FIELDS = {
    "transformer": "transformer",
    "transformer_2": "transformer",
    "text_encoder": "text",
    "image_encoder": "image",
}


def denoising_flops(config: WanConfig, request: Request, attention: Attention) -> int:
    """Matmul FLOPs of all denoising steps, guidance and batch included."""
    return sum(flops_of_each_step(config, request, attention))


def flops_of_each_step(config: WanConfig, request: Request, attention: Attention) -> list[int]:
    """Matmul FLOPs of each denoising step, guidance and batch included."""
    sizes, grid = config.transformer, request.grid(config)
    shape = vm.flops.TransformerShape(
        sizes.dim, sizes.heads, sizes.layers, sizes.ffn_dim, sizes.text_length
    )

    of_heads = {"heads": sizes.heads, "head_dim": sizes.head_dim}
    dense = sizes.layers * vm.flops.attention(vm.Dense(), grid, **of_heads)
    rest = vm.flops.transformer(shape, vm.Dense(), grid) - dense
    rest += len(sizes.linear_layers) * vm.flops.linear_branch(grid, **of_heads)
    experts = request.experts(config)
    anew = [n + 1 for n in range(request.steps) if let_go(config, request, n)]
    own = flops_of_steps(attention, request.steps, sizes.layers, grid, **of_heads, anew=anew)
    calls = [2 if guidance > 1 else 1 for _, guidance in experts]
    videos = len(request.prompt)
    return [videos * n * (rest + count) for n, count in zip(calls, own, strict=True)]


def _named(attention: Attention, steps: int, config: WanConfig) -> list[tuple[int, int, str]]:
    named = []
    for first, end, methods in runs_of(attention, steps, config.transformer.layers):
        layers: dict[object, list[int]] = {}
        for layer, method in enumerate(methods):
            layers.setdefault(method, []).append(layer)
        texts = [
            str(method) if len(layers) == 1 else f"{method} in layers {_ranges(where)}"
            for method, where in layers.items()
        ]
        named.append((first, end, "; ".join(texts)))
    return named


def _ranges(numbers: list[int]) -> str:
    """`0-1, 5` for 0, 1 and 5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _files(found: Found, part: str) -> tuple[int, int]:
    paths = [
        p for root in found.parts[part] for p in (root.rglob("*") if root.is_dir() else [root])
    ]
    paths = [path for path in paths if path.is_file()]
    return len(paths), sum(path.stat().st_size for path in paths)


def _text_bytes(config: WanConfig) -> int:
    text, length = config.text, config.transformer.text_length
    # two texts: scores of all heads, and the two hidden arrays of the feed-forward part
    return 2 * 4 * length * (text.heads * length + 2 * text.ffn_dim + 4 * text.dim)


def _step_bytes(config: WanConfig, grid: vm.VideoGrid, samples: int) -> int:
    sizes = config.transformer
    item = sizes.compute_dtype.itemsize
    # what the step of the 1.3B model holds when it is compiled for a TPU v5e, dense or VMonarch:
    # 46 bytes in bfloat16 for each token and channel
    return samples * grid.tokens * sizes.dim * (19 * item + 8)


def _vae_bytes(config: WanConfig, request: Request, decode: bool) -> int:
    vae, (width, height) = config.vae, request.size
    time = vae.strides[0]
    channels = vae.decoder_dim if decode else vae.dim
    pixels = width * height // vae.patch**2
    # the frames of one latent frame at full size, in three arrays of the widest level there, with
    # the two frames that each of its convolutions remembers, as compiled; and the video itself
    level = 4 * pixels * 2 * channels * (3 * time + 2 * 2 * (vae.blocks + 1))
    return level + 4 * 3 * width * height * request.frames
