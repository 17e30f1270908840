"""Sizes in the json files of the two layouts, and how a whole configuration is written."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ..config import ImageConfig, TextConfig, TransformerConfig, VAEConfig, WanConfig
from .stored import Stored

#: Of each part, the class that its `config.json` names in the Diffusers layout.
CLASSES = {
    "transformer": ("WanTransformer3DModel",),
    "transformer_2": ("WanTransformer3DModel",),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel",),
    "image_encoder": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
}
#: The field of `WanConfig` that shapes each part.
FIELDS = {
    "transformer": "transformer",
    "transformer_2": "transformer",
    "vae": "vae",
    "text_encoder": "text",
    "image_encoder": "image",
}
_QK_NORM = "rms_norm_across_heads"
# Our field -> theirs, where one is the other.
_TRANSFORMER = {
    "heads": "num_attention_heads",
    "layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "patch": "patch_size",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "eps": "eps",
    "image_dim": "image_dim",
    "image_positions": "pos_embed_seq_len",
}
_ORIGINAL = {
    "dim": "dim",
    "heads": "num_heads",
    "layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "text_length": "text_len",
    "freq_dim": "freq_dim",
    "eps": "eps",
}
_VAE = {
    "dim": "base_dim",
    "decoder_dim": "decoder_base_dim",
    "latent_channels": "z_dim",
    "multipliers": "dim_mult",
    "blocks": "num_res_blocks",
    "halve_time": "temperal_downsample",
    "patch": "patch_size",
    "residual": "is_residual",
    "mean": "latents_mean",
    "std": "latents_std",
}
_TEXT = {
    "vocabulary": "vocab_size",
    "dim": "d_model",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "ffn_dim": "d_ff",
    "layers": "num_layers",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}
_IMAGE = {
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "layers": "num_hidden_layers",
    "patch": "patch_size",
    "size": "image_size",
    "eps": "layer_norm_eps",
    "activation": "hidden_act",
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A json object.

    Raises:
      ValueError: there is no such file, or it holds anything else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a json file, got none") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected json, got damaged text: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a json object, got {type(found).__name__}")
    return found


def _take(found: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: found[theirs] for ours, theirs in names.items() if found.get(theirs) is not None}


def _only(found: Mapping[str, Any], **expected: Any) -> None:
    for name, value in expected.items():
        if name in found and found[name] != value:
            raise ValueError(f"expected {name} of {value!r}, got {found[name]!r}")


def _transformer(found: Mapping[str, Any]) -> TransformerConfig:
    _only(found, cross_attn_norm=True, qk_norm=_QK_NORM)
    taken: dict[str, Any] = {"heads": 40, "layers": 40, "ffn_dim": 13_824}  # their defaults
    taken |= _take(found, _TRANSFORMER)
    if (found.get("added_kv_proj_dim") is None) != (found.get("image_dim") is None):
        raise ValueError(
            "expected image_dim and added_kv_proj_dim together, got "
            f"{found.get('image_dim')} and {found.get('added_kv_proj_dim')}"
        )
    if not found.get("out_channels", 16):
        taken["out_channels"] = taken.get("in_channels", 16)
    return TransformerConfig(dim=taken["heads"] * found.get("attention_head_dim", 128), **taken)


def _vae(found: Mapping[str, Any]) -> VAEConfig:
    _only(found, attn_scales=[])
    taken = _take(found, _VAE)
    config = VAEConfig(**{"decoder_dim": taken.get("dim", 96), **taken})
    _only(found, in_channels=3 * config.patch**2, out_channels=3 * config.patch**2)
    return config


def _text(found: Mapping[str, Any]) -> TextConfig:
    _only(found, feed_forward_proj="gated-gelu")
    return TextConfig(**_take(found, _TEXT))


def _image(found: Mapping[str, Any]) -> ImageConfig:
    taken = _take(found, _IMAGE)
    # Transformers' defaults are those of a smaller CLIP, and defaults may be left out.
    small = {"dim": 768, "heads": 12, "ffn_dim": 3072, "layers": 12, "patch": 32}
    return ImageConfig(**{**small, "activation": "quick_gelu", **taken})


_READERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "transformer": _transformer,
    "transformer_2": _transformer,
    "vae": _vae,
    "text_encoder": _text,
    "image_encoder": _image,
}


def read_config(part: str, path: pathlib.Path) -> Any:
    """The sizes of a part from its `config.json` of the Diffusers layout.

    Raises:
      ValueError: the file is damaged, is of another class, or says what we do not compute.
    """
    found = read_json(path)
    named = found.get("_class_name") or next(iter(found.get("architectures") or ()), None)
    if named is not None and named not in CLASSES[part]:
        raise ValueError(f"{path}: expected {' or '.join(CLASSES[part])}, got {named}")
    try:
        return _READERS[part](found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_original(path: pathlib.Path, stored: Stored) -> tuple[str, TransformerConfig]:
    """The kind of model ("t2v", "i2v", "ti2v", "flf2v") and the sizes of an original transformer.

    What its `config.json` leaves out (patch, text and image widths, the image branch) is read off
    the shapes of the stored tensors.
    """
    found = read_json(path)
    kind = found.get("model_type", "t2v")
    if kind not in ("t2v", "i2v", "ti2v", "flf2v"):
        raise ValueError(f"{path}: expected model_type of t2v, i2v, ti2v or flf2v, got {kind!r}")
    try:
        taken = _take(found, _ORIGINAL)
        if "patch_embedding.weight" in stored:
            taken["patch"] = stored["patch_embedding.weight"].shape[2:]
        if "text_embedding.0.weight" in stored:
            taken["text_dim"] = stored["text_embedding.0.weight"].shape[1]
        if "img_emb.proj.0.weight" in stored:
            taken["image_dim"] = stored["img_emb.proj.0.weight"].shape[0]
        if "img_emb.emb_pos" in stored:
            taken["image_positions"] = stored["img_emb.emb_pos"].shape[1]
        return kind, TransformerConfig(per_token_time=kind == "ti2v", **taken)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def kind_of(config: WanConfig) -> str:
    """The original repository's `model_type`."""
    if config.first_frame:
        return "ti2v"
    if not config.takes_image:
        return "t2v"
    return "flf2v" if config.transformer.image_positions else "i2v"


def _put(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def write_config(part: str, config: WanConfig) -> dict[str, Any]:
    """What `config.json` of a part says in the Diffusers layout."""
    sizes: Any = getattr(config, FIELDS[part])
    if part in ("transformer", "transformer_2"):
        return {
            "_class_name": CLASSES[part][0],
            **_put(sizes, _TRANSFORMER),
            "attention_head_dim": sizes.head_dim,
            "added_kv_proj_dim": None if sizes.image_dim is None else sizes.dim,
            "cross_attn_norm": True,
            "qk_norm": _QK_NORM,
            "rope_max_seq_len": 1024,
        }
    if part == "vae":
        time, space, _ = sizes.strides
        return {
            "_class_name": CLASSES[part][0],
            **_put(sizes, _VAE),
            "patch_size": None if sizes.patch == 1 else sizes.patch,
            "attn_scales": [],
            "in_channels": 3 * sizes.patch**2,
            "out_channels": 3 * sizes.patch**2,
            "scale_factor_temporal": time,
            "scale_factor_spatial": space,
        }
    if part == "text_encoder":
        return {
            "architectures": list(CLASSES[part]),
            "model_type": "umt5",
            **_put(sizes, _TEXT),
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "scalable_attention": True,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }
    return {
        "architectures": [CLASSES[part][0]],
        "model_type": "clip_vision_model",
        **_put(sizes, _IMAGE),
        "num_channels": 3,
    }


def write_original(config: WanConfig) -> dict[str, Any]:
    """What `config.json` of the original layout says."""
    taken = _put(config.transformer, _ORIGINAL)
    return {"_class_name": "WanModel", "model_type": kind_of(config), **taken}


def config_to_json(config: WanConfig) -> dict[str, Any]:
    """A whole configuration as plain values."""
    return dataclasses.asdict(config)


def config_from_json(found: Mapping[str, Any]) -> WanConfig:
    """The inverse of `config_to_json`.

    Raises:
      ValueError: a field is unknown, missing or out of range.
    """
    try:
        values = dict(found)
        values["transformer"] = TransformerConfig(**values["transformer"])
        values["vae"] = VAEConfig(**values["vae"])
        values["text"] = TextConfig(**values["text"])
        values["image"] = None if values["image"] is None else ImageConfig(**values["image"])
        values["size"] = tuple(values["size"])
        return WanConfig(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"expected a configuration of a Wan model, got {type(error).__name__}: {error}"
        ) from error
