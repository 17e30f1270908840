"""Makes goldens/wan/pipeline.npz: latents and videos of Diffusers' pipelines on random weights.

Run with torch, diffusers and this project installed: `python tests/goldens/make_wan_pipeline.py`.
"""

import pathlib
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config
from wan_pipeline_cases import CASES, STORED
from wan_pipeline_reference import reference

OUT = pathlib.Path(__file__).parent / "wan" / "pipeline.npz"


def main():
    """Writes the file."""
    arrays = {}
    for name in STORED:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            weights = random_folder(pathlib.Path(folder) / "wan", small_config(case.kind))
            latents, video = reference(weights, case)
        arrays[f"{name}_latents"] = latents
        # of one frame in four, one pixel in two: the autoencoders have goldens of their own
        arrays[f"{name}_video"] = video[:, ::4, ::2, ::2]
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main()
