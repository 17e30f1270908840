"""Small Wan models with random weights, for the tests of weights."""

import dataclasses
import json

import numpy as np
from safetensors.numpy import save_file
from vmonarch_jax.models.wan.config import TransformerConfig, VAEConfig, WanConfig
from vmonarch_jax.models.wan.weights.configs import write_config
from vmonarch_jax.models.wan.weights.parts import part_entries
from vmonarch_jax.models.wan.weights.stored import Stored

TRANSFORMER = TransformerConfig(
    dim=24, heads=2, layers=3, ffn_dim=40, in_channels=4, out_channels=4, text_dim=10, freq_dim=8
)
VAE = VAEConfig(
    dim=4, decoder_dim=4, latent_channels=4, multipliers=(1, 2), blocks=1, halve_time=(True,),
    mean=(0.0,) * 4, std=(1.0,) * 4,
)  # fmt: skip
SMALL = WanConfig("small", TRANSFORMER, VAE)
IMAGE = dataclasses.replace(
    SMALL, transformer=dataclasses.replace(TRANSFORMER, in_channels=9, image_dim=16)
)


def random_params(config, part="transformer", seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return {
        entry.name: random.standard_normal(entry.full_shape).astype(dtype)
        for entry in part_entries(config, part)
    }


def tensors_of(config, params, convention, part="transformer"):
    """The same as others store them."""
    found = {}
    for entry in part_entries(config, part):
        value = params[entry.name]
        rows = value if entry.layers else value[None]
        for key, row in zip(entry.keys(convention), rows, strict=True):
            found[key] = entry.theirs(row, convention)
    return found


def write_folder(folder, tensors, config=None):
    """One `diffusion_pytorch_model.safetensors`, written by the format's own library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def written(folder, tensors, name="x.safetensors"):
    """A safetensors file of some arrays, as the reader sees it."""
    save_file(tensors, folder / name)
    return Stored([folder / name])


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[name]), value, err_msg=name)


def diffusers_folder(folder, config, params, dtype=np.float32):
    tensors = {k: v.astype(dtype) for k, v in tensors_of(config, params, "diffusers").items()}
    sizes = write_config("transformer", config)
    write_folder(folder / "transformer", tensors, sizes)
    return folder
