"""The image encoder and its preprocessing against Transformers."""

import pytest

pytest.importorskip("torch")

import numpy as np
from compiling import jit
from safetensors.numpy import load_file
from vmonarch_jax.models.wan.clip import preprocess_image
from vmonarch_jax.models.wan.keys_clip import clip_aliases, clip_entries, clip_ignored
from vmonarch_jax.models.wan.weights.load import check_keys, with_aliases
from wan_encoder_cases import (
    IMAGES,
    PICTURES,
    image_encoder,
    image_inputs,
    picture,
    relative_error,
)
from wan_encoder_reference import (
    reference_image_encoder,
    reference_image_states,
    reference_pixels,
    reference_squeezed,
)


@pytest.mark.parametrize("name", IMAGES)
def test_states_equal_transformers(name, tmp_path):
    config, reference = IMAGES[name], reference_image_encoder(IMAGES[name])
    reference.save_pretrained(tmp_path)
    weights = with_aliases(load_file(tmp_path / "model.safetensors"), clip_aliases(config))
    check_keys(weights, clip_entries(config), "diffusers", clip_ignored(config))
    states = jit(image_encoder(config, weights))(image_inputs(config))
    error = relative_error(states, reference_image_states(reference, image_inputs(config)))
    print(f"{name}: relative error {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("size", [28, 33, 224])
@pytest.mark.parametrize("name", PICTURES)
def test_pixels_equal_transformers(name, size):
    image = picture(name)
    expected = reference_pixels(image, size)
    np.testing.assert_allclose(preprocess_image(image, size), expected, atol=1e-5)
    expected = reference_squeezed(image, size)
    np.testing.assert_allclose(preprocess_image(image, size, "squeeze"), expected, atol=1e-4)
