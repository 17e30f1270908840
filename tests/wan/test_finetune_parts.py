"""What tuning a Wan model is made of: adapters, loss and times, and the folder it writes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close
from vmonarch_jax.models import FlowConfig, split_params
from vmonarch_jax.models.flow import sample_times
from vmonarch_jax.models.wan.finetune import tune as tuning
from vmonarch_jax.models.wan.finetune.adapters import (
    LoRA,
    adapt,
    deltas_of,
    projections_of,
    split_adapters,
)
from vmonarch_jax.models.wan.finetune.loss import error_sum, noised, times_of
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.presets import MODELS
from vmonarch_jax.models.wan.transformer import WanTransformer
from vmonarch_jax.models.wan.weights.detect import detect
from vmonarch_jax.models.wan.weights.load import load_part
from vmonarch_jax.models.wan.weights.lora import merge_lora, save_lora
from vmonarch_jax.models.wan.weights.random_folder import (
    parts_of,
    random_params,
    small_config,
    write_tokenizer,
)
from vmonarch_jax.models.wan.weights.save import export_weights, save_weights


@functools.cache
def small_model():
    config = dataclasses.replace(small_config("i2v").transformer, remat="full")
    return config, random_params(small_config("i2v"), "transformer")


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, state):
    config, _ = small_model()
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(2, 3, 4, 6, config.in_channels)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(2, 7, config.text_dim)), jnp.float32)
    image = jnp.asarray(rng.normal(size=(2, 5, config.image_dim)), jnp.float32)
    return nnx.merge(graph, state)(latents, jnp.array([900.0, 30.0]), text, image)


def test_adapters_are_what_the_file_says(tmp_path):
    """Inside the model and merged onto its weights from the file, for every projection."""
    config, base = small_model()

    def create():
        model = WanTransformer(config, rngs=nnx.Rngs(0))
        groups = {name.split(".")[0] for name in projections_of(model)}
        lora = LoRA(rank=3, alpha=6, projections=tuple(sorted(groups)))
        return adapt(model, lora, rngs=nnx.Rngs(1))

    adapted = split_params(nnx.eval_shape(create))[0]
    start = split_adapters(jax.jit(lambda: split_params(create())[1])())[0]
    assert len(start) == 2 * (4 + 6 + 2)
    plain = split_params(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))[0]
    before = forward(*nnx.split(plain(base)))
    unmoved = forward(*nnx.split(adapted(base | start)))
    assert_close(unmoved, before, "float32", "forward")

    rng = np.random.default_rng(2)
    moved = {n: (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32) for n, a in start.items()}
    entries = transformer_entries(config)
    save_lora(tmp_path / "lora.safetensors", deltas_of(moved), entries, 2.0)
    merged = merge_lora(base, tmp_path / "lora.safetensors", entries)
    inside, outside = forward(*nnx.split(adapted(base | moved))), forward(*nnx.split(plain(merged)))
    scale = np.abs(outside).max()
    assert np.abs(outside - before).max() > 0.1 * scale
    np.testing.assert_allclose(inside / scale, outside / scale, atol=3e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "expected rank >= 1, got 0"),
        ({"alpha": 0.0}, "expected alpha > 0, got 0.0"),
        ({"projections": ()}, "at least one projection"),
    ],
)
def test_lora_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        LoRA(**fields)


# Loss


def test_loss_hides_captions_and_gives_first_frames():
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(6, 3, 2, 2, 4)), jnp.float32)
    batch = {"latents": latents, "text": jnp.ones((6, 5, 2))}
    seen = {}

    def velocity(x, time, text, image):
        seen.update(x=x, time=time, text=text, image=image)
        return jnp.zeros(latents.shape)

    def run(share=0.0, dropout=0.5, **more):
        flow = FlowConfig(caption_dropout=dropout, shift=5.0)
        shown = noised(
            batch | more, jnp.zeros((5, 2)), jax.random.key(0), flow=flow, first_frame_share=share
        )
        return error_sum(velocity, shown, more.get("image")) / shown.judged.sum()

    plain = run()
    hidden = np.asarray(seen["text"] == 0).all((1, 2))
    assert set(hidden) == {True, False}
    assert seen["time"].shape == (6,)
    assert 0 < seen["time"].min() < seen["time"].max() < 1000
    run(dropout=0.0, beside=jnp.full((6, 3, 2, 2, 5), 7.0), image="states")
    assert (seen["text"] == 1).all()
    assert (seen["x"][..., 4:] == 7).all()
    assert seen["image"] == "states"

    share = run(share=0.5)
    given = np.asarray(seen["time"][:, 0] == 0)
    assert set(given) == {True, False}
    assert (seen["time"][:, 1:] > 0).all()
    np.testing.assert_array_equal(seen["x"][given, 0], latents[given, 0])
    assert (seen["x"][~given, 0] != latents[~given, 0]).all()
    assert share != plain
    # frames that are given are not judged: a loss over the others alone
    everything = run(share=1.0)
    t = seen["time"][:, 1][:, None, None, None, None] / 1000
    noise = (seen["x"] - (1 - t) * latents) / t
    expected = jnp.square(noise - latents)[:, 1:].mean()
    np.testing.assert_allclose(everything, expected, rtol=1e-4)


def test_each_expert_is_tuned_at_its_own_times():
    config = MODELS["wan2.2-t2v-A14B"]
    flow = FlowConfig(shift=config.shift)
    high, low = (times_of(config, part) for part in ("transformer", "transformer_2"))
    assert (high, low) == ((0.875, 1.0), (0.0, 0.875))
    assert times_of(MODELS["wan2.1-t2v-14B"], "transformer") == (0.0, 1.0)
    key = jax.random.key(3)
    everything = np.asarray(sample_times(key, 4000, flow))
    for low_end, high_end in (high, low):
        times = np.asarray(sample_times(key, 4000, flow, (low_end, high_end)))
        assert low_end - 1e-6 <= times.min() < times.max() <= high_end + 1e-6
        kept = everything[(everything >= low_end) & (everything <= high_end)]
        np.testing.assert_allclose(np.median(times), np.median(kept), atol=3e-3)


@pytest.mark.parametrize("convention", ["diffusers", "original", "orbax"])
def test_whole_models_keep_their_layout(tmp_path, convention):
    config = small_config("t2v-two")
    parts = {part: random_params(config, part) for part in parts_of(config)}
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    if convention == "orbax":
        save_weights(tmp_path / "wan", config, parts, tokenizer)
    else:
        export_weights(
            tmp_path / "wan", config, parts, convention, dtype=jnp.bfloat16,
            shard_bytes=100_000, tokenizer=tokenizer,
        )  # fmt: skip
    found = detect(tmp_path / "wan")
    tuned = {n: jnp.asarray(2 * v) for n, v in parts["transformer_2"].items()}
    for _ in range(2):  # the second time over the first
        tuning.save_model(tmp_path / "tuned", found, "transformer_2", tuned)
    again = detect(tmp_path / "tuned")
    again.require(*again.required)
    assert (again.config, again.convention) == (found.config, convention)
    for part in parts:
        old, new = (split_params(load_part(f, part, None))[1] for f in (found, again))
        factor = 2 if part == "transformer_2" else 1
        for name, value in old.items():
            assert new[name].dtype == value.dtype
            np.testing.assert_array_equal(new[name], factor * value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer", "tuned", "wan"]
