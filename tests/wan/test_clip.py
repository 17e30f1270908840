"""The CLIP image encoder: equal to what Transformers made; pictures as its processor makes them."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from flax import nnx
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.clip import CLIPVision, preprocess_image
from vmonarch_jax.models.wan.config import ImageConfig
from vmonarch_jax.models.wan.keys_clip import clip_aliases, clip_entries, clip_ignored
from vmonarch_jax.models.wan.weights.load import check_keys, with_aliases
from wan_encoder_cases import (
    IMAGES,
    PICTURES,
    abstract,
    image_encoder,
    image_inputs,
    picture,
    relative_error,
    stored_weights,
)

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "wan" / "clip.npz")
SMALL = IMAGES["gelu"]
LAYER, THEIRS = "vision_model.encoder.layers", "visual.transformer"


def original_weights(config: ImageConfig) -> dict[str, np.ndarray]:
    """The random weights as the original file holds them, beside some that nobody reads."""
    weights = stored_weights(clip_entries(config))
    renamed = {
        "visual.patch_embedding.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.cls_embedding": weights["vision_model.embeddings.class_embedding"][None, None],
        "visual.pos_embedding": weights["vision_model.embeddings.position_embedding.weight"][None],
    }
    for kind in ("weight", "bias"):
        renamed[f"visual.pre_norm.{kind}"] = weights[f"vision_model.pre_layrnorm.{kind}"]
        for n in range(config.layers - 1):
            ours, theirs = f"{LAYER}.{n}", f"{THEIRS}.{n}"
            renamed[f"{theirs}.attn.to_qkv.{kind}"] = np.concatenate(
                [weights[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for a, b in (
                ("layer_norm1", "norm1"),
                ("layer_norm2", "norm2"),
                ("self_attn.out_proj", "attn.proj"),
                ("mlp.fc1", "mlp.0"),
                ("mlp.fc2", "mlp.2"),
            ):
                renamed[f"{theirs}.{b}.{kind}"] = weights[f"{ours}.{a}.{kind}"]
    unused = ("post_norm.weight", "head", f"transformer.{config.layers - 1}.attn.to_qkv.weight")
    return renamed | {
        **{f"visual.{key}": np.zeros(3, np.float32) for key in unused},
        "textual.token_embedding.weight": np.zeros((5, 4), np.float32),
        "log_scale": np.zeros((), np.float32),
    }


@pytest.mark.parametrize("name", IMAGES)
def test_states_equal_golden(name):
    config = IMAGES[name]
    states = jit(image_encoder(config))(image_inputs(config))
    assert states.dtype == jnp.float32
    assert relative_error(states, GOLDENS[name]) <= 1e-5


def test_bfloat16_is_near_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    rebuild, params = split_params(image_encoder(config))
    encoder = rebuild({name: value.astype(jnp.bfloat16) for name, value in params.items()})
    states = jit(encoder)(image_inputs(config))
    assert states.dtype == jnp.float32
    assert relative_error(states, GOLDENS["gelu"]) < 0.05


@pytest.mark.parametrize("shape", [(21, 21, 3), (2, 3, 21, 21), (2, 28, 28, 3)])
def test_wrong_pixels_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected pixels \[batch, 21, 21, 3\]"):
        image_encoder(SMALL)(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 1}, "expected layers >= 2, got 1"), ({"activation": "relu"}, "got 'relu'")],
)
def test_configurations_that_do_not_exist(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPVision(dataclasses.replace(SMALL, **change), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_equal_golden(name):
    pixels = preprocess_image(picture(name), 28)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, GOLDENS[f"pixels.{name}"], atol=1e-5)
    squeezed = preprocess_image(picture(name), 28, "squeeze")
    assert squeezed.dtype == np.float32
    np.testing.assert_allclose(squeezed, GOLDENS[f"squeezed.{name}"], atol=1e-4)


def test_picture_of_the_right_size_is_only_normalised():
    image = picture("square")
    pixels = preprocess_image(image, 45)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(pixels * std + mean, image / 255, atol=1e-6)
    assert preprocess_image(image).shape == (224, 224, 3)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\]"):
        preprocess_image(image)


def test_size_is_positive():
    with pytest.raises(ValueError, match="expected size >= 1, got 0"):
        preprocess_image(picture("square"), 0)
    with pytest.raises(ValueError, match=r"expected a fit of .*, got 'pad'"):
        preprocess_image(picture("square"), 28, "pad")


@pytest.mark.parametrize("config", [*IMAGES.values(), ImageConfig()])
def test_entries_are_the_parameters(config):
    _, params = split_params(abstract(CLIPVision, config, param_dtype=jnp.bfloat16))
    entries = clip_entries(config)
    assert {entry.name: entry.full_shape for entry in entries} == {
        name: value.shape for name, value in params.items()
    }
    assert len(entries) == len(params)
    assert all(len(entry.logical) == len(entry.full_shape) for entry in entries)
    assert {value.dtype for value in params.values()} == {jnp.bfloat16.dtype}


@pytest.mark.parametrize("name", IMAGES)
def test_original_keys_fill_the_same_model(name):
    config = IMAGES[name]
    original = original_weights(config)
    check_keys(original, clip_entries(config), "original", clip_ignored(config))
    _, params = split_params(image_encoder(config, original, "original"))
    for name, value in split_params(image_encoder(config))[1].items():
        np.testing.assert_array_equal(params[name], value)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_keys_of_transformers_old_and_new(prefix):
    entries, weights = clip_entries(SMALL), stored_weights(clip_entries(SMALL))
    stored = {prefix + key.removeprefix("vision_model."): v for key, v in weights.items()}
    for key in ("post_layernorm.bias", "encoder.layers.3.mlp.fc1.bias"):
        stored[prefix + key] = np.zeros(2, np.float32)
    found = with_aliases(stored, clip_aliases(SMALL))
    check_keys(found, entries, "diffusers", clip_ignored(SMALL))
    assert {key: found[key] for key in weights} == weights


def test_only_the_last_block_is_left_out():
    entries = clip_entries(SMALL)
    weights = stored_weights(entries)
    del weights[f"{LAYER}.2.mlp.fc1.bias"]
    weights[f"{LAYER}.30.mlp.fc1.bias"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="2 problems") as caught:
        check_keys(weights, entries, "diffusers", clip_ignored(SMALL))
    assert f"missing {LAYER}.2.mlp.fc1.bias" in str(caught.value)
    assert f"unexpected {LAYER}.30.mlp.fc1.bias" in str(caught.value)


def test_full_size_without_weights():
    encoder = abstract(CLIPVision, ImageConfig(), param_dtype=jnp.bfloat16)
    _, params = split_params(encoder)
    block = 4 * (1280 * 1280 + 1280) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    around = 14 * 14 * 3 * 1280 + 1280 + 257 * 1280 + 2 * 1280
    assert sum(math.prod(value.shape) for value in params.values()) == 31 * block + around
    pixels = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    states = jax.eval_shape(lambda model, x: model(x), encoder, pixels)
    assert (states.shape, states.dtype) == ((2, 257, 1280), jnp.float32)
