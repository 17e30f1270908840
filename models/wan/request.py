"""What is asked of a Wan model: prompt, size and how to sample, checked before anything is slow."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import vmonarch_jax as vm

from .clip import FITS
from .config import WanConfig
from .samplers import Sampler, sampler_of
from .unipc import SPACINGS


@dataclasses.dataclass(frozen=True)
class Request:
    """One video, or one for each prompt; plain values that go to JSON and back.

    Attributes:
      prompt: what to show; several prompts make several videos in one batch.
      negative_prompt: what to keep away from, for all of them; has no effect without guidance.
      size: width and height in pixels.
      frames: frames in pixels.
      steps: denoising steps.
      guidance: weight of classifier-free guidance; 1 is none, and half the cost.
      guidance_low: of the expert of low noise; `None`: the same.
      shift: of the noise levels.
      sampler: "unipc", "dpm++" or "euler".
      spacing: of the noise levels of the first two: "diffusers", or "original" as in the
        repositories of Wan.
      image_fit: what the image encoder (of Wan2.1) sees: the middle square of the image ("crop", as
        in Diffusers), or all of it ("squeeze", as in the repositories of Wan).
      seed: of the noise.

    Raises:
      ValueError: a number is out of range.

    Example:
      request = Request.of(MODELS["wan2.1-t2v-1.3B"], prompt="A cat on a sofa", seed=1)
    """

    prompt: tuple[str, ...]
    negative_prompt: str = ""
    size: tuple[int, int] = (832, 480)
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    guidance_low: float | None = None
    shift: float = 5.0
    sampler: str = "unipc"
    spacing: str = SPACINGS[0]
    image_fit: str = FITS[0]
    seed: int = 0

    def __post_init__(self) -> None:
        prompt = (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "size", tuple(self.size))
        if not prompt or not all(isinstance(text, str) for text in prompt):
            raise ValueError(f"expected a prompt, or several, got {self.prompt!r}")
        for name in ("guidance", "guidance_low"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < float("inf"):
                raise ValueError(f"expected {name} >= 1 (1 is none), got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"expected a seed in [0, 2**63), got {self.seed}")
        if self.image_fit not in FITS:
            raise ValueError(f"expected an image_fit of {FITS}, got {self.image_fit!r}")
        self.sampler_value()

    @classmethod
    def of(cls, config: WanConfig, **given: Any) -> Request:
        """The request with the settings that a model's authors sample with where none are given.

        Raises:
          ValueError: the model can't make it, or a number is out of range.
        """
        if config.boundary is None and given.get("guidance_low") is not None:
            raise ValueError(
                f"{config.name} has one transformer: expected no guidance_low, got "
                f"{given['guidance_low']}"
            )
        names = ("size", "frames", "steps", "guidance", "guidance_low", "shift")
        defaults = {name: getattr(config, name) for name in names}
        if "guidance" in given:
            defaults["guidance_low"] = None  # one weight that is asked for holds for both experts
        request = cls(**(defaults | given))
        request.grid(config)
        return request

    def sampler_value(self) -> Sampler:
        """The sampler, with its steps and shift."""
        return sampler_of(self.sampler, self.steps, self.shift, self.spacing)

    def grid(self, config: WanConfig) -> vm.VideoGrid:
        """The token grid of the video.

        Raises:
          ValueError: the model can't make that size.
        """
        width, height = self.size
        return config.grid_of(self.frames, height, width)

    def latent_shape(self, config: WanConfig) -> tuple[int, int, int, int, int]:
        """Of the latents: batch, frames, height, width, channels."""
        width, height = self.size
        latent = config.vae.latent_size(self.frames, height, width)
        return len(self.prompt), *latent, config.vae.latent_channels

    @property
    def guided(self) -> bool:
        """Whether any step uses classifier-free guidance."""
        return max(self.guidance, self.guidance_low or self.guidance) > 1

    def experts(self, config: WanConfig) -> list[tuple[str, float]]:
        """Part that runs each step, "transformer" or "transformer_2", and its guidance."""
        high, low = self.guidance, self.guidance_low
        parts = ("transformer", high), ("transformer_2", high if low is None else low)
        second = np.zeros(self.steps, bool)
        if config.boundary is not None:
            second = self.sampler_value().times < config.boundary * 1000
        return [parts[int(which)] for which in second]
