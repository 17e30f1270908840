"""Small Wan models of random weights, in folders like downloads: to try things out, and to test."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import tempfile

import numpy as np
import tokenizers

from ..config import ImageConfig, TextConfig, TransformerConfig, VAEConfig, WanConfig
from ..presets import MODELS
from .detect import NOTE
from .parts import part_entries
from .save import export_weights

#: Kinds of model by the published one that each is a small version of.
KINDS = {
    "t2v": "wan2.1-t2v-1.3B",
    "i2v": "wan2.1-i2v-14B-480P",
    "flf2v": "wan2.1-flf2v-14B-720P",
    "t2v-two": "wan2.2-t2v-A14B",
    "i2v-two": "wan2.2-i2v-A14B",
    "ti2v": "wan2.2-ti2v-5B",
}

_WORDS = (
    "a", "the", "red", "blue", "cat", "dog", "fox", "runs", "sleeps", "in", "on", "snow", "rain",
    "blurry", "static",
)  # fmt: skip
_MEAN, _STD = (0.3, -0.2, 0.1, 0.0, 0.5, -0.4), (1.5, 0.8, 1.1, 2.0, 0.7, 1.2)


def small_config(kind: str = "t2v", dtype: str = "float32") -> WanConfig:
    """A small model of one of `KINDS`, with sizes of its own: 3 heads, 6 latent channels.

    Raises:
      ValueError: there is no such kind.

    Example:
      config = small_config("t2v-two")
    """
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}")
    model, channels = MODELS[KINDS[kind]], 6
    vae = VAEConfig(
        dim=8, decoder_dim=8, latent_channels=channels, multipliers=(1, 2, 2, 2), blocks=1,
        mean=_MEAN, std=_STD, patch=model.vae.patch, residual=model.vae.residual,
    )  # fmt: skip
    image = positions = None
    if model.image is not None:
        image = ImageConfig(dim=24, heads=3, ffn_dim=40, layers=3, size=28, patch=7, dtype=dtype)
    if image is not None and model.needs_last_image:
        positions = 2 * ((image.size // image.patch) ** 2 + 1)
    transformer = TransformerConfig(
        dim=48, heads=3, layers=3, ffn_dim=84, out_channels=channels,
        in_channels=channels + (4 + channels if model.needs_image else 0),
        text_dim=20, freq_dim=32, image_dim=None if image is None else image.dim,
        image_positions=positions, per_token_time=model.first_frame, dtype=dtype,
    )  # fmt: skip
    text = TextConfig(
        vocabulary=len(_WORDS) + 40, dim=20, heads=2, head_dim=8, ffn_dim=28, layers=2,
        buckets=8, max_distance=20, dtype=dtype,
    )  # fmt: skip
    return dataclasses.replace(
        model, name=f"small-{kind}", transformer=transformer, vae=vae, text=text, image=image,
        steps=6, frames=9, size=(48, 32),
    )  # fmt: skip


def parts_of(config: WanConfig) -> list[str]:
    """The names of a model's parts with weights, as in `PARTS`."""
    two = ["transformer_2"] if config.boundary is not None else []
    clip = ["image_encoder"] if config.image is not None else []
    return ["transformer", *two, "vae", "text_encoder", *clip]


def random_params(config: WanConfig, part: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of a part by our names; no norm is one and no bias zero."""
    rng = np.random.default_rng([seed, *part.encode()])
    params = {}
    for entry in part_entries(config, part):
        value = rng.standard_normal(entry.full_shape)
        if entry.name.endswith("scale"):
            value = 1 + 0.1 * value
        elif entry.name.endswith("kernel"):
            value *= math.prod(entry.stored[1:]) ** -0.5
        elif entry.name != "embed":
            value *= 0.2
        params[entry.name] = value.astype(np.float32)
    return params


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """A `tokenizer.json` of the kind that umT5 has: Unigram pieces, and an end."""
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz▁,."]
    words = [(f"▁{word}", -3.0) for word in _WORDS]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    model = tokenizers.models.Unigram([*special, *words, *letters], unk_id=2, byte_fallback=False)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens([name for name, _ in special])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def random_folder(
    folder: pathlib.Path | str,
    config: WanConfig | str = "t2v",
    convention: str = "diffusers",
    seed: int = 0,
) -> pathlib.Path:
    """Writes a model of random weights as models are published; its videos are noise.

    Everything that takes a folder of Wan weights takes this one: `WanPipeline.open`,
    `vmonarch generate`, `vmonarch finetune`, and in the layout of Diffusers Diffusers, too. That
    layout says all sizes by itself. The original one leaves out those of autoencoder and encoders,
    so our own note lies in the folder there.

    Args:
      folder: that is made; half a megabyte for a small model.
      config: sizes, or one of `KINDS`.
      convention: "diffusers" or "original".
      seed: of the weights.

    Returns:
      The folder.

    Raises:
      ValueError: the folder is there already, or as `small_config` and `export_weights`.

    Example:
      folder = random_folder("small-wan", "ti2v")
      video = WanPipeline.open(folder)(Request.of(small_config("ti2v"), prompt="a red fox"))
    """
    folder = pathlib.Path(folder)
    config = small_config(config) if isinstance(config, str) else config
    parts = {part: random_params(config, part, seed) for part in parts_of(config)}
    with tempfile.TemporaryDirectory() as elsewhere:
        tokenizer = write_tokenizer(pathlib.Path(elsewhere) / "tokenizer")
        export_weights(folder, config, parts, convention, shard_bytes=100_000, tokenizer=tokenizer)
    if convention == "diffusers":
        (folder / NOTE).unlink()
    return folder
