"""Diffusers' Wan transformer with our cases' weights; needs torch."""

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from wan_transformer_cases import Case, inputs_of, stored_weights


def reference_model(case: Case) -> WanTransformer3DModel:
    """Diffusers' model of a case."""
    config = case.config
    model = WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        eps=config.eps,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim if config.image_dim else None,
        pos_embed_seq_len=config.image_positions,
    )
    weights = stored_weights(config)
    model.load_state_dict({key: torch.from_numpy(x) for key, x in weights.items()}, strict=True)
    return model.eval()


def reference_output(case: Case, model: WanTransformer3DModel) -> np.ndarray:
    """What it makes of the case's inputs, channels last."""
    arrays = {n: None if x is None else torch.from_numpy(x) for n, x in inputs_of(case).items()}
    image = arrays["image"]
    if case.config.image_positions:
        # Diffusers takes two images as two samples.
        image = image.reshape(2 * len(image), -1, image.shape[-1])
    with torch.no_grad():
        out = model(
            hidden_states=arrays["latents"].permute(0, 4, 1, 2, 3),
            timestep=arrays["time"],
            encoder_hidden_states=arrays["text"],
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]
    return out.permute(0, 2, 3, 4, 1).contiguous().numpy()
