"""Writes `wan/vae.npz`: what Diffusers' Wan autoencoder makes of the test cases.

Run from the repository's root with torch and Diffusers installed:
`PYTHONPATH=tests python tests/goldens/make_wan_vae.py`. Weights, videos and latents are drawn from
a seed by `wan_vae_cases`, so that only the outputs are stored.
"""

from pathlib import Path

import numpy as np
from wan_vae_cases import CASES, inputs_of
from wan_vae_reference import reference_decode, reference_encode, reference_model

if __name__ == "__main__":
    path = Path(__file__).parent / "wan" / "vae.npz"
    path.parent.mkdir(exist_ok=True)
    outputs = {}
    for name, case in CASES.items():
        model = reference_model(case.config)
        video, latents = inputs_of(case)
        outputs[f"{name}.latents"], _ = reference_encode(model, video)
        outputs[f"{name}.video"] = reference_decode(model, latents)
    np.savez_compressed(path, **outputs)
