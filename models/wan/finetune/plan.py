"""What tuning would load, how much memory it needs and what it computes, without doing it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import vmonarch_jax as vm
from vmonarch_jax.units import bytes_text

from ...params import Params
from ...step import TrainConfig, abstract_state
from ..config import WanConfig
from ..generate.estimate import weight_bytes
from ..generate.plan import Device
from ..sharding import Sharding
from ..transformer import Methods
from .cache import ClipCache, ClipSettings
from .prepare import Tuning, abstract
from .tune import check_run

# Of one layer that is computed anew: bytes for each token and channel that its backward pass holds
# in bfloat16 when a step of the 1.3B model is compiled for a TPU v5e, dense or VMonarch.
_LAYER_BYTES = 66

_TAKES_LESS = (
    "more devices (--mesh), fewer videos at a time (--accumulate), a smaller --size or fewer "
    "--frames take less"
)


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
      encoders: bytes of the parts that are loaded before, one after another, for what is not in
        the cache.
      memory: bytes of one device in a step, by what they are for (`step_memory`).
      flops: matmul FLOPs of a step, and of one under dense attention.
      device: each of them.
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
    encoders: dict[str, int]
    memory: dict[str, int]
    flops: tuple[int, int]
    device: Device

    @property
    def peak(self) -> int:
        """Bytes of a step on one device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether a device has memory for a step; `None`: not known."""
        return self.device.fits(self.peak)

    def __str__(self) -> str:
        (clips, missing), (videos, at_a_time) = self.clips, self.batch
        trained, whole = self.parameters
        width, height = self.settings.size
        total, dense = self.flops
        made = f"{self.settings.frames} x {width}x{height} at {self.settings.fps:g} a second"
        step = f"{_count(videos, 'video')}, {at_a_time} at a time"
        less = f"{dense / total:.2f} times fewer than under dense attention"
        limit = self.device.limit_text(self.peak, _TAKES_LESS)
        lines = [
            self.model,
            f"data: {_count(clips, 'video')} of {made}, {missing} of them to be encoded first",
            f"tokens of a video: {self.grid.tokens:,} ({'x'.join(map(str, self.grid.shape))})",
            f"trained: {self.tuned}",
            f"parameters: {trained:,} trained of {whole:,}",
            f"a step: {step}, on {_count(self.devices, 'device')}",
            *(
                f"memory of {part}, loaded before: {bytes_text(n)} of weights"
                for part, n in self.encoders.items()
            ),
            *(f"memory of {what}: {bytes_text(n)}" for what, n in self.memory.items()),
            f"memory of a device in all: about {bytes_text(self.peak)}{limit}",
            f"FLOPs of a step: about {total / 1e12:,.4g} TFLOPs in matmuls ({less})",
            f"{self.steps:,} steps: about {self.steps * total / 1e15:,.4g} PFLOPs",
        ]
        if self.device.peak is not None:
            least = total / (self.device.peak * self.devices)
            lines.append(
                f"at the peak rate of {self.device.kind} a step takes {least:.2g} s, and no run is "
                "that fast"
            )
        return "\n".join(lines)


def make_tuning_plan(
    cache: ClipCache,
    config: TrainConfig,
    tuning: Tuning,
    sharding: Sharding | None = None,
    parts: int = 1,
) -> TuningPlan:
    """Finds out what `tune` would take with the same arguments; reads no weights, encodes nothing.

    Raises:
      ValueError: what `tune` would raise before it begins.
    """
    check_run(cache, config, tuning, sharding, parts)
    found, settings = cache.found, cache.settings
    videos, images, texts = cache.lacking()
    needed = {"vae": videos, "image_encoder": images, "text_encoder": texts}
    model, trained, frozen = abstract(found.config, tuning)
    width, height = settings.size
    grid = found.config.grid_of(settings.frames, height, width)

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
        (config.batch_size, config.batch_size // parts),
        config.steps,
        {part: weight_bytes(found.config, part) for part, items in needed.items() if items},
        step_memory(found.config, config, tuning, grid, sharding, parts),
        (flops(tuning.attention), flops(vm.Dense())),
        Device.here(),
    )


def step_memory(
    model: WanConfig,
    config: TrainConfig,
    tuning: Tuning,
    grid: vm.VideoGrid,
    sharding: Sharding | None = None,
    parts: int = 1,
) -> dict[str, int]:
    """Bytes of one device in a step, by what they are for.

    Weights, gradients and the optimizer's state are exact; what is marked so is an estimate from
    what the compiler holds at full size.
    """
    _, trained, frozen = abstract(model, tuning, sharding)
    state = abstract_state(trained, config)
    tokens = grid.tokens * config.batch_size // parts
    found = {
        "weights that stay": _share(frozen),
        "weights that are trained": _share(state.params),
        "their average and moments": _share(state) - _share(state.params),
        "their gradients": _share(state.params) * (1 if parts == 1 else 2),
        "weights at work (estimate)": _copies(model, tuning, frozen | trained, sharding),
        "activations (estimate)": _activations(model, tuning, tokens, sharding),
    }
    return {what: size for what, size in found.items() if size}


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
    item = sizes.compute_dtype.itemsize
    one = math.ceil(tokens / ways) * sizes.dim * item
    # what the backward pass starts from in each layer: its input, and products, or everything
    kept = {"full": 1, "dots": 8 + sizes.ffn_dim / sizes.dim, "none": _LAYER_BYTES / 2}
    # q, k, v, what attention gives and the gradients of all four, on their way between devices
    exchanged = 8 * one if sharding is not None and sharding.ways("seq") > 1 else 0
    return round(sizes.layers * one * kept[tuning.remat] + one * _LAYER_BYTES / 2) + exchanged


def _copies(config: WanConfig, tuning: Tuning, params: Params, sharding: Sharding | None) -> int:
    """Bytes of weights that one device rounds to the dtype of products, or gathers."""
    sizes = tuning.computing(config).transformer
    item = sizes.compute_dtype.itemsize
    kinds = {jnp.dtype(tuning.frozen_dtype), sizes.compute_dtype}
    rounded = sum(_share(x) * item // x.dtype.itemsize for x in params.values())
    if sharding is None or sharding.ways("embed", "params") == 1:
        return rounded if len(kinds) > 1 else 0
    layer = sum(x.size for name, x in params.items() if name.startswith("blocks.")) // sizes.layers
    # one layer is at work while the next one comes
    gathered = 2 * layer * item // sharding.ways("heads", "params")
    return gathered + (rounded if len(kinds) > 1 else 0)


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
