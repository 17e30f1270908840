"""The causal autoencoders: equal to what Diffusers made, in any pieces, in bounded memory."""

import dataclasses
import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from flax import nnx
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.keys_vae import vae_entries
from vmonarch_jax.models.wan.presets import VAE_2_1, VAE_2_2
from vmonarch_jax.models.wan.vae import WanVAE
from wan_vae_cases import (
    CASES,
    FLAT,
    SHORTCUTS,
    abstract_vae,
    inputs_of,
    relative_error,
    vae_of,
)

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "wan" / "vae.npz")
TINY = dataclasses.replace(FLAT, dim=4, decoder_dim=4, multipliers=(1, 2), halve_time=(True,))
FORMS = {
    "flat": TINY,
    "shortcuts": dataclasses.replace(TINY, multipliers=(2, 2), patch=2, residual=True),
}
# The flat form is also under test in every golden.
EACH_FORM = pytest.mark.parametrize(
    "config",
    [pytest.param(c, id=n, marks=[pytest.mark.slow] * (n == "flat")) for n, c in FORMS.items()],
)
PUBLISHED = {"wan2.1": VAE_2_1, "wan2.2": VAE_2_2}


def video_and_latents(config, frames=7, height=3, width=2, batch=2):
    draw = np.random.RandomState(2)
    time, rows, columns = config.strides
    size = (batch, time * (frames - 1) + 1, rows * height, columns * width, 3)
    video = draw.uniform(-1, 1, size).astype(np.float32)
    latents = draw.standard_normal((batch, frames, height, width, config.latent_channels))
    return video, latents.astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_encode_equals_golden(name):
    case = CASES[name]
    video, _ = inputs_of(case)
    latents = jit(vae_of(case.config).encode)(video)
    assert latents.shape == (case.batch, *case.latents, case.config.latent_channels)
    assert relative_error(latents, GOLDENS[f"{name}.latents"]) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_decode_equals_golden(name):
    case = CASES[name]
    _, latents = inputs_of(case)
    video = jit(vae_of(case.config).decode)(latents)
    assert video.shape == (case.batch, *case.video, 3)
    assert relative_error(video, GOLDENS[f"{name}.video"]) <= 1e-5


@pytest.mark.parametrize("method", ["encode", "decode"])
@EACH_FORM
def test_any_chunk_gives_the_same_and_later_frames_change_nothing(config, method):
    run = getattr(vae_of(config), method)
    decodes = method == "decode"
    x = video_and_latents(config)[decodes]
    one = jit(run)(x)
    # 6 latent frames come after the first: a rest of 2
    chex.assert_trees_all_close(one, jit(functools.partial(run, chunk=4))(x), atol=5e-6)
    # 2 come after it: nothing but rest
    pixels = config.strides[0] * 2 + 1
    frames, made = (3, pixels) if decodes else (pixels, 3)
    short = jit(functools.partial(run, chunk=9))(x[:, :frames])
    chex.assert_trees_all_close(one[:, :made], short, atol=5e-6)


def test_sample_draws_from_the_posterior():
    rebuild, params = split_params(vae_of(TINY))
    channels = TINY.latent_channels
    # a log variance of its own for each channel, whatever the video: that of the last is clipped
    log_variance = jnp.array([-1.0, 0.5, 1.0, -90.0])
    params["quant.kernel"] = params["quant.kernel"].at[:, channels:].set(0)
    params["quant.bias"] = params["quant.bias"].at[channels:].set(log_variance)
    video, _ = video_and_latents(TINY, frames=2)
    vae = rebuild(params)
    mean = jit(vae.encode)(video)
    key = jax.random.key(3)
    drawn = jit(lambda video, key: vae.encode(video, sample=key))(video, key)
    deviation = jnp.exp(jnp.maximum(log_variance, -30) / 2) / jnp.array(TINY.std)
    noise = jax.random.normal(key, mean.shape)
    chex.assert_trees_all_close(drawn - mean, deviation * noise, atol=1e-5)


@pytest.mark.parametrize("method", ["encode", "decode"])
@EACH_FORM
def test_memory_does_not_grow_with_frames(config, method):
    rebuild, params = split_params(abstract_vae(config))

    def analysis(frames):
        x = video_and_latents(config, frames)[method == "decode"]
        run = jit(lambda params, x: getattr(rebuild(params), method)(x))
        return run.lower(params, x).compile().memory_analysis()

    short, long = analysis(4), analysis(40)
    assert long.output_size_in_bytes > 9 * short.output_size_in_bytes
    # moments are twice the latents, and are split into them after the last frame
    extra = 2.5 * long.output_size_in_bytes if method == "encode" else 1024
    assert long.temp_size_in_bytes <= short.temp_size_in_bytes + extra


def test_bfloat16_round_trip():
    config = FORMS["shortcuts"]
    narrow = dataclasses.replace(config, dtype="bfloat16")
    video, _ = video_and_latents(config, frames=2)
    vae = vae_of(config)
    params = {k: x.astype(jnp.bfloat16) for k, x in split_params(vae)[1].items()}

    @jit
    def round_trip(params, video):
        vae = split_params(abstract_vae(narrow))[0](params)
        latents = vae.encode(video)
        return latents, vae.decode(latents)

    latents, out = round_trip(params, video)
    exact = jit(vae.encode)(video)
    for x, expected in ((latents, exact), (out, video)):
        chex.assert_shape(x, expected.shape)
        assert x.dtype == jnp.float32
    assert relative_error(latents, exact) < 0.05
    assert float(jnp.abs(out).max()) <= 1


@pytest.mark.parametrize("config", [*(c.config for c in CASES.values()), VAE_2_1, VAE_2_2])
def test_entries_cover_every_parameter_once(config):
    entries = vae_entries(config)
    _, params = split_params(abstract_vae(config))
    assert {e.name: e.full_shape for e in entries} == {k: v.shape for k, v in params.items()}
    for keys in ([e.diffusers for e in entries], [e.original for e in entries]):
        assert len(set(keys)) == len(keys) == len(params)


def test_entries_there_and_back():
    draw = np.random.RandomState(0)
    for entry in vae_entries(SHORTCUTS):
        stored = draw.standard_normal(entry.stored)
        np.testing.assert_array_equal(entry.theirs(entry.ours(stored)), stored)


@pytest.mark.parametrize(
    ("config", "name", "diffusers", "original", "stored"),
    [
        (
            VAE_2_1,
            "encoder.levels.1.blocks.0.shortcut.kernel",
            "encoder.down_blocks.3.conv_shortcut.weight",
            "encoder.downsamples.3.shortcut.weight",
            (192, 96, 1, 1, 1),
        ),
        (
            VAE_2_1,
            "decoder.levels.1.double.time.kernel",
            "decoder.up_blocks.1.upsamplers.0.time_conv.weight",
            "decoder.upsamples.7.time_conv.weight",
            (768, 384, 3, 1, 1),
        ),
        (
            VAE_2_2,
            "encoder.levels.2.halve.space.kernel",
            "encoder.down_blocks.2.downsampler.resample.1.weight",
            "encoder.downsamples.2.downsamples.2.resample.1.weight",
            (640, 640, 3, 3),
        ),
        (
            VAE_2_2,
            "decoder.levels.3.blocks.0.norm1.scale",
            "decoder.up_blocks.3.resnets.0.norm1.gamma",
            "decoder.upsamples.3.upsamples.0.residual.0.gamma",
            (512, 1, 1, 1),
        ),
        (
            VAE_2_2,
            "encoder.middle.attention.qkv.kernel",
            "encoder.mid_block.attentions.0.to_qkv.weight",
            "encoder.middle.1.to_qkv.weight",
            (1920, 640, 1, 1),
        ),
    ],
)
def test_published_keys(config, name, diffusers, original, stored):
    entry = next(e for e in vae_entries(config) if e.name == name)
    assert (entry.diffusers, entry.original, entry.stored) == (diffusers, original, stored)


@pytest.mark.parametrize(
    ("config", "pixels", "latents"),
    [
        (VAE_2_1, (81, 480, 832), (21, 60, 104, 16)),
        (VAE_2_2, (121, 704, 1280), (31, 44, 80, 48)),
    ],
    ids=PUBLISHED,
)
def test_full_size_shapes(config, pixels, latents):
    def both(video, z):
        vae = WanVAE(config, rngs=nnx.Rngs(0))
        return vae.encode(video), vae.decode(z)

    video = jax.ShapeDtypeStruct((1, *pixels, 3), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *latents), jnp.float32)
    encoded, decoded = jax.eval_shape(both, video, z)
    assert (encoded.shape, decoded.shape) == (z.shape, video.shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 32, 32, 3), r"frames of 2 n \+ 1.*got 4, 32 and 32"),
        ((1, 5, 31, 32, 3), r"height of 2 n.*got 5, 31 and 32"),
        ((1, 5, 32, 33, 3), r"width of 2 n.*got 5, 32 and 33"),
        ((1, 5, 32, 32, 4), r"expected a video .*3\], got \(1, 5, 32, 32, 4\)"),
        ((5, 32, 32, 3), r"expected a video .*3\], got \(5, 32, 32, 3\)"),
    ],
)
def test_encode_refuses(shape, message):
    with pytest.raises(ValueError, match=message):
        abstract_vae(TINY).encode(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 2, 3, 2, 5), (2, 3, 2, 4), (1, 0, 3, 2, 4)])
def test_decode_refuses(shape):
    with pytest.raises(ValueError, match="got"):
        abstract_vae(TINY).decode(jnp.zeros(shape))


def test_chunk_below_one_is_refused():
    vae = abstract_vae(TINY)
    for method, x in zip((vae.encode, vae.decode), video_and_latents(TINY), strict=True):
        with pytest.raises(ValueError, match="chunk of at least 1 latent frame, got 0"):
            method(x, chunk=0)


def test_widths_that_no_shortcut_fits_are_refused():
    for wrong in ({"multipliers": (1, 7, 7, 7)}, {"multipliers": (3, 2, 4, 7)}):
        with pytest.raises(ValueError, match="shortcut, got"):
            abstract_vae(dataclasses.replace(SHORTCUTS, **wrong))
