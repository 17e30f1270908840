"""Whole pipelines against those of Diffusers, on the same random weights."""

import numpy as np
import pytest

pytest.importorskip("torch")

from vmonarch_jax.models.wan.pipeline import WanPipeline
from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config
from wan_pipeline_cases import CASES
from wan_pipeline_reference import reference


@pytest.mark.parametrize("name", CASES)
def test_video_of_diffusers(name, tmp_path):
    case = CASES[name]
    folder = random_folder(tmp_path / "wan", small_config(case.kind))
    latents, video = reference(folder, case)
    pipeline = WanPipeline.open(folder, dtype="float32")
    conditions = pipeline.conditions(case.request, case.pixels(), case.last_pixels())
    got = np.asarray(pipeline.denoise(case.request, conditions, case.noise()))
    assert np.abs(got - latents).max() <= 1e-4 * np.abs(latents).max()
    got = np.asarray(pipeline.decode(got))
    assert got.shape == video.shape
    assert np.abs(got - video).max() <= 1e-4 * np.abs(video).max()
