"""Transformers' encoders in the place of ours."""

import types

import numpy as np
import torch
from diffusers import WanPipeline
from tokenizers import Tokenizer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vmonarch_jax.models.wan.config import ImageConfig, TextConfig
from vmonarch_jax.models.wan.keys_clip import clip_entries
from vmonarch_jax.models.wan.keys_text import text_entries
from wan_encoder_cases import stored_weights


def reference_text_encoder(config: TextConfig) -> UMT5EncoderModel:
    """With the random weights of the test cases."""
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocabulary,
            d_model=config.dim,
            d_kv=config.head_dim,
            d_ff=config.ffn_dim,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
        )
    ).eval()
    weights = stored_weights(text_entries(config))
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
    return model


@torch.no_grad()
def reference_text_states(model: UMT5EncoderModel, tokens, mask) -> np.ndarray:
    """The last hidden states."""
    tokens, mask = torch.tensor(tokens).long(), torch.tensor(mask)
    return model(tokens, mask).last_hidden_state.numpy()


def reference_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Transformers' face of a tokenizer."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@torch.no_grad()
def reference_prompt_states(model, tokenizer, prompts, length: int) -> np.ndarray:
    """What `WanPipeline` gives its transformer."""
    parts = types.SimpleNamespace(
        text_encoder=model, tokenizer=reference_tokenizer(tokenizer), _execution_device="cpu"
    )
    states = WanPipeline._get_t5_prompt_embeds(parts, list(prompts), max_sequence_length=length)
    return states.numpy()


def reference_image_encoder(config: ImageConfig) -> CLIPVisionModel:
    """With the random weights of the test cases; those of the last block are Transformers'."""
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.size,
            patch_size=config.patch,
            hidden_act=config.activation,
            layer_norm_eps=config.eps,
        )
    ).eval()
    weights = {
        key.removeprefix("vision_model."): torch.tensor(value)
        for key, value in stored_weights(clip_entries(config)).items()
    }
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model


@torch.no_grad()
def reference_image_states(model: CLIPVisionModel, pixels) -> np.ndarray:
    """What `WanImageToVideoPipeline` gives its transformer."""
    pixels = torch.tensor(pixels).permute(0, 3, 1, 2)
    return model(pixels, output_hidden_states=True).hidden_states[-2].numpy()


def reference_squeezed(image: np.ndarray, size: int) -> np.ndarray:
    """A picture as the original repository prepares it, channels last."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    square = torch.nn.functional.interpolate(
        pixels.mul(2).sub(1), size=(size, size), mode="bicubic", align_corners=False
    )
    mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((square[0].mul(0.5).add(0.5) - mean) / std).permute(1, 2, 0).numpy()


def reference_pixels(image: np.ndarray, size: int) -> np.ndarray:
    """A picture as `CLIPImageProcessor` prepares it, channels last."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    pixels = processor(images=image, return_tensors="np", input_data_format="channels_last")
    return pixels["pixel_values"][0].transpose(1, 2, 0)
