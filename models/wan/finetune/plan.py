"""What tuning would load, how much memory it needs and what it computes, without doing it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

import vmonarch_jax as vm
from vmonarch_jax.units import bytes_text

from ...step import TrainConfig, abstract_state
from ..config import WanConfig
from ..sharding import Sharding
from ..transformer import Methods
from .cache import ClipCache, ClipSettings
from .prepare import Tuning, abstract
from .tune import check_run

# What a training step of the 1.3B model holds beside the residual stream of each layer when it is
# compiled for a TPU v5e: bytes for each token and channel, of one layer that is recomputed.
_LAYER_BYTES = 100


@dataclasses.dataclass(frozen=True)
class TuningPlan:
    """What a run would do; `str()` of it is the report of `--dry-run`.

    Attributes:
      model: name and layout.
      tuned: what is trained, and under which method.
      parameters: how many are trained, and how many the model has.
      clips: how many there are, and how many of them are not in the cache yet.
      settings: frames, size and rate of the clips.
      grid: tokens of one.
      devices: how many share a step.
      batch: videos of a step, and how many of them go through the model at a time.
      steps: of the run.
      memory: bytes of one device in a step, by what they are for; activations are an estimate.
      flops: matmul FLOPs of a step, and of one under dense attention.
    """

    model: str
    tuned: str
    parameters: tuple[int, int]
    clips: tuple[int, int]
    settings: ClipSettings
    grid: vm.VideoGrid
    devices: int
    batch: tuple[int, int]
    steps: int
    memory: dict[str, int]
    flops: tuple[int, int]

    def __str__(self) -> str:
        (clips, missing), (videos, at_a_time) = self.clips, self.batch
        trained, whole = self.parameters
        width, height = self.settings.size
        total, dense = self.flops
        made = f"{self.settings.frames} x {width}x{height} at {self.settings.fps:g} a second"
        step = f"{_count(videos, 'video')}, {at_a_time} at a time"
        less = f"{dense / total:.2f} times fewer than under dense attention"
        lines = [
            self.model,
            f"data: {_count(clips, 'video')} of {made}, {missing} of them to be encoded first",
            f"tokens of a video: {self.grid.tokens:,} ({'x'.join(map(str, self.grid.shape))})",
            f"trained: {self.tuned}",
            f"parameters: {trained:,} trained of {whole:,}",
            f"a step: {step}, on {_count(self.devices, 'device')}",
            *(f"memory of {what}: {bytes_text(n)}" for what, n in self.memory.items()),
            f"memory of a device in all: about {bytes_text(sum(self.memory.values()))}",
            f"FLOPs of a step: about {total / 1e12:,.4g} TFLOPs in matmuls ({less})",
            f"{self.steps:,} steps: about {self.steps * total / 1e15:,.4g} PFLOPs",
        ]
        return "\n".join(lines)


def make_tuning_plan(
    cache: ClipCache,
    config: TrainConfig,
    tuning: Tuning,
    sharding: Sharding | None = None,
    parts: int = 1,
) -> TuningPlan:
    """Finds out what `tune` would take with the same arguments; reads no weights, encodes nothing.

    Weights, gradients and the optimizer's state are exact; activations are an estimate from what
    the compiler holds at full size.

    Raises:
      ValueError: what `tune` would raise before it begins.
    """
    check_run(cache, config, tuning, sharding, parts)
    found, settings = cache.found, cache.settings
    videos, images, _ = cache.lacking()
    model, trained, frozen = abstract(found.config, tuning, sharding)
    state = abstract_state(trained, config)
    width, height = settings.size
    grid = found.config.grid_of(settings.frames, height, width)
    at_a_time = config.batch_size // parts
    memory = {
        "weights that stay": _share(frozen),
        "weights that are trained": _share(state.params),
        "their average and moments": _share(state) - _share(state.params),
        "their gradients": _share(state.params) * (1 if parts == 1 else 2),
        "activations (estimate)": _activations(
            found.config, tuning, grid.tokens * at_a_time, sharding
        ),
    }

    def flops(attention: Methods) -> int:
        return config.batch_size * step_flops(found.config, tuning, model.methods(attention), grid)

    lora = tuning.lora
    what = "all weights"
    if lora is not None:
        what = f"LoRA of rank {lora.rank} on {', '.join(lora.projections)}"
        what += " and the linear branches" * tuning.linear_branch
    whole = sum(x.size for x in (frozen | trained).values())
    return TuningPlan(
        f"{found.config.name} ({found.convention} layout, {tuning.dtype})",
        f"{what}, under {tuning.attention}",
        (sum(x.size for x in trained.values()), whole),
        (len(cache.clips), len({*videos, *images})),
        settings,
        grid,
        1 if sharding is None else sharding.mesh.size,
        (config.batch_size, at_a_time),
        config.steps,
        memory,
        (flops(tuning.attention), flops(vm.Dense())),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _share(tree: Any) -> int:
    """Bytes of one device."""
    return sum(
        math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape))
        * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _activations(config: WanConfig, tuning: Tuning, tokens: int, sharding: Sharding | None) -> int:
    """Bytes that one device holds between the layers and inside of one, by estimate."""
    sizes = tuning.computing(config).transformer
    ways = 1 if sharding is None else sharding.ways("batch") * sharding.ways("seq")
    channels = math.ceil(tokens / ways) * sizes.dim
    item = sizes.compute_dtype.itemsize
    # what the backward pass starts from in each layer: its input, or the products inside, too
    products = {"full": 1, "dots": 9 + sizes.ffn_dim / sizes.dim, "none": _LAYER_BYTES / 2}
    kept = sizes.layers * channels * item * products[tuning.remat]
    return round(kept + channels * _LAYER_BYTES * item / 2)


def step_flops(
    config: WanConfig, tuning: Tuning, methods: Sequence[vm.Attention], grid: vm.VideoGrid
) -> int:
    """Matmul FLOPs of one video: forward, what is recomputed, and backward.

    Backward, a linear map has one product of the size of the forward one, and another for its
    weights where these are trained; attention has five for the two of the forward pass.
    """
    sizes = tuning.config_of(config).transformer
    heads = {"heads": sizes.heads, "head_dim": sizes.head_dim}
    own = sum(vm.flops.attention(method, grid, **heads) for method in methods)
    shape = vm.flops.TransformerShape(
        sizes.dim, sizes.heads, sizes.layers, sizes.ffn_dim, sizes.text_length
    )
    rest = vm.flops.transformer(shape, vm.Dense(), grid)
    rest -= sizes.layers * vm.flops.attention(vm.Dense(), grid, **heads)
    rest += len(sizes.linear_layers) * vm.flops.linear_branch(grid, **heads)
    again_rest, again_own = {"none": (0, 0), "dots": (0, 1), "full": (1, 1)}[tuning.remat]
    backward = 1 if tuning.lora is not None else 2
    return rest * (1 + again_rest + backward) + own * (2 * (1 + again_own) + 5) // 2
