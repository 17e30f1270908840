"""Weights against the reference libraries: theirs read here, ours read there, to the bit."""

import pytest

pytest.importorskip("torch")

import dataclasses
import json

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from diffusers.loaders import lora_conversion_utils, single_file_utils
from safetensors.torch import save_file
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.config import ImageConfig, TextConfig, VAEConfig
from vmonarch_jax.models.wan.weights.configs import config_to_json, write_config, write_original
from vmonarch_jax.models.wan.weights.detect import NOTE, detect
from vmonarch_jax.models.wan.weights.load import load_part
from vmonarch_jax.models.wan.weights.lora import merge_lora, save_lora
from vmonarch_jax.models.wan.weights.parts import part_entries
from vmonarch_jax.models.wan.weights.save import export_weights
from vmonarch_jax.models.wan.weights.stored import Stored
from wan_weights import IMAGE, SMALL, VAE, random_params, tensors_of

RESIDUAL = VAEConfig(
    dim=4, decoder_dim=6, latent_channels=4, multipliers=(1, 2, 2), blocks=1,
    halve_time=(False, True), patch=2, residual=True, mean=(0.5,) * 4, std=(2.0,) * 4,
)  # fmt: skip
TEXT = TextConfig(vocabulary=70, dim=10, heads=3, head_dim=4, ffn_dim=14, layers=2, buckets=8)
CLIP = ImageConfig(dim=16, heads=2, ffn_dim=24, layers=3, patch=5, size=15)
FULL = dataclasses.replace(IMAGE, vae=VAE, text=TEXT, image=CLIP)
RESIDUAL_FULL = dataclasses.replace(SMALL, vae=RESIDUAL, text=TEXT)

CLASSES = {
    "transformer": diffusers.WanTransformer3DModel,
    "transformer_2": diffusers.WanTransformer3DModel,
    "vae": diffusers.AutoencoderKLWan,
    "text_encoder": transformers.UMT5EncoderModel,
    "image_encoder": transformers.CLIPVisionModel,
}


def theirs(config, part, seed=0):
    """A part with random weights as its own library makes it from our sizes."""
    torch.manual_seed(seed)
    settings = write_config(part, config)
    if part == "text_encoder":
        return CLASSES[part](transformers.UMT5Config(**settings))
    if part == "image_encoder":
        return CLASSES[part](transformers.CLIPVisionConfig(**settings))
    return CLASSES[part].from_config(settings)


def parts_of(config):
    return ["transformer", "vae", "text_encoder"] + ["image_encoder"] * (config.image is not None)


def params_of(model):
    return {name: np.asarray(value) for name, value in split_params(model)[1].items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(value), err_msg=name)


@pytest.mark.parametrize("config", [FULL, RESIDUAL_FULL], ids=["image", "residual"])
def test_a_folder_goes_here_and_home(tmp_path, config):
    models = {part: theirs(config, part, n) for n, part in enumerate(parts_of(config))}
    for part, model in models.items():
        model.save_pretrained(tmp_path / "a" / part, max_shard_size="20KB")
    found = detect(tmp_path / "a")
    assert found.convention == "diffusers"
    for field in ("transformer", "vae", "text", "image"):
        if field != "image" or config.image is not None:
            assert getattr(found.config, field) == getattr(config, field)
    parts = {part: params_of(load_part(found, part, jnp.float32)) for part in models}

    export_weights(tmp_path / "b", found.config, parts, shard_bytes=20_000)
    for part, model in models.items():
        back = CLASSES[part].from_pretrained(tmp_path / "b" / part).state_dict()
        want = model.state_dict()
        if part == "image_encoder":  # the last block and what follows it are no part of Wan
            unused = ("layers.2.", "post_layernorm", "position_ids")
            back, want = (
                {k: v for k, v in d.items() if not any(name in k for name in unused)}
                for d in (back, want)
            )
        assert_same(back, want)


def test_experts_load_as_a_pipeline(tmp_path):
    config = dataclasses.replace(SMALL, text=TEXT, boundary=0.875)
    names = ("transformer", "transformer_2", "vae", "text_encoder")
    parts = {part: random_params(config, part, n) for n, part in enumerate(names)}
    export_weights(tmp_path / "x", config, parts)
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "x", tokenizer=None)
    assert pipe.config.boundary_ratio == 0.875
    assert pipe.scheduler.config.flow_shift == config.shift
    for part, params in parts.items():
        got = {k: v.numpy() for k, v in getattr(pipe, part).state_dict().items()}
        want = tensors_of(config, params, "diffusers", part)
        got.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
        assert_same(got, want)
    pipe.save_pretrained(tmp_path / "y")
    found = detect(tmp_path / "y")
    assert (found.config.boundary, found.config.transformer) == (0.875, config.transformer)
    for part, params in parts.items():
        assert_same(params_of(load_part(found, part, jnp.float32)), params)


@pytest.mark.parametrize("config", [SMALL, IMAGE], ids=["text", "image"])
def test_original_keys_are_those_that_diffusers_converts(tmp_path, config):
    params = random_params(config)
    export_weights(tmp_path / "x", config, {"transformer": params}, "original")
    stored = Stored(detect(tmp_path / "x").parts["transformer"])
    state = {key: torch.from_numpy(tensor.read().copy()) for key, tensor in stored.items()}
    converted = single_file_utils.convert_wan_transformer_to_diffusers(state)
    assert_same(converted, tensors_of(config, params, "diffusers"))


def test_original_keys_of_the_vae(tmp_path):
    # Diffusers converts the published depth only.
    deep = {"multipliers": (1, 2, 4, 4), "blocks": 2, "halve_time": (False, True, True)}
    config = dataclasses.replace(SMALL, vae=dataclasses.replace(VAE, **deep))
    params = random_params(config, "vae")
    state = {
        key: torch.from_numpy(value)
        for key, value in tensors_of(config, params, "original", "vae").items()
    }
    converted = single_file_utils.convert_wan_vae_to_diffusers(dict(state))
    assert_same(converted, tensors_of(config, params, "diffusers", "vae"))


def fused(config, params):
    """The CLIP file of the original: queries, keys, values in one, and a text encoder beside."""
    tensors = {}
    for entry in part_entries(config, "image_encoder"):
        rows = params[entry.name] if entry.layers else params[entry.name][None]
        for key, row in zip(entry.keys("original"), rows, strict=True):
            tensors.setdefault(key, []).append(entry.theirs(row, "original"))
    state = {key: torch.from_numpy(np.concatenate(pieces)) for key, pieces in tensors.items()}
    unused = ("visual.transformer.2.mlp.0.weight", "visual.post_norm.weight", "visual.head")
    unused += ("textual.head.0.weight", "log_scale")
    return state | {key: torch.ones(3) for key in unused}


def test_original_layout_with_pth_files(tmp_path):
    parts = {part: random_params(FULL, part, n) for n, part in enumerate(parts_of(FULL))}
    tensors = tensors_of(FULL, parts["transformer"], "original")
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(write_original(FULL)))
    note = {"convention": "original", "config": config_to_json(FULL)}
    (tmp_path / NOTE).write_text(json.dumps(note))  # sizes, which the layout has nowhere
    for part, name in (("vae", "Wan2.1_VAE"), ("text_encoder", "models_t5_umt5-xxl-enc-bf16")):
        tensors = tensors_of(FULL, parts[part], "original", part)
        dtype = torch.float32 if part == "vae" else torch.bfloat16
        state = {key: torch.from_numpy(value).to(dtype) for key, value in tensors.items()}
        torch.save(state, tmp_path / f"{name}.pth")
    clip = {key: value.half() for key, value in fused(FULL, parts["image_encoder"]).items()}
    torch.save(clip, tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")

    found = detect(tmp_path)
    assert (found.convention, found.config) == ("original", FULL)
    for part in ("transformer", "vae"):
        assert_same(params_of(load_part(found, part, jnp.float32)), parts[part])
    for part, dtype in (("text_encoder", jnp.bfloat16), ("image_encoder", jnp.float16)):
        want = {name: value.astype(dtype) for name, value in parts[part].items()}
        assert_same(params_of(load_part(found, part, None)), want)


def test_pth_of_torch(tmp_path):
    base = torch.randn(40)
    tensors = {
        "plain": torch.randn(3, 4),
        "transposed": torch.randn(5, 3).T,
        "half": torch.randn(7).half(),
        "bfloat": torch.randn(3, 2).bfloat16(),
        "window": base[5:25].view(4, 5)[:, 1:3],
        "repeated": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(3.0),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    for name, saved in (("a", tensors), ("b", {"state_dict": tensors})):
        torch.save(saved, tmp_path / f"{name}.pth")
        stored = Stored([tmp_path / f"{name}.pth"])
        assert stored.keys() == tensors.keys()
        for key, value in tensors.items():
            got = stored[key].read()
            assert str(value.dtype) == f"torch.{got.dtype}"
            np.testing.assert_array_equal(got.astype(np.float64), value.detach().double().numpy())
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    torch.save(model.state_dict(), tmp_path / "c.pth")
    assert_same(
        {key: tensor.read() for key, tensor in Stored([tmp_path / "c.pth"]).items()},
        model.state_dict(),
    )
    torch.save(model, tmp_path / "d.pth")
    with pytest.raises(ValueError, match=r"got torch\.nn\.modules\.container\.Sequential"):
        Stored([tmp_path / "d.pth"])
    torch.save(tensors, tmp_path / "e.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"expected a zip archive as torch\.save writes"):
        Stored([tmp_path / "e.pth"])


def lora_state(form):
    """A LoRA of the attentions and the MLP of every layer, as trainers write it."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(3):
        for module in [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + [
            "ffn.0", "ffn.2",
        ]:  # fmt: skip
            inputs, outputs = {"ffn.0": (24, 40), "ffn.2": (40, 24)}.get(module, (24, 24))
            name = f"blocks.{layer}.{module}"
            name = f"diffusion_model.{name}"
            down, up = "lora_A", "lora_B"
            if form == "kohya":
                name = "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")
            if form != "original":
                down, up = "lora_down", "lora_up"
                state[f"{name}.alpha"] = torch.tensor(3.0)
            if form == "distilled":
                state[f"{name}.diff_b"] = torch.randn(outputs, generator=generator)
            state[f"{name}.{down}.weight"] = torch.randn(2, inputs, generator=generator)
            state[f"{name}.{up}.weight"] = torch.randn(outputs, 2, generator=generator)
    if form == "distilled":
        state |= beside_the_blocks(generator)
    return state


def beside_the_blocks(generator):
    """What LoRAs of distilled models hold besides: full differences, those of norms all zero."""
    state = {}
    for name, inputs, outputs in (
        ("text_embedding.0", 10, 24), ("text_embedding.2", 24, 24), ("time_projection.1", 24, 144),
        ("time_embedding.0", 8, 24), ("time_embedding.2", 24, 24),
    ):  # fmt: skip
        state[f"{name}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
        state[f"{name}.diff_b"] = torch.randn(outputs, generator=generator)
    state["head.head.diff"] = torch.randn(16, 24, generator=generator)
    state["head.head.diff_b"] = torch.randn(16, generator=generator)
    state["blocks.1.norm3.diff"] = state["blocks.1.norm3.diff_b"] = torch.zeros(24)
    state["blocks.0.self_attn.norm_q.diff"] = torch.zeros(24)
    return {f"diffusion_model.{key}": value.clone() for key, value in state.items()}


@pytest.mark.parametrize("form", ["kohya", "original", "distilled"])
def test_lora_as_diffusers_reads_it(tmp_path, form):
    state = lora_state(form)
    save_file(state, tmp_path / "x.safetensors")
    convert = {
        "kohya": lora_conversion_utils._convert_musubi_wan_lora_to_diffusers,
        "original": lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers,
        "distilled": lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers,
    }[form]
    converted = convert(dict(state))
    # three tensors of each module, and five modules and the head beside the blocks
    assert len(converted) == (3 * (3 * 10 + 6) if form == "distilled" else 3 * 10 * 2)
    params = random_params(SMALL)
    want = {key: torch.from_numpy(v) for key, v in tensors_of(SMALL, params, "diffusers").items()}
    for key in [k for k in converted if k.endswith("lora_A.weight")]:
        up, down = converted[key.replace("lora_A", "lora_B")], converted[key]
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        want[f"{module}.weight"] = want[f"{module}.weight"] + 0.6 * (up @ down)
        bias = converted.get(key.replace("lora_A.weight", "lora_B.bias"))
        if bias is not None:
            want[f"{module}.bias"] = want[f"{module}.bias"] + 0.6 * bias
    entries = part_entries(SMALL, "transformer")
    merged = merge_lora(params, tmp_path / "x.safetensors", entries, 0.6)
    got = tensors_of(SMALL, {k: np.asarray(v) for k, v in merged.items()}, "diffusers")
    error = max(
        float(np.abs(got[key] - value.numpy()).max() / np.abs(value.numpy()).max())
        for key, value in want.items()
    )
    print(f"LoRA, {form}: relative error {error:.1e}")
    assert error <= 1e-6


def test_lora_that_we_write(tmp_path):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 24, 2)), random.normal(size=(3, 2, 40))
    deltas = {"blocks.mlp_in.kernel": (a.astype(np.float32), b.astype(np.float32))}
    entries = part_entries(SMALL, "transformer")
    for convention in ("diffusers", "original"):
        save_lora(tmp_path / f"{convention}.safetensors", deltas, entries, 2.0, convention)
    load = diffusers.WanPipeline.lora_state_dict
    plain, converted = (
        load(tmp_path, weight_name=f"{convention}.safetensors", local_files_only=True)
        for convention in ("diffusers", "original")
    )
    assert len(plain) == 6
    assert_same(converted, plain)
    key = "transformer.blocks.1.ffn.net.0.proj.lora_{}.weight"
    product = plain[key.format("B")] @ plain[key.format("A")]
    np.testing.assert_allclose(product.numpy(), 2 * (a[1] @ b[1]).T, rtol=1e-5, atol=1e-5)
