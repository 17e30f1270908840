"""Writes `wan/text.npz` and `wan/clip.npz`: what Transformers makes of the test cases.

Run from the repository's root with torch, Transformers and Diffusers installed:
`PYTHONPATH=tests python tests/goldens/make_wan_text.py`. Weights and inputs are drawn from a seed
by `wan_encoder_cases`, so that only the outputs are stored, and the trained tokenizer.
"""

from pathlib import Path

import numpy as np
from wan_encoder_cases import (
    IMAGES,
    LIMIT,
    PICTURES,
    PROMPTS,
    TEXTS,
    image_inputs,
    picture,
    small_tokenizer,
    text_inputs,
)
from wan_encoder_reference import (
    reference_image_encoder,
    reference_image_states,
    reference_pixels,
    reference_prompt_states,
    reference_squeezed,
    reference_text_encoder,
    reference_text_states,
)

if __name__ == "__main__":
    folder = Path(__file__).parent / "wan"
    texts = {
        name: reference_text_states(reference_text_encoder(config), *text_inputs(name))
        for name, config in TEXTS.items()
    }
    tokenizer = small_tokenizer()
    texts["tokenizer"] = np.array(tokenizer.to_str())
    model = reference_text_encoder(TEXTS["odd"])
    texts["prompts"] = reference_prompt_states(model, tokenizer, PROMPTS, LIMIT)
    np.savez_compressed(folder / "text.npz", **texts)

    images = {
        name: reference_image_states(reference_image_encoder(config), image_inputs(config))
        for name, config in IMAGES.items()
    }
    for name in PICTURES:
        images[f"pixels.{name}"] = reference_pixels(picture(name), 28).astype(np.float32)
        images[f"squeezed.{name}"] = reference_squeezed(picture(name), 28)
    np.savez_compressed(folder / "clip.npz", **images)
