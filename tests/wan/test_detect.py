"""Which model a folder holds, in which layout, and what is said of folders that hold none."""

import dataclasses
import json

import numpy as np
import pytest
from vmonarch_jax.models.wan.presets import MODELS, VAE_2_1, VAE_2_2
from vmonarch_jax.models.wan.weights.configs import (
    config_from_json,
    config_to_json,
    write_config,
    write_original,
)
from vmonarch_jax.models.wan.weights.detect import NOTE, detect
from vmonarch_jax.models.wan.weights.load import load_part
from vmonarch_jax.models.wan.weights.parts import part_entries
from vmonarch_jax.models.wan.weights.save import export_weights
from wan_weights import (
    IMAGE,
    SMALL,
    diffusers_folder,
    random_params,
    tensors_of,
    write_folder,
)


def shapes_only(folder, config, convention):
    """Files of a published size with headers and holes where the values would be."""
    header, offset = {}, 0
    for entry in part_entries(config, "transformer"):
        for key in entry.keys(convention):
            shape = entry.shape_in(convention)
            last = offset + 2 * int(np.prod(shape))
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, last]}
            offset = last
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("convention", ["diffusers", "original"])
def test_published_models_are_recognised(tmp_path, name, convention):
    config = MODELS[name]
    folder = tmp_path / name
    two = config.boundary is not None
    if convention == "diffusers":
        places = ["transformer", "transformer_2"] if two else ["transformer"]
        index = {"boundary_ratio": config.boundary, "expand_timesteps": config.first_frame}
        (folder / "scheduler").mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps(index))
        scheduler = {"flow_shift": config.shift}
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    else:
        places = ["high_noise_model", "low_noise_model"] if two else ["."]
        folder.mkdir()
        version = "2.2" if config.vae is VAE_2_2 else "2.1"
        (folder / f"Wan{version}_VAE.pth").write_bytes(b"")
        (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"")
        (folder / "google/umt5-xxl").mkdir(parents=True)
    for place in places:
        shapes_only(folder / place, config, convention)
        sizes = write_config("transformer", config)
        if convention == "original":
            sizes = write_original(config)
        (folder / place / "config.json").write_text(json.dumps(sizes))
    found = detect(folder)
    assert found.config == config
    assert ("transformer_2" in found.parts) == two
    if convention == "original":
        assert found.parts["vae"] == (folder / f"Wan{version}_VAE.pth",)
        assert found.tokenizer == folder / "google/umt5-xxl"
    alone = detect(folder / places[0])
    assert alone.config.transformer == config.transformer


def test_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match="expected a folder of Wan weights, got none"):
        detect(tmp_path / "none")
    with pytest.raises(ValueError, match=r"high_noise_model .*; found an empty folder"):
        detect(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"found readme\.txt"):
        detect(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "expected json, got damaged text"),
        ("[]", "expected a json object, got list"),
        ('{"_class_name": "WanVACETransformer3DModel"}', "expected WanTransformer3DModel, got Wan"),
        ('{"qk_norm": "rms_norm"}', "expected qk_norm of 'rms_norm_across_heads', got 'rms_norm'"),
        ('{"image_dim": 8}', "expected image_dim and added_kv_proj_dim together, got 8 and None"),
        ('{"num_layers": 0}', "expected layers >= 1, got 0"),
        ("{}", r"expected diffusion_pytorch_model\.safetensors, or its shards; found config"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            detect(tmp_path)
    write_folder(tmp_path, tensors_of(SMALL, random_params(SMALL), "original"))
    config.write_text(json.dumps(write_original(SMALL) | {"model_type": "s2v"}))
    with pytest.raises(ValueError, match="expected model_type of t2v, i2v, ti2v or flf2v, got 's2"):
        detect(tmp_path)


def test_missing_shards_and_damaged_indices(tmp_path):
    export_weights(tmp_path / "x", SMALL, {"transformer": random_params(SMALL)}, shard_bytes=20_000)
    place = tmp_path / "x/transformer"
    shards = sorted(place.glob("*.safetensors"))
    assert len(shards) > 3
    index = place / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text()
    for damaged, message in (
        ("{}", "expected weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "expected weight_map from keys to files"),
        (text[: len(text) // 2], "expected json, got damaged"),
    ):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            detect(tmp_path / "x")
    index.write_text(text)
    shards[1].rename(tmp_path / "away.safetensors")
    with pytest.raises(ValueError, match=rf"got no {shards[1].name}: is the download complete"):
        detect(tmp_path / "x")
    index.unlink()
    with pytest.raises(ValueError, match=rf"got no {shards[1].name}: is the download complete"):
        detect(tmp_path / "x")


def test_missing_parts_are_all_named(tmp_path):
    found = detect(diffusers_folder(tmp_path, SMALL, random_params(SMALL)))
    with pytest.raises(
        ValueError, match=r"expected vae \(a folder vae\), text_encoder .*tokenizer"
    ):
        found.require(*found.required)
    with pytest.raises(ValueError, match="expected vae"):
        load_part(found, "vae")
    with pytest.raises(ValueError, match="expected a part of"):
        load_part(found, "audio")
    with pytest.raises(ValueError, match="a part image_encoder, got"):
        load_part(found, "image_encoder")


def test_vae_of_other_channels(tmp_path):
    parts = {name: random_params(SMALL, name) for name in ("transformer", "vae")}
    export_weights(tmp_path / "x", SMALL, parts)
    (tmp_path / "x" / NOTE).unlink()
    config = dataclasses.replace(SMALL, vae=VAE_2_1)
    (tmp_path / "x/vae/config.json").write_text(json.dumps(write_config("vae", config)))
    with pytest.raises(ValueError, match="expected a VAE of the transformer's 4 channels, got one"):
        detect(tmp_path / "x")


def test_configurations_go_through_json():
    for config in (*MODELS.values(), SMALL, IMAGE):
        assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    with pytest.raises(ValueError, match="expected a configuration of a Wan model"):
        config_from_json({"name": "x"})
