"""The umT5 encoder and its tokenizer: equal to what Transformers made, wherever prompts end."""

import dataclasses
import functools
import math
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from compiling import jit
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.config import TextConfig
from vmonarch_jax.models.wan.keys_text import text_aliases, text_entries
from vmonarch_jax.models.wan.tokenizer import WanTokenizer, clean_text
from vmonarch_jax.models.wan.umt5 import UMT5Encoder, embed_text, relative_buckets
from wan_encoder_cases import (
    LIMIT,
    PROMPTS,
    TEXTS,
    abstract,
    relative_error,
    small_tokenizer,
    stored_weights,
    text_encoder,
    text_inputs,
)

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "wan" / "text.npz")
ODD = TEXTS["odd"]


@pytest.fixture(scope="module")
def tokenizer() -> WanTokenizer:
    return WanTokenizer(tokenizers.Tokenizer.from_str(str(GOLDENS["tokenizer"])), LIMIT)


@pytest.mark.parametrize("name", TEXTS)
def test_states_equal_golden(name):
    states = jit(text_encoder(TEXTS[name]))(*text_inputs(name))
    assert states.dtype == jnp.float32
    assert relative_error(states, GOLDENS[name]) <= 1e-5


def test_embedded_prompts_equal_golden(tokenizer):
    tokens, mask = tokenizer.encode(PROMPTS)
    states = jit(functools.partial(embed_text, text_encoder(ODD)))(tokens, mask)
    assert relative_error(states, GOLDENS["prompts"]) <= 1e-5
    assert not np.asarray(states)[mask == 0].any()
    assert np.asarray(states)[mask == 1].any(-1).all()


def test_what_padding_holds_changes_nothing():
    encoder, (tokens, mask) = jit(text_encoder(ODD)), text_inputs("odd")
    others = np.where(mask == 1, tokens, 7)
    a, b = (np.asarray(encoder(t, mask))[mask == 1] for t in (tokens, others))
    np.testing.assert_array_equal(a, b)


def test_longer_padding_changes_nothing():
    encoder, (tokens, mask) = jit(text_encoder(ODD)), text_inputs("odd")
    wide = encoder(*(np.pad(x, ((0, 0), (0, 9))) for x in (tokens, mask)))
    short = encoder(tokens, mask)
    error = relative_error(np.asarray(wide)[:, :39][mask == 1], np.asarray(short)[mask == 1])
    assert error <= 1e-6


def test_bfloat16_is_near_float32():
    config = dataclasses.replace(ODD, dtype="bfloat16")
    encoder = text_encoder(config)
    rebuild, params = split_params(encoder)
    encoder = rebuild({name: value.astype(jnp.bfloat16) for name, value in params.items()})
    states = jit(encoder)(*text_inputs("odd"))
    assert states.dtype == jnp.float32
    deviation = np.asarray(states) - GOLDENS["odd"]
    assert np.sqrt(np.square(deviation).mean() / np.square(GOLDENS["odd"]).mean()) < 0.1


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 11), (10, 33), (6, 50)])
def test_buckets_equal_exact_arithmetic(buckets, farthest):
    side = buckets // 2
    exact = side // 2

    def bucket(offset):
        distance = abs(offset)
        if distance < exact:
            place = distance
        else:
            # the largest k with (distance / exact)^steps >= (farthest / exact)^k
            steps = side - exact
            ratio = Fraction(distance, exact) ** steps
            far = [k for k in range(steps) if ratio >= Fraction(farthest, exact) ** k]
            place = exact + far[-1]
        return place + side * (offset > 0)

    found = relative_buckets(200, buckets, farthest)
    assert found.shape == (200, 200)
    for query in (0, 77, 199):
        assert found[query].tolist() == [bucket(k - query) for k in range(200)]


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((2, 5), (2, 4)), ((2, 5), (5,))])
def test_wrong_shapes_are_refused(shapes):
    tokens, mask = (np.zeros(shape, np.int32) for shape in shapes)
    with pytest.raises(ValueError, match="expected tokens and mask"):
        text_encoder(ODD)(tokens, mask)


@pytest.mark.parametrize("config", [*TEXTS.values(), TextConfig()])
def test_entries_are_the_parameters(config):
    _, params = split_params(abstract(UMT5Encoder, config, param_dtype=jnp.bfloat16))
    entries = text_entries(config)
    assert {entry.name: entry.full_shape for entry in entries} == {
        name: value.shape for name, value in params.items()
    }
    assert len(entries) == len(params)
    assert all(len(entry.logical) == len(entry.full_shape) for entry in entries)
    assert {value.dtype for value in params.values()} == {jnp.bfloat16.dtype}


def test_keys_of_both_conventions():
    entries = text_entries(dataclasses.replace(ODD, layers=1))
    block, attention = "encoder.block.0.layer.", "SelfAttention."
    assert {entry.keys("diffusers")[0]: entry.keys("original")[0] for entry in entries} == {
        "shared.weight": "token_embedding.weight",
        f"{block}0.layer_norm.weight": "blocks.0.norm1.weight",
        f"{block}0.{attention}q.weight": "blocks.0.attn.q.weight",
        f"{block}0.{attention}k.weight": "blocks.0.attn.k.weight",
        f"{block}0.{attention}v.weight": "blocks.0.attn.v.weight",
        f"{block}0.{attention}o.weight": "blocks.0.attn.o.weight",
        f"{block}0.{attention}relative_attention_bias.weight": (
            "blocks.0.pos_embedding.embedding.weight"
        ),
        f"{block}1.layer_norm.weight": "blocks.0.norm2.weight",
        f"{block}1.DenseReluDense.wi_0.weight": "blocks.0.ffn.gate.0.weight",
        f"{block}1.DenseReluDense.wi_1.weight": "blocks.0.ffn.fc1.weight",
        f"{block}1.DenseReluDense.wo.weight": "blocks.0.ffn.fc2.weight",
        "encoder.final_layer_norm.weight": "norm.weight",
    }
    assert text_aliases(ODD) == {"shared.weight": "encoder.embed_tokens.weight"}


def test_original_keys_fill_the_same_model():
    entries, weights = text_entries(ODD), stored_weights(text_entries(ODD))
    original = {
        theirs: weights[key]
        for entry in entries
        for key, theirs in zip(entry.keys("diffusers"), entry.keys("original"), strict=True)
    }
    _, params = split_params(text_encoder(ODD, original, "original"))
    for name, value in split_params(text_encoder(ODD))[1].items():
        np.testing.assert_array_equal(params[name], value)


def test_full_size_without_weights():
    encoder = abstract(UMT5Encoder, TextConfig(), param_dtype=jnp.bfloat16)
    _, params = split_params(encoder)
    assert sum(math.prod(value.shape) for value in params.values()) == 5_680_910_336
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    states = jax.eval_shape(embed_text, encoder, tokens, tokens)
    assert (states.shape, states.dtype) == ((2, 512, 4096), jnp.float32)


def test_encoded_prompts(tokenizer):
    tokens, mask = tokenizer.encode(PROMPTS)
    assert tokens.shape == mask.shape == (len(PROMPTS), LIMIT)
    assert tokens.dtype == mask.dtype == np.int32
    counts = [tokenizer.count(prompt) for prompt in PROMPTS]
    assert mask.sum(1).tolist() == [min(count, LIMIT) for count in counts]
    assert max(counts) > LIMIT > min(counts)
    for row, length in zip(tokens, mask.sum(1), strict=True):
        assert row[length - 1] == 1
        assert not row[length:].any()
    assert tokens[1, 0] == 1  # the empty prompt is its end alone


def test_trained_tokenizer_keeps_the_beginning_of_long_prompts():
    trained = WanTokenizer(small_tokenizer(), 7)
    longer = WanTokenizer(small_tokenizer(), 100)
    (ids,), _ = trained.encode([PROMPTS[4]])
    (whole,), _ = longer.encode([PROMPTS[4]])
    assert ids.tolist() == [*whole[:6].tolist(), 1]


def test_prompts_too_long_are_named(tokenizer):
    tokenizer.check(PROMPTS[0])
    count = tokenizer.count(PROMPTS[4])
    with pytest.raises(ValueError, match=f"at most {LIMIT} tokens, got {count}"):
        tokenizer.check(PROMPTS[4])


def test_one_string_is_no_list(tokenizer):
    with pytest.raises(ValueError, match="expected a list of prompts"):
        tokenizer.encode("a fox")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a \n\t b\u3000c ", "a b c"),
        ("&amp;lt;fox&amp;gt;", "<fox>"),
        ("cafÃ© â€œfoxâ€\x9d", 'café "fox"'),
        ("雪の中の狐，奔跑", "雪の中の狐,奔跑"),
        ("", ""),
    ],
)
def test_cleaned_text(text, cleaned):
    assert clean_text(text) == cleaned


@pytest.mark.parametrize("place", [".", "tokenizer", "google/umt5-xxl"])
def test_loads_from_either_layout(tmp_path, tokenizer, place):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("tokenizer.json").write_text(str(GOLDENS["tokenizer"]), encoding="utf-8")
    for path in (tmp_path, folder, folder / "tokenizer.json", str(folder)):
        loaded = WanTokenizer.load(path, LIMIT)
        for found, expected in zip(loaded.encode(PROMPTS), tokenizer.encode(PROMPTS), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_settings_in_the_file_do_not_matter(tmp_path, tokenizer):
    other = tokenizers.Tokenizer.from_str(str(GOLDENS["tokenizer"]))
    other.enable_truncation(3)
    other.enable_padding(length=99, pad_id=2)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = WanTokenizer.load(tmp_path, LIMIT)
    np.testing.assert_array_equal(loaded.encode(PROMPTS)[0], tokenizer.encode(PROMPTS)[0])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected one of .*tokenizer\.json"):
        WanTokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        WanTokenizer.load(tmp_path / "nowhere")


def test_sentencepiece_alone_is_not_enough(tmp_path):
    model = tmp_path / "spiece.model"
    model.write_bytes(b"\n\x0e")
    for path in (tmp_path, model):
        with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json, got a Sentence"):
            WanTokenizer.load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 1}', b"\xff\xfe\x00", b"version http"])
def test_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer"):
        WanTokenizer.load(tmp_path)


def test_other_tokenizers_are_refused(tmp_path):
    other = tokenizers.Tokenizer.from_str(str(GOLDENS["tokenizer"]))
    other.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer that adds </s>"):
        WanTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="expected length >= 1, got 0"):
        WanTokenizer(small_tokenizer(), 0)
