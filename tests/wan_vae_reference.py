"""Diffusers' autoencoder in the place of ours."""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from vmonarch_jax.models.wan.config import VAEConfig
from wan_vae_cases import stored_weights


def reference_config(config: VAEConfig) -> dict:
    """What Diffusers calls the fields."""
    values = {
        "base_dim": config.dim,
        "decoder_base_dim": config.decoder_dim,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "temperal_downsample": list(config.halve_time),
        "latents_mean": list(config.mean),
        "latents_std": list(config.std),
        "is_residual": config.residual,
        "in_channels": 3 * config.patch**2,
        "out_channels": 3 * config.patch**2,
        "scale_factor_spatial": config.strides[1],
        "scale_factor_temporal": config.strides[0],
    }
    return values | ({"patch_size": config.patch} if config.patch > 1 else {})


def reference_model(config: VAEConfig) -> AutoencoderKLWan:
    """With the random weights of the test cases."""
    model = AutoencoderKLWan(**reference_config(config)).eval()
    model.load_state_dict({key: torch.tensor(v) for key, v in stored_weights(config).items()})
    return model


def _statistics(model: AutoencoderKLWan) -> tuple[np.ndarray, np.ndarray]:
    return np.float32(model.config.latents_mean), np.float32(model.config.latents_std)


@torch.no_grad()
def reference_encode(model: AutoencoderKLWan, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised mean and deviation of the posterior, channels last."""
    posterior = model.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist
    mode, deviation = (x.permute(0, 2, 3, 4, 1).numpy() for x in (posterior.mode(), posterior.std))
    mean, std = _statistics(model)
    return (mode - mean) / std, deviation / std


@torch.no_grad()
def reference_decode(model: AutoencoderKLWan, latents: np.ndarray) -> np.ndarray:
    """The video of normalised latents, channels last."""
    mean, std = _statistics(model)
    z = torch.tensor(latents * std + mean).permute(0, 4, 1, 2, 3)
    return model.decode(z).sample.permute(0, 2, 3, 4, 1).numpy()
