"""`vmonarch generate`: checks first, then text, denoising and decoding, each with its time left."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh
from PIL import Image, UnidentifiedImageError

import vmonarch_jax as vm
from vmonarch_jax.dispatch import names

from ...attention_schedule import Attention, AttentionSchedule, runs_of
from ...demo.files import write_json
from ...demo.measure import likeness
from ...demo.progress import phase
from ..conditions import check_image, check_texts, fit_image, size_like
from ..config import WanConfig, with_dtype
from ..memory import after, calls_of
from ..pipeline import LoRAFile, Progress, WanPipeline
from ..request import Request
from ..sharding import AXES, Sharding, make_mesh
from ..weights.detect import Found, detect
from ..weights.parts import part_entries
from .compare import certified_step, certify, describe
from .output import save_frames, save_mp4
from .partial import Partial
from .plan import Plan, make_plan
from .progress import Denoising


@dataclasses.dataclass(frozen=True)
class Job:
    """What `vmonarch generate` is asked to do.

    Attributes:
      weights: folder of the model.
      request: prompt and so on; what is not given is the model's own (`Request.of`), but a size of
        the image's shape where there is an image (`size_like`).
      out: the MP4 file.
      attention: of the denoising steps.
      image: the first frame, or `None`.
      last_image: the last frame, or `None`.
      dtype: "bfloat16" or "float32".
      batched: guidance in one call on a doubled batch.
      mesh: devices along data, fsdp, context and tensor; `None`: one device.
      compare: a method whose video is made too and written beside, or `None`.
      frames: whether to write PNG frames too.
      resume: whether to go on with an interrupted run.
      lora: what is merged onto the transformers.
    """

    weights: pathlib.Path
    request: Mapping[str, Any]
    out: pathlib.Path
    attention: Attention
    image: pathlib.Path | None = None
    last_image: pathlib.Path | None = None
    dtype: str = "bfloat16"
    batched: bool = True
    mesh: Mapping[str, int] | None = None
    compare: Attention | None = None
    frames: bool = False
    resume: bool = False
    lora: tuple[LoRAFile, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A job whose every input was found good."""

    job: Job
    found: Found
    request: Request
    image: np.ndarray | None
    last_image: np.ndarray | None
    pipeline: WanPipeline

    @property
    def config(self):
        return self.pipeline.config

    def identity(self) -> dict[str, Any]:
        """All that the result depends on, as JSON values."""
        images = {"image": self.image, "last_image": self.last_image}
        return {
            "model": self.config.name,
            "weights": self.found.folder.resolve().name,
            **dataclasses.asdict(self.request),
            "attention": str(self.job.attention),
            "compare": None if self.job.compare is None else str(self.job.compare),
            **{
                name: None if pixels is None else hashlib.sha256(pixels.tobytes()).hexdigest()
                for name, pixels in images.items()
            },
            "dtype": self.job.dtype,
            "batched": self.job.batched,
            "lora": [_lora_identity(one) for one in self.job.lora],
            "vmonarch_jax": vm.__version__,
            "jax": jax.__version__,
        }


def plan(job: Job) -> Plan:
    """What a job would take; reads no weights. The devices of its mesh need not be there.

    Raises:
      ValueError: something about it is wrong.
    """
    ready = _check(job, there=False)
    return make_plan(
        ready.found, ready.config, ready.request, job.attention, job.batched,
        ready.image is not None, ready.pipeline.placement, job.compare,
    )  # fmt: skip


def generate(job: Job) -> dict[str, Any]:
    """Makes the video; returns the metadata that is written with it.

    Raises:
      ValueError: something about the job is wrong; found out before anything slow.
      KeyboardInterrupt: the finished steps are kept, and a job with `resume` goes on from there.
    """
    ready = _check(job)
    partial = Partial(_partial_folder(job.out), ready.identity(), job.resume)
    partial.begin()
    try:
        return _generate(ready, partial)
    except KeyboardInterrupt:
        print(
            f"\nstopped; {partial.folder} keeps what is finished, and --resume goes on from there",
            file=sys.stderr,
        )
        raise


def _generate(ready: _Ready, partial: Partial) -> dict[str, Any]:
    """The slow part, phase by phase; what is finished is not done again."""
    began = time.perf_counter()
    job, pipeline, request = ready.job, ready.pipeline, ready.request
    conditions = partial.conditions()
    if conditions is None:
        with phase("reading text and image", 1) as bar:
            conditions = pipeline.conditions(request, ready.image, ready.last_image)
            jax.block_until_ready(conditions)
            bar.update()
        partial.keep_conditions(conditions)
    latents, certificate = _denoise(ready, partial, conditions, "main", job.attention)
    others = None
    if job.compare is not None:
        others, _ = _denoise(ready, partial, conditions, "compare", job.compare)
    with phase("decoding", 1 + (others is not None)) as bar:
        video = np.asarray(pipeline.decode(latents))[0]
        bar.update()
        if others is not None:
            other = np.asarray(pipeline.decode(others))[0]
            bar.update()
    pipeline.free()
    metadata = ready.identity() | {
        "prompt": request.prompt[0],
        "fps": ready.config.fps,
        "seconds": round(time.perf_counter() - began, 1),
        "device": jax.devices()[0].device_kind,
        "implementation": list(names(None)),
    }
    written = video
    if others is not None:
        psnr, ssim = likeness(video[None], other[None])
        metadata |= {"psnr": psnr, "ssim": ssim, "certificate": certificate}
        print(describe(certificate, psnr, ssim))
        written = np.concatenate([video, other], axis=2)
    save_mp4(job.out, written, ready.config.fps, metadata)
    write_json(job.out.with_suffix(".json"), metadata)
    if job.frames:
        save_frames(job.out.with_suffix(""), written, metadata)
    partial.remove()
    return metadata


def _denoise(ready: _Ready, partial: Partial, conditions, name: str, attention: Attention):
    """The latents under one method, and for the main one its certificate where it is asked for."""
    job, request, pipeline = ready.job, ready.request, ready.pipeline
    remembered = functools.partial(after, ready.config, request, attention, batched=job.batched)
    start = partial.progress(name, request.sampler_value(), remembered)
    done = 0 if start is None else start[0]
    noise = pipeline.noise(request)
    wanted = job.compare is not None and name == "main"
    at = certified_step(attention, request, ready.config)
    certificate: list[dict[str, float | None]] = partial.certificate() if wanted else []

    def look(step: int, progress: Progress) -> None:
        if wanted and not certificate and step == at:
            certificate.extend(
                certify(pipeline, request, conditions, at, progress, attention, job.batched)
            )
            partial.keep_certificate(certificate)

    title = "denoising" if name == "main" else f"denoising under {attention}"
    with Denoising(title, ready.config, request, attention, done) as bar:

        def on_step(step: int, progress: Progress) -> None:
            jax.block_until_ready(progress)
            bar.update()
            partial.keep_progress(name, step, progress, last=step == request.steps)
            if step < request.steps:
                look(step, progress)
            bar.start()

        look(done, pipeline.begin(request, noise) if start is None else start[1])
        bar.start()
        latents = pipeline.denoise(
            request, conditions, noise, attention=attention, batched=job.batched, start=start,
            on_step=on_step,
        )  # fmt: skip
    return latents, certificate


def _check(job: Job, there: bool = True) -> _Ready:
    """Finds every mistake that can be found without reading weights.

    Unless they must be `there`, the devices of a mesh may be others than this machine's.
    """
    found = detect(job.weights)
    config = with_dtype(found.config, job.dtype)
    found = dataclasses.replace(found, config=config)
    check_image(config, job.image, job.last_image)
    images = [None if path is None else _read_image(path) for path in (job.image, job.last_image)]
    given = dict(job.request)
    if images[0] is not None and "size" not in given:
        given["size"] = size_like(config, images[0])
    request = Request.of(config, **given)
    if len(request.prompt) != 1:
        raise ValueError(f"expected one prompt, got {len(request.prompt)}")
    if not request.prompt[0].strip():
        raise ValueError("expected a prompt, got an empty one")
    _check_attention(job, request, config)
    first, last = (None if image is None else fit_image(image, request.size) for image in images)
    _check_out(job.out)
    placement = None if job.mesh is None else placement_of(job.mesh, there)
    if placement is not None:
        _check_placement(placement, found, request, job.batched)
    pipeline = WanPipeline.open(found, job.dtype, placement, job.lora)
    texts = [*request.prompt, *([request.negative_prompt] if request.guided else [])]
    check_texts(pipeline.tokenizer, texts)
    return _Ready(job, found, request, first, last, pipeline)


def _check_attention(job: Job, request: Request, config: WanConfig) -> None:
    grid, layers = request.grid(config), config.transformer.layers
    for attention in (job.attention, job.compare):
        runs = [] if attention is None else runs_of(attention, request.steps, layers)
        for method in {method for _, _, methods in runs for method in methods}:
            vm.flops.attention(method, grid)  # its shapes must fit the grid
    if isinstance(job.attention, AttentionSchedule):
        dense = job.attention.warmup_steps
        if dense > request.steps:
            raise ValueError(f"expected at most {request.steps} dense steps, got {dense}")


def _check_out(out: pathlib.Path) -> None:
    if out.suffix != ".mp4":
        raise ValueError(f"expected an --out that ends in .mp4, got {out}")
    if out.is_dir():
        raise ValueError(f"expected --out to be a file, got the folder {out}")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"expected --out in a folder that can be written to, got {there}")


def placement_of(sizes: Mapping[str, int], there: bool = True) -> Sharding:
    """The mesh of these sizes, of devices that must be `there` or of none at all, to reckon with.

    Raises:
      ValueError: a size is below 1, or there are not so many devices.
    """
    data, fsdp, context, tensor = shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if not there and min(shape) > 0:
        mesh: Any = AbstractMesh(shape, AXES)
        return Sharding(mesh)
    return Sharding(make_mesh(data, fsdp, context, tensor))


def _check_placement(placement: Sharding, found: Found, request: Request, batched: bool) -> None:
    heads = found.config.transformer.heads
    ways = placement.ways("heads") * placement.ways("seq")
    if heads % ways:
        raise ValueError(
            f"expected a mesh whose tensor * context divides {heads} heads, got {ways}"
        )
    ways = placement.ways("batch")
    for _, guidance in request.experts(found.config):
        videos = calls_of(request, guidance, batched)[1]
        if videos % ways:
            raise ValueError(
                f"expected a mesh whose data * fsdp divides the {videos} videos of a call "
                f"(guidance in one call doubles them), got {ways}"
            )
    for part in found.parts:
        placement.param_shardings(part_entries(found.config, part))


def _lora_identity(lora: LoRAFile) -> dict[str, Any]:
    with lora.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {**dataclasses.asdict(lora), "path": lora.path.name, "sha256": digest}


def _partial_folder(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(out.name + ".partial")


def _read_image(path: pathlib.Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
        return image
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected an image, got no such file") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"{path}: expected a whole image, got none: {error}") from error
