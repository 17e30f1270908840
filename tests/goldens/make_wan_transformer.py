"""Writes `wan/transformer.npz`: what Diffusers' Wan transformer makes of the test cases.

Run from the repository's root with torch and Diffusers installed:
`PYTHONPATH=tests python tests/goldens/make_wan_transformer.py`. Weights and inputs are drawn from
a seed by `wan_transformer_cases`, so that only the outputs are stored.
"""

from pathlib import Path

import numpy as np
from wan_transformer_cases import CASES
from wan_transformer_reference import reference_model, reference_output

if __name__ == "__main__":
    path = Path(__file__).parent / "wan" / "transformer.npz"
    path.parent.mkdir(exist_ok=True)
    outputs = {name: reference_output(case, reference_model(case)) for name, case in CASES.items()}
    np.savez_compressed(path, **outputs)
