"""What a run would load, how much memory it needs and what it computes, without doing it."""

from __future__ import annotations

import dataclasses

import jax

import vmonarch_jax as vm
from vmonarch_jax.units import bytes_text

from ...attention_schedule import Attention, flops_of_steps, runs_of
from ..config import WanConfig
from ..memory import calls_of, let_go, state_bytes
from ..request import Request
from ..sharding import Sharding
from ..weights.detect import Found
from .estimate import step_bytes, text_bytes, vae_bytes, weight_bytes

# Matmul FLOPs a second in bfloat16 of a device of JAX's, as published, by how its kind begins.
_PEAKS = {
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 2307e12 / 2,  # JAX sees two devices in a chip
    "nvidia h100": 989e12,
    "nvidia a100": 312e12,
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What is known of each device.

    Attributes:
      kind: as JAX names it.
      memory: bytes that programs may take; `None`: not known.
      peak: matmul FLOPs a second in bfloat16, as published; `None`: not known.
    """

    kind: str
    memory: int | None = None
    peak: float | None = None

    @classmethod
    def here(cls) -> Device:
        """The first device of this process."""
        device = jax.devices()[0]
        memory = (device.memory_stats() or {}).get("bytes_limit")
        peaks = (_PEAKS[kind] for kind in _PEAKS if device.device_kind.lower().startswith(kind))
        return cls(device.device_kind, memory, next(peaks, None))

    def fits(self, size: int) -> bool | None:
        """Whether it has memory for that many bytes; `None`: not known."""
        return None if self.memory is None else size <= self.memory

    def limit_text(self, size: int, takes_less: str) -> str:
        """Its memory beside that many bytes, for a report; nothing where it is not known.

        Args:
          size: bytes.
          takes_less: what takes less, to be said where they do not fit.
        """
        if self.memory is None:
            return ""
        limit = f"the {bytes_text(self.memory)} of a {self.kind}"
        return f", of {limit}" if self.fits(size) else f", MORE THAN {limit}: {takes_less}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would do; `str()` of it is the report of `--dry-run`.

    Attributes:
      model: name, layout and dtype.
      files: files and their bytes, by part.
      weights: bytes of each part's parameters once loaded, on all devices together once.
      grid: tokens.
      attention: of the denoising steps, `(first, end, names of the methods)`.
      memory: bytes on one device in each phase: weights, and the rest by estimate, of which
        attention's states are known.
      states: bytes of what attention remembers, at most, on all devices together.
      flops: of all denoising steps, and of the same under dense attention.
      compared: the method that is compared with and the FLOPs of its steps, or `None`.
      mesh: devices along its axes above 1; `None`: one device.
      devices: how many.
      device: each of them.
    """

    model: str
    files: dict[str, tuple[int, int]]
    weights: dict[str, int]
    grid: vm.VideoGrid
    attention: list[tuple[int, int, str]]
    memory: dict[str, tuple[int, int]]
    states: int
    flops: tuple[int, int]
    compared: tuple[str, int] | None
    mesh: dict[str, int] | None
    devices: int
    device: Device

    @property
    def peak(self) -> int:
        """Bytes of the largest phase on one device."""
        return max(sum(parts) for parts in self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether a device has memory for the largest phase; `None`: not known."""
        return self.device.fits(self.peak)

    @property
    def seconds(self) -> float | None:
        """That denoising would take if all of it were matmuls at the peak rate, if that is known.

        No run is as fast as that.
        """
        if self.device.peak is None:
            return None
        total = self.flops[0] + (0 if self.compared is None else self.compared[1])
        return total / (self.device.peak * self.devices)

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
        each = ""
        if self.mesh is not None:
            each = " per device"
            axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
            lines.append(f"mesh: {axes or 'one device'}; memory is per device, {_of(self.devices)}")
        for phase, (weights, rest) in self.memory.items():
            lines.append(
                f"memory of {phase}: {bytes_text(weights + rest)} "
                f"({bytes_text(weights)} of weights, about {bytes_text(rest)} more)"
            )
        if self.states:
            lines.append(
                f"attention remembers: {bytes_text(self.states)}, kept on disk for --resume"
            )
        less = "more devices (--mesh), --two-calls, a smaller --size or fewer --frames take less"
        limit = self.device.limit_text(self.peak, less)
        lines.append(f"peak memory: about {bytes_text(self.peak)}{each}{limit}")
        total, dense = self.flops
        lines.append(
            f"denoising: {total / 1e15:.3g} PFLOPs in matmuls ({dense / total:.2f} times fewer "
            "than under dense attention)"
        )
        if self.compared is not None:
            name, flops = self.compared
            lines.append(f"comparison: {flops / 1e15:.3g} PFLOPs under {name}")
        if self.seconds is not None and self.device.peak is not None:
            lines.append(
                f"at the peak rate of {_of(self.devices, self.device.kind)} "
                f"({self.device.peak / 1e12:.4g} TFLOP/s each in bfloat16) these alone take "
                f"{_time_text(self.seconds)}; no run is that fast"
            )
        return "\n".join(lines)


def make_plan(
    found: Found,
    config: WanConfig,
    request: Request,
    attention: Attention,
    batched: bool,
    image: bool,
    placement: Sharding | None = None,
    compare: Attention | None = None,
) -> Plan:
    """Finds out what a run would take; reads no weights.

    Memory beside the weights is an estimate from the largest activations that a step holds at
    once; compilers reuse and fuse, and may need more or less.

    Args:
      found: the folder.
      config: the model.
      request: what to make.
      attention: of the denoising steps.
      batched: guidance in one call on a doubled batch.
      image: whether there is one.
      placement: on a mesh, which need not be there (`jax.sharding.AbstractMesh`); `None`: on one
        device.
      compare: attention of a second video, or `None`.
    """
    parts = [part for part in found.parts if part != "image_encoder" or image]
    held = {part: weight_bytes(config, part, placement) for part in parts}
    memory = {"encoding the text": (held["text_encoder"], text_bytes(config))}
    if image:
        if config.image is not None:
            memory["encoding the image"] = held["image_encoder"], 0
        memory["encoding the first frame"] = (
            held["vae"], vae_bytes(config, request, False, placement)
        )  # fmt: skip
    device = Device.here()
    steps = _steps_bytes(config, request, batched, placement, device.kind)
    for part, states in _states_bytes(
        config, request, attention, compare, batched, placement
    ).items():
        memory[f"denoising ({part})"] = held[part], steps[part] + states
    memory["decoding"] = held["vae"], vae_bytes(config, request, True, placement)
    kept = [
        max(state_bytes(config, request, method, batched).values())
        for method in (attention, compare)
        if method is not None
    ]
    mesh = None if placement is None else placement.mesh
    return Plan(
        model=f"{config.name} ({found.convention} layout, {config.transformer.dtype})",
        files={part: _files(found, part) for part in parts},
        weights={part: weight_bytes(config, part) for part in parts},
        grid=request.grid(config),
        attention=_named(attention, request.steps, config),
        memory=memory,
        states=max(kept),
        flops=(
            denoising_flops(config, request, attention),
            denoising_flops(config, request, vm.Dense()),
        ),
        compared=None
        if compare is None
        else (str(compare), denoising_flops(config, request, compare)),
        mesh=None if mesh is None else {a: n for a, n in mesh.shape.items() if n > 1},
        devices=1 if mesh is None else mesh.size,
        device=device,
    )


def _steps_bytes(
    config: WanConfig, request: Request, batched: bool, placement: Sharding | None, kind: str
) -> dict[str, int]:
    """Of each expert's calls, at most."""
    most: dict[str, int] = {}
    for part, guidance in request.experts(config):
        _, batch = calls_of(request, guidance, batched)
        size = step_bytes(config.transformer, request.grid(config), batch, placement, kind)
        most[part] = max(most.get(part, 0), size)
    return most


def _states_bytes(
    config: WanConfig,
    request: Request,
    attention: Attention,
    compare: Attention | None,
    batched: bool,
    placement: Sharding | None,
) -> dict[str, int]:
    """Of what attention remembers while each expert runs, on one device, at most."""
    own = state_bytes(config, request, attention, batched, placement)
    if compare is None:
        return own
    # the step of the certificate leaves the states before it as they are, and returns others
    other = state_bytes(config, request, compare, batched, placement)
    return {part: max(2 * size, other[part]) for part, size in own.items()}


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


def _of(count: int, kind: str = "device") -> str:
    if kind != "device":
        return f"{count} x {kind}"
    return "1 device" if count == 1 else f"{count} devices"


def _time_text(seconds: float) -> str:
    """`45 s`, `3.2 min` or `1.5 h`."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.2g} s"
