"""The autoencoders against Diffusers', through a folder that Diffusers saved."""

import functools

import pytest

pytest.importorskip("torch")

import jax
import torch
from compiling import jit
from diffusers import AutoencoderKLWan
from safetensors.numpy import load_file
from vmonarch_jax.models.wan.keys_vae import vae_entries
from vmonarch_jax.models.wan.presets import VAE_2_1, VAE_2_2
from wan_vae_cases import CASES, FLAT, SHORTCUTS, Case, inputs_of, relative_error, vae_of
from wan_vae_reference import (
    reference_config,
    reference_decode,
    reference_encode,
    reference_model,
)

LENGTHS = {
    f"{form}_{4 * frames - 3}_frames": Case(config, latents=(frames, 3, 5))
    for form, config in {"flat": FLAT, "shortcuts": SHORTCUTS}.items()
    for frames in (1, 2, 3, 4)
}


@pytest.mark.parametrize("name", [*CASES, *LENGTHS])
def test_equals_diffusers(name, tmp_path):
    case = (CASES | LENGTHS)[name]
    reference = reference_model(case.config)
    reference.save_pretrained(tmp_path)
    vae = vae_of(case.config, load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    video, latents = inputs_of(case)

    expected, _ = reference_encode(reference, video)
    encode_error = relative_error(jit(vae.encode)(video), expected)
    expected = reference_decode(reference, latents)
    decode_error = relative_error(jit(vae.decode)(latents), expected)
    print(f"{name}: relative error, encode {encode_error:.1e} decode {decode_error:.1e}")
    assert max(encode_error, decode_error) <= 1e-5


def test_sample_equals_diffusers():
    video, _ = inputs_of(CASES["flat"])
    mean, deviation = reference_encode(reference_model(FLAT), video)
    key = jax.random.key(0)
    drawn = jit(functools.partial(vae_of(FLAT).encode, sample=key))(video)
    expected = mean + deviation * jax.random.normal(key, mean.shape)
    assert relative_error(drawn, expected) <= 1e-5


@pytest.mark.parametrize("config", [FLAT, SHORTCUTS, VAE_2_1, VAE_2_2])
def test_keys_are_those_of_diffusers(config):
    with torch.device("meta"):
        model = AutoencoderKLWan(**reference_config(config))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {e.diffusers: e.stored for e in vae_entries(config)} == expected
