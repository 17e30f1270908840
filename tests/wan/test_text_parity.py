"""The text encoder and the tokenizer against Transformers and Diffusers' pipeline."""

import functools

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from compiling import jit
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.numpy import load_file
from transformers import AutoTokenizer
from transformers.models.umt5.modeling_umt5 import UMT5Attention, UMT5Config
from vmonarch_jax.models.wan.keys_text import text_aliases, text_entries
from vmonarch_jax.models.wan.tokenizer import WanTokenizer, clean_text
from vmonarch_jax.models.wan.umt5 import embed_text, relative_buckets
from vmonarch_jax.models.wan.weights.load import check_keys, with_aliases
from wan_encoder_cases import (
    LIMIT,
    PROMPTS,
    TEXTS,
    relative_error,
    small_tokenizer,
    text_encoder,
    text_inputs,
)
from wan_encoder_reference import (
    reference_prompt_states,
    reference_text_encoder,
    reference_text_states,
    reference_tokenizer,
)


@pytest.mark.parametrize("name", TEXTS)
def test_states_equal_transformers(name, tmp_path):
    config, reference = TEXTS[name], reference_text_encoder(TEXTS[name])
    reference.save_pretrained(tmp_path)
    weights = with_aliases(load_file(tmp_path / "model.safetensors"), text_aliases(config))
    check_keys(weights, text_entries(config), "diffusers")
    states = jit(text_encoder(config, weights))(*text_inputs(name))
    error = relative_error(states, reference_text_states(reference, *text_inputs(name)))
    print(f"{name}: relative error {error:.1e}")
    assert error <= 1e-5


def test_all_keys_in_memory_are_known():
    config = TEXTS["odd"]
    state = {key: v.numpy() for key, v in reference_text_encoder(config).state_dict().items()}
    assert "encoder.embed_tokens.weight" in state
    check_keys(with_aliases(state, text_aliases(config)), text_entries(config), "diffusers")


def test_prompts_equal_the_pipeline():
    config, tokenizer = TEXTS["odd"], small_tokenizer()
    reference = reference_text_encoder(config)
    expected = reference_prompt_states(reference, tokenizer, PROMPTS, LIMIT)
    tokens, mask = WanTokenizer(small_tokenizer(), LIMIT).encode(PROMPTS)
    states = jit(functools.partial(embed_text, text_encoder(config)))(tokens, mask)
    assert relative_error(states, expected) <= 1e-5


@pytest.mark.parametrize("limit", [1, 2, 7, 16, 512])
def test_ids_equal_transformers(limit, tmp_path):
    reference = reference_tokenizer(small_tokenizer())
    reference.save_pretrained(tmp_path)
    for face in (reference, AutoTokenizer.from_pretrained(tmp_path)):
        expected = face(
            [prompt_clean(prompt) for prompt in PROMPTS],
            padding="max_length",
            max_length=limit,
            truncation=True,
            add_special_tokens=True,
            return_tensors="np",
        )
        tokens, mask = WanTokenizer.load(tmp_path, limit).encode(PROMPTS)
        np.testing.assert_array_equal(tokens, expected["input_ids"])
        np.testing.assert_array_equal(mask, expected["attention_mask"])


@pytest.mark.parametrize("text", [*PROMPTS, "a\u00a0b\u2028c", "&#38;amp; &nbsp; x", "ｆｏｘ１２"])
def test_cleaning_equals_diffusers(text):
    assert clean_text(text) == prompt_clean(text)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 11), (10, 33), (6, 50)])
def test_buckets_equal_transformers(buckets, farthest):
    attention = UMT5Attention(
        UMT5Config(
            d_model=4, d_kv=2, num_heads=2, relative_attention_num_buckets=buckets,
            relative_attention_max_distance=farthest,
        )
    )  # fmt: skip
    places = torch.arange(512)
    expected = attention._relative_position_bucket(places[None] - places[:, None])
    np.testing.assert_array_equal(relative_buckets(512, buckets, farthest), expected.numpy())
