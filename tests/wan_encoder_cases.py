"""Small text and image encoders that are like no published one, their weights and inputs.

All is drawn from a seed, in an order and by a generator that never change, so that what
Transformers made of it can be stored without it.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers, processors, trainers
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.clip import CLIPVision
from vmonarch_jax.models.wan.config import ImageConfig, TextConfig
from vmonarch_jax.models.wan.keys_clip import clip_entries
from vmonarch_jax.models.wan.keys_text import text_entries
from vmonarch_jax.models.wan.umt5 import UMT5Encoder

TEXTS = {
    # heads * head_dim is not dim, distances reach past max_distance, lengths are odd
    "odd": TextConfig(
        vocabulary=53, dim=24, heads=3, head_dim=5, ffn_dim=37, layers=3, buckets=8,
        max_distance=11, dtype="float32",
    ),
    "published_buckets": TextConfig(
        vocabulary=31, dim=16, heads=2, head_dim=6, ffn_dim=20, layers=1, dtype="float32"
    ),
}  # fmt: skip
LENGTHS = {"odd": (13, 37), "published_buckets": (301, 150)}
IMAGES = {
    "gelu": ImageConfig(
        dim=24, heads=3, ffn_dim=37, layers=4, patch=7, size=21, dtype="float32"
    ),
    "quick_gelu": ImageConfig(
        dim=20, heads=2, ffn_dim=32, layers=2, patch=5, size=20, eps=1e-3, dtype="float32",
        activation="quick_gelu",
    ),
}  # fmt: skip
# Height and width of pictures: landscape, portrait, square, smaller than the encoder's.
PICTURES = {"landscape": (37, 90), "portrait": (71, 30), "square": (45, 45), "small": (9, 14)}
PROMPTS = (
    "a red fox in the snow",
    "",
    "  The &amp;amp; fox \n runs\t runs ",
    "cafÃ© â€œfoxâ€\x9d jumps",
    "a lazy dog jumps over the quick brown fox in the snow and runs and runs and runs",
    "雪の中の狐 zebra?",
)
LIMIT = 16
_CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "a red fox runs in the snow",
    "a lazy brown dog & a quick fox: they jump, run and rest",
) * 3


def stored_weights(entries, seed: int = 0) -> dict[str, np.ndarray]:
    """A random state dict by Transformers' keys; no norm is one and no bias zero."""
    draw, weights = np.random.RandomState(seed), {}
    for entry in entries:
        for key in entry.keys("diffusers"):
            value = draw.standard_normal(entry.stored)
            if entry.name.endswith("scale"):
                value = 1 + 0.3 * value
            elif entry.name.endswith("kernel"):
                value *= 1.5 * math.prod(entry.stored[1:]) ** -0.5
            weights[key] = value.astype(np.float32)
    return weights


def fill(model: nnx.Module, entries, weights, convention: str = "diffusers") -> nnx.Module:
    """The model with these weights."""
    params = {}
    for entry in entries:
        rows = [entry.ours(weights[key], convention) for key in entry.keys(convention)]
        params[entry.name] = jnp.array(np.stack(rows) if entry.layers else rows[0])
    return split_params(model)[0](params)


def abstract(kind, config, **kwargs) -> nnx.Module:
    """A model without its parameters."""
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), **kwargs))


def text_encoder(config: TextConfig, weights=None, convention: str = "diffusers") -> UMT5Encoder:
    """With these weights, or random ones."""
    weights = stored_weights(text_entries(config)) if weights is None else weights
    return fill(abstract(UMT5Encoder, config), text_entries(config), weights, convention)


def image_encoder(config: ImageConfig, weights=None, convention: str = "diffusers") -> CLIPVision:
    """With these weights, or random ones."""
    weights = stored_weights(clip_entries(config)) if weights is None else weights
    return fill(abstract(CLIPVision, config), clip_entries(config), weights, convention)


def text_inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of two texts, one or both shorter than the arrays."""
    lengths = LENGTHS[name]
    draw = np.random.RandomState(1)
    tokens = draw.randint(0, TEXTS[name].vocabulary, (2, max(lengths) + 2)).astype(np.int32)
    mask = (np.arange(tokens.shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
    return tokens, mask


def image_inputs(config: ImageConfig) -> np.ndarray:
    """Two normalised pictures."""
    draw = np.random.RandomState(2)
    return draw.standard_normal((2, config.size, config.size, 3)).astype(np.float32)


def picture(name: str) -> np.ndarray:
    """Noise over a gradient: resampling shows in both."""
    height, width = PICTURES[name]
    slope = np.linspace(0, 150, height * width * 3).reshape(height, width, 3)
    return (slope + np.random.RandomState(3).randint(0, 105, slope.shape)).astype(np.uint8)


def small_tokenizer() -> tokenizers.Tokenizer:
    """Of the kind that umT5's is: Unigram, blanks as marks, ids 0 and 1 special."""
    return tokenizers.Tokenizer.from_str(_trained())


@functools.cache  # training again would give other ids
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=50,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer.to_str()


def relative_error(value, expected) -> float:
    """Largest difference over the largest expected value."""
    return float(np.abs(np.asarray(value) - expected).max() / np.abs(expected).max())
