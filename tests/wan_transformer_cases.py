"""Small Wan transformers that are like no published one, their weights and their inputs.

All is drawn from a seed, in an order and by a generator that never change, so that what Diffusers
made of it can be stored without it.
"""

import dataclasses
import math

import numpy as np
from vmonarch_jax.models.wan.config import TransformerConfig
from vmonarch_jax.models.wan.keys_transformer import transformer_entries


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant: its sizes and those of its inputs.

    Attributes:
      config: of the transformer.
      latents: frames, height and width.
      texts: states of each text before the zeros.
      image: image states, or 0.
      times: "batch", "frames" or "tokens".
    """

    config: TransformerConfig
    latents: tuple[int, int, int] = (5, 6, 10)
    texts: tuple[int, ...] = (7, 11)
    image: int = 0
    times: str = "batch"

    @property
    def grid(self):
        return self.config.grid_of(*self.latents)


_SMALL = TransformerConfig(
    dim=60, heads=3, layers=3, ffn_dim=100, in_channels=5, out_channels=5, text_dim=24,
    text_length=16, freq_dim=32, dtype="float32",
)  # fmt: skip
# The image branch of Diffusers takes no text length but 512.
_IMAGE = dataclasses.replace(_SMALL, layers=2, in_channels=9, image_dim=28, text_length=512)

CASES = {
    "text": Case(_SMALL),
    "one_frame": Case(_SMALL, latents=(1, 6, 2)),
    "patch": Case(dataclasses.replace(_SMALL, patch=(2, 1, 3)), latents=(6, 3, 9)),
    "image": Case(_IMAGE, latents=(3, 6, 10), image=7),
    "two_images": Case(
        dataclasses.replace(_IMAGE, image_positions=14), latents=(3, 6, 10), image=14
    ),
    "image_latents": Case(dataclasses.replace(_SMALL, in_channels=11)),
    "token_times": Case(dataclasses.replace(_SMALL, per_token_time=True), times="tokens"),
}


def stored_weights(config: TransformerConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A random state dict by Diffusers' keys; no norm is one and no bias zero."""
    draw, weights = np.random.RandomState(seed), {}
    for entry in transformer_entries(config):
        for key in entry.keys("diffusers"):
            value = draw.standard_normal(entry.stored)
            if entry.name.endswith("scale"):
                value = 1 + 0.3 * value
            elif entry.name.endswith("kernel"):
                value *= math.prod(entry.stored[1:]) ** -0.5
            else:
                value *= 0.3
            weights[key] = value.astype(np.float32)
    return weights


def params_of(config: TransformerConfig, weights, convention: str = "diffusers"):
    """Stored weights as our parameters."""
    params = {}
    for entry in transformer_entries(config):
        layers = [entry.ours(weights[key]) for key in entry.keys(convention)]
        params[entry.name] = np.stack(layers) if entry.layers else layers[0]
    return params


def inputs_of(case: Case, seed: int = 1) -> dict[str, np.ndarray | None]:
    """Latents, time, text (followed by zeros) and image."""
    draw, config, batch = np.random.RandomState(seed), case.config, len(case.texts)
    latents = draw.standard_normal((batch, *case.latents, config.in_channels))
    shape = {"batch": (), "frames": (case.grid.frames,), "tokens": (case.grid.tokens,)}[case.times]
    time = 1000 * draw.random_sample((batch, *shape))
    text = np.zeros((batch, config.text_length, config.text_dim))
    for row, length in zip(text, case.texts, strict=True):
        row[:length] = draw.standard_normal((length, config.text_dim))
    image = draw.standard_normal((batch, case.image, config.image_dim)) if case.image else None
    arrays = {"latents": latents, "time": time, "text": text, "image": image}
    return {name: x if x is None else x.astype(np.float32) for name, x in arrays.items()}


def relative_error(got, expected) -> float:
    """Largest error over the largest value."""
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())
