"""Small autoencoders that are like no published one, their weights, videos and latents.

All is drawn from a seed, in an order and by a generator that never change, so that what Diffusers
made of it can be stored without it.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.config import VAEConfig
from vmonarch_jax.models.wan.keys_vae import vae_entries
from vmonarch_jax.models.wan.vae import WanVAE


@dataclasses.dataclass(frozen=True)
class Case:
    """One form of the autoencoder: its sizes, and those of its latents."""

    config: VAEConfig
    latents: tuple[int, int, int] = (2, 3, 2)
    batch: int = 2

    @property
    def video(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels."""
        frames, height, width = self.latents
        time, rows, columns = self.config.strides
        return time * (frames - 1) + 1, rows * height, columns * width


_STATISTICS = {"latent_channels": 4, "mean": (0.1, -0.2, 0.3, 0.4), "std": (1.5, 0.7, 1.1, 2.0)}
FLAT = VAEConfig(dim=8, decoder_dim=8, blocks=1, **_STATISTICS)
FLAT_UNEVEN = VAEConfig(
    dim=6, decoder_dim=10, multipliers=(1, 2, 3), halve_time=(True, True), **_STATISTICS
)
SHORTCUTS = VAEConfig(dim=8, decoder_dim=12, blocks=1, patch=2, residual=True, **_STATISTICS)
SHORTCUTS_UNEVEN = VAEConfig(
    dim=6, decoder_dim=4, multipliers=(1, 4, 2), halve_time=(True, True), patch=2, residual=True,
    **_STATISTICS,
)  # fmt: skip

CASES = {
    "flat": Case(FLAT),
    "flat_uneven": Case(FLAT_UNEVEN, latents=(4, 5, 3), batch=1),
    "flat_one_frame": Case(FLAT, latents=(1, 1, 3)),
    "shortcuts": Case(SHORTCUTS, latents=(2, 3, 1)),
    "shortcuts_uneven": Case(SHORTCUTS_UNEVEN, latents=(3, 3, 5), batch=1),
}


def stored_weights(config: VAEConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A random state dict by Diffusers' keys; no norm is one and no bias zero."""
    draw, weights = np.random.RandomState(seed), {}
    for entry in vae_entries(config):
        value = draw.standard_normal(entry.stored)
        if entry.name.endswith("scale"):
            value = 1 + 0.3 * value
        elif entry.name.endswith("kernel"):
            value *= 0.7 * math.prod(entry.stored[1:]) ** -0.5
        else:
            value *= 0.1
        weights[entry.diffusers] = value.astype(np.float32)
    return weights


def abstract_vae(config: VAEConfig, **kwargs) -> WanVAE:
    """The model without its parameters."""
    return nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0), **kwargs))


def vae_of(config: VAEConfig, weights=None) -> WanVAE:
    """The model with these parameters by Diffusers' keys, or random ones."""
    weights = stored_weights(config) if weights is None else weights
    rebuild, _ = split_params(abstract_vae(config))
    return rebuild({e.name: jnp.array(e.ours(weights[e.diffusers])) for e in vae_entries(config)})


def inputs_of(case: Case, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A video in [-1, 1] and normalised latents."""
    draw = np.random.RandomState(seed)
    video = draw.uniform(-1, 1, (case.batch, *case.video, 3))
    latents = draw.standard_normal((case.batch, *case.latents, case.config.latent_channels))
    return video.astype(np.float32), latents.astype(np.float32)


def relative_error(got, expected) -> float:
    """Largest difference over the largest expected value."""
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())
