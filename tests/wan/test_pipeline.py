"""Whole pipelines against goldens of Diffusers, and what they promise about memory and loading."""

import dataclasses
import pathlib
import weakref

import jax
import numpy as np
import pytest
from vmonarch_jax.models import AttentionSchedule
from vmonarch_jax.models.wan.conditions import fit_image, size_like
from vmonarch_jax.models.wan.config import with_dtype
from vmonarch_jax.models.wan.pipeline import WanPipeline
from vmonarch_jax.models.wan.presets import MODELS
from vmonarch_jax.models.wan.request import Request
from vmonarch_jax.models.wan.weights.random_folder import random_folder, small_config
from wan_pipeline_cases import CASES, STORED

import vmonarch_jax as vm

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "wan" / "pipeline.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("weights") / "wan", small_config("t2v-two"))


@pytest.mark.parametrize(
    "name", [STORED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in STORED[1:])]
)
def test_video_of_diffusers(name, tmp_path):
    case, stored = CASES[name], np.load(GOLDENS)
    pipeline = WanPipeline.open(random_folder(tmp_path / "wan", small_config(case.kind)), "float32")
    conditions = pipeline.conditions(case.request, case.pixels(), case.last_pixels())
    got = pipeline.denoise(case.request, conditions, case.noise())
    expected = stored[f"{name}_latents"]
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    got, expected = pipeline.decode(got)[:, ::4, ::2, ::2], stored[f"{name}_video"]
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_one_part_at_a_time(folder):
    """Text encoder, both experts and autoencoder follow each other; none is held twice."""
    pipeline = WanPipeline.open(folder, "float32")
    load, order, alive = pipeline._load, [], []

    def watched(part):
        assert not any(model() is not None for model in alive), "a part is still held"
        model = load(part)
        order.append(part)
        alive.append(weakref.ref(model))
        return model

    pipeline._load = watched
    request = CASES["two_experts"].request
    steps = []
    video = pipeline(request, on_step=lambda n, state: steps.append((n, state.x.shape)))
    assert order == ["text_encoder", "transformer", "transformer_2", "vae"]
    assert steps == [(n, (1, 2, 4, 8, 6)) for n in range(1, 6)]
    assert video.shape == (1, 5, 32, 64, 3)
    assert np.abs(video).max() <= 1


def test_a_schedule_is_one_method_after_the_other_and_one_call_is_two(folder):
    pipeline = WanPipeline.open(folder, "float32")
    request = dataclasses.replace(CASES["two_experts"].request, steps=3)
    conditions = pipeline.conditions(request)
    noise = pipeline.noise(request)

    def run(attention, **options):
        return np.asarray(
            pipeline.denoise(request, conditions, noise, attention=attention, **options)
        )

    kept = {}
    dense = run(None, on_step=lambda n, state: kept.update({n: state}))
    mixed = run(AttentionSchedule(vm.VMonarch(recompute_frames=0), warmup_steps=2))
    assert np.abs(dense - mixed).max() > 1e-4
    by_hand = run(vm.VMonarch(recompute_frames=0), start=(2, kept[2]))
    np.testing.assert_array_equal(by_hand, mixed)
    np.testing.assert_allclose(run(vm.Dense(), batched=False), dense, atol=1e-4)


def test_goes_on_from_a_kept_step_bit_for_bit(folder):
    pipeline = WanPipeline.open(folder, "float32")
    request = CASES["two_experts"].request
    conditions = pipeline.conditions(request)
    kept = {}
    latents = pipeline.denoise(
        request, conditions, pipeline.noise(request), on_step=lambda n, s: kept.update({n: s})
    )
    start = 2, jax.tree.map(np.asarray, kept[2])
    again = pipeline.denoise(request, conditions, pipeline.noise(request), start=start)
    np.testing.assert_array_equal(again, latents)


def test_defaults_are_the_authors():
    request = Request.of(MODELS["wan2.2-t2v-A14B"], prompt="a cat")
    assert (request.steps, request.shift, request.guidance) == (40, 12.0, 4.0)
    experts = request.experts(MODELS["wan2.2-t2v-A14B"])
    assert experts[0] == ("transformer", 4.0)
    assert experts[-1] == ("transformer_2", 3.0)
    one = Request.of(MODELS["wan2.2-t2v-A14B"], prompt="a cat", guidance=5.0)
    assert one.experts(MODELS["wan2.2-t2v-A14B"])[-1] == ("transformer_2", 5.0)
    small = MODELS["wan2.1-t2v-1.3B"]
    assert Request.of(small, prompt="a cat").latent_shape(small) == (1, 21, 60, 104, 16)
    assert with_dtype(small, "float32").transformer.dtype == "float32"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ()}, "expected a prompt"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "guidance": 0.5}, "guidance >= 1"),
        ({"prompt": "a", "steps": 0}, "steps >= 1"),
        ({"prompt": "a", "sampler": "heun"}, "sampler"),
        ({"prompt": "a", "image_fit": "pad"}, "expected an image_fit of .*, got 'pad'"),
        ({"prompt": "a", "size": (830, 480)}, "832x480"),
        ({"prompt": "a", "frames": 80}, "81 frames"),
    ],
)
def test_request_errors(given, message):
    with pytest.raises(ValueError, match=message):
        Request.of(MODELS["wan2.1-t2v-1.3B"], **given)


def test_image_errors(folder):
    pipeline = WanPipeline.open(folder, "float32")
    request = CASES["two_experts"].request
    with pytest.raises(ValueError, match="expected no image"):
        pipeline.conditions(request, np.zeros((32, 64, 3), np.uint8))
    images = WanPipeline(small_config("ti2v"), {})
    with pytest.raises(ValueError, match=r"expected an image of \(32, 64, 3\)"):
        images.conditions(request, np.zeros((64, 32, 3), np.uint8))
    pixels = np.zeros((32, 64, 3), np.uint8)
    for kind, given, message in (
        ("flf2v", (pixels,), "between two images: expected a last image, got none"),
        ("flf2v", (None, pixels), "makes a video from an image: expected one, got none"),
        ("i2v", (pixels, pixels), "knows of no last image: expected none, got one"),
        ("ti2v", (pixels, pixels), "knows of no last image"),
        ("i2v-two", (pixels, pixels[::2]), r"expected an image of .*, got \(16, 64, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            WanPipeline(small_config(kind), {}).conditions(request, *given)
    one = dataclasses.replace(request, frames=1)
    with pytest.raises(ValueError, match="expected frames >= 2 between two images, got 1"):
        WanPipeline(small_config("i2v-two"), {}).conditions(one, pixels, pixels)


@pytest.mark.parametrize(
    ("name", "image", "size"),
    [
        ("wan2.1-i2v-14B-480P", (1920, 1080), (832, 464)),
        ("wan2.1-i2v-14B-720P", (720, 1280), (720, 1280)),
        ("wan2.1-flf2v-14B-720P", (100, 100), (960, 960)),
        ("wan2.2-ti2v-5B", (1000, 500), (1312, 640)),
        ("wan2.2-i2v-A14B", (2_000, 1), (42_928, 16)),
    ],
)
def test_sizes_of_an_images_shape(name, image, size):
    from PIL import Image

    got = size_like(MODELS[name], Image.new("L", image))
    assert got == size
    Request.of(MODELS[name], prompt="a", size=got)  # the model can make it


def test_an_image_that_fits_is_untouched():
    from PIL import Image

    pixels = CASES["image_5b"].pixels()
    np.testing.assert_array_equal(fit_image(Image.fromarray(pixels), (64, 96)), pixels)
