"""Weights: files read without torch, folders recognised, strict loading, saving, exporting."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.weights import save as save_module
from vmonarch_jax.models.wan.weights.configs import (
    config_to_json,
    write_config,
    write_original,
)
from vmonarch_jax.models.wan.weights.detect import NOTE, detect
from vmonarch_jax.models.wan.weights.entry import Entry
from vmonarch_jax.models.wan.weights.load import check_keys, load_params, load_part
from vmonarch_jax.models.wan.weights.save import export_weights, save_weights
from wan_weights import (
    IMAGE,
    SMALL,
    TRANSFORMER,
    assert_same,
    diffusers_folder,
    random_params,
    tensors_of,
    write_folder,
    written,
)

HERE = Path(__file__).parent
PTH = HERE.parent / "goldens/wan/tensors.pth"

# A linear layer with heads, a norm, one that other repositories store fused, a convolution.
ENTRIES = (
    Entry("blocks.q", "b.{}.to_q.weight", "l.{}.qkv.weight", (5, 2, 3), (6, 5), (1, 0), layers=4,
          piece=(0, 2)),
    Entry("blocks.k", "b.{}.to_k.weight", "l.{}.qkv.weight", (5, 2, 3), (6, 5), (1, 0), layers=4,
          piece=(1, 2)),
    Entry("norm", "norm.weight", "norm.gamma", (5,), (5,), original_stored=(5, 1, 1)),
    Entry("conv", "conv.weight", "conv.weight", (2, 3, 5, 7), (7, 5, 2, 3), (2, 3, 1, 0)),
)  # fmt: skip


def params_of(model):
    return {name: np.asarray(value) for name, value in split_params(model)[1].items()}


# --- strict loading


def entry_tensors(convention, dtype=np.float32):
    random = np.random.default_rng(3)
    found = {}
    for entry in ENTRIES:
        for key in entry.keys(convention):
            found[key] = random.normal(size=entry.shape_in(convention)).astype(dtype)
    return found


def test_layout_by_hand(tmp_path):
    tensors = entry_tensors("diffusers")
    stored = written(tmp_path, tensors)
    check_keys(stored, ENTRIES, "diffusers")
    params = load_params(stored, ENTRIES, "diffusers", lambda _: jnp.float32)
    for n in range(4):
        want = tensors[f"b.{n}.to_q.weight"]
        assert params["blocks.q"][n, 4, 1, 2] == want[1 * 3 + 2, 4]
    assert params["conv"][1, 2, 3, 4] == tensors["conv.weight"][4, 3, 1, 2]

    tensors = entry_tensors("original")
    stored = written(tmp_path, tensors, "o.safetensors")
    check_keys(stored, ENTRIES, "original")
    params = load_params(stored, ENTRIES, "original", lambda _: jnp.bfloat16)
    assert params["blocks.k"].dtype == jnp.bfloat16
    fused = tensors["l.2.qkv.weight"].astype(ml_dtypes.bfloat16)
    assert params["blocks.q"][2, 4, 1, 2] == fused[5, 4]
    assert params["blocks.k"][2, 4, 1, 2] == fused[6 + 5, 4]
    for entry in ENTRIES:
        key = entry.keys("original")[0]
        value = entry.theirs(np.asarray(params[entry.name])[0 if entry.layers else ...], "original")
        start = entry.piece[0] * len(value)
        want = tensors[key][start : start + len(value)].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(value, want)


def test_large_tensors_are_copied_in_blocks(tmp_path):
    entry = Entry("w", "w", "w", (700, 3, 300), (900, 700), (1, 0))
    value = np.random.default_rng(0).normal(size=(900, 700)).astype(np.float32)
    params = load_params(written(tmp_path, {"w": value}), (entry,), "diffusers")
    np.testing.assert_array_equal(params["w"], value.T.reshape(700, 3, 300))


def test_every_problem_is_said_once(tmp_path):
    tensors = entry_tensors("diffusers")
    del tensors["b.1.to_q.weight"], tensors["norm.weight"]
    tensors["b.2.to_k.weight"] = np.zeros((5, 6), np.float32)
    tensors["conv.weight"] = np.zeros((7, 5, 2, 3), np.int32)
    tensors |= {"lost.weight": np.zeros(2, np.float32), "drop.9.x": np.zeros(1, np.float32)}
    with pytest.raises(ValueError) as raised:
        check_keys(written(tmp_path, tensors), ENTRIES, "diffusers", ("drop.*",), "here")
    assert str(raised.value).splitlines() == [
        "here: expected 10 keys of the diffusers convention, got 5 problems:",
        "  missing b.1.to_q.weight (our blocks.q[1]), expected (6, 5)",
        "  b.2.to_k.weight (our blocks.k[2]): expected (6, 5), got (5, 6)",
        "  missing norm.weight (our norm), expected (5,)",
        "  conv.weight (our conv): expected floats, got int32",
        "  unexpected lost.weight of (2,) (no parameter of ours)",
    ]


def test_host_memory_is_the_model_and_one_tensor(tmp_path):
    side = 512
    entries = tuple(
        Entry(f"w{n}", f"w{n}.{{}}", "", (side, side), (side, side), (1, 0), layers=4)
        for n in range(8)
    )
    value = np.zeros((side, side), np.float32)
    stored = written(tmp_path, {key: value for e in entries for key in e.keys("diffusers")})
    del value
    dtype = jnp.dtype(jnp.bfloat16)
    one = 4 * side * side * dtype.itemsize
    load_params(stored, entries[:1], "diffusers", lambda _: dtype)  # what JAX keeps once
    tracemalloc.start()
    params = load_params(stored, entries, "diffusers", lambda _: dtype)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    model = sum(value.nbytes for value in params.values())
    assert model == 8 * one
    # Aligned arrays become JAX's own on a CPU; elsewhere no more than one is on the host.
    assert peak < model + one + 200_000


# --- folders


@pytest.mark.parametrize("config", [SMALL, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("convention", ["diffusers", "original"])
def test_transformers_of_both_conventions(tmp_path, config, convention):
    params = random_params(config)
    tensors = tensors_of(config, params, convention)
    if convention == "diffusers":
        tensors["blocks.0.attn2.norm_added_q.weight"] = np.ones(24, np.float32)  # never read
        sizes = write_config("transformer", config)
    else:
        sizes = write_original(config)
        assert not {"patch", "text_dim", "image_dim"} & sizes.keys(), "as published: left out"
    write_folder(tmp_path, tensors, sizes)
    found = detect(tmp_path)
    assert found.convention == convention
    assert found.config.transformer == config.transformer
    assert found.config.name == tmp_path.name
    assert_same(params_of(load_part(found, "transformer", jnp.float32)), params)


def test_dtypes(tmp_path):
    params = random_params(SMALL)
    diffusers_folder(tmp_path, SMALL, params, np.float16)
    found = detect(tmp_path)
    model = split_params(load_part(found, "transformer"))[1]
    assert {str(value.dtype) for value in model.values()} == {"bfloat16", "float32"}
    kept = {name for name, value in model.items() if value.dtype == jnp.float32}
    assert {"time.inner.kernel", "blocks.modulation", "blocks.cross_norm.scale"} <= kept
    assert not any("attn.q." in name or "mlp" in name for name in kept)
    wanted = params["blocks.attn.q.kernel"].astype(np.float16).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(model["blocks.attn.q.kernel"]), wanted)
    stored = split_params(load_part(found, "transformer", None))[1]
    assert stored["blocks.attn.q.kernel"].dtype == jnp.float16


@pytest.mark.parametrize("convention", ["diffusers", "original"])
@pytest.mark.parametrize("noted", [True, False], ids=["note", "no note"])
def test_export_is_read_back(tmp_path, convention, noted):
    experts = dataclasses.replace(SMALL, boundary=0.875)
    parts = {"transformer": random_params(experts), "transformer_2": random_params(experts, seed=1)}
    if noted or convention == "diffusers":  # the original layout has no sizes of the VAE
        parts["vae"] = random_params(experts, "vae")
    tokenizer = tmp_path / "tok"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    folder = tmp_path / "out"
    export_weights(folder, experts, parts, convention, shard_bytes=30_000, tokenizer=tokenizer)
    files = list(folder.rglob("*-of-*.safetensors"))
    assert len(files) > 4
    assert max(path.stat().st_size for path in files) < 30_000 + 5_000  # and a header
    if not noted:
        (folder / NOTE).unlink()
    found = detect(folder)
    assert found.convention == convention
    assert (found.tokenizer / "tokenizer.json").is_file()
    if noted or convention == "diffusers":
        assert dataclasses.replace(found.config, name="small", shift=5.0) == dataclasses.replace(
            experts, guidance=found.config.guidance, guidance_low=found.config.guidance_low,
            steps=found.config.steps, size=found.config.size,
        )  # fmt: skip
    for name in parts:
        assert_same(params_of(load_part(found, name, jnp.float32)), parts[name])


def test_export_in_one_file_of_another_dtype(tmp_path):
    params = random_params(SMALL)
    export_weights(tmp_path / "x", SMALL, {"transformer": params}, dtype=jnp.bfloat16)
    tensors = load_file(tmp_path / "x/transformer/diffusion_pytorch_model.safetensors")
    want = {
        key: value.astype(ml_dtypes.bfloat16)
        for key, value in tensors_of(SMALL, params, "diffusers").items()
    }
    assert_same(tensors, want)
    with pytest.raises(ValueError, match="expected convention of diffusers or original, got 'x'"):
        export_weights(tmp_path / "y", SMALL, {"transformer": params}, "x")
    wrong = {**params, "more": np.zeros(1)}
    del wrong["patch.bias"]
    with pytest.raises(ValueError, match=r"missing patch\.bias\n  unexpected more"):
        export_weights(tmp_path / "y", SMALL, {"transformer": wrong})


def test_saved_and_restored(tmp_path):
    parts = {name: random_params(SMALL, name) for name in ("transformer", "vae")}
    save_weights(tmp_path / "x", SMALL, parts)
    found = detect(tmp_path / "x")
    assert (found.config, found.convention) == (SMALL, "orbax")
    for name, params in parts.items():
        assert_same(params_of(load_part(found, name, jnp.float32)), params)
    half = split_params(load_part(found, "transformer"))[1]
    assert half["blocks.attn.q.kernel"].dtype == jnp.bfloat16
    assert half["blocks.modulation"].dtype == jnp.float32
    # modules are saved as they are
    save_weights(tmp_path / "y", SMALL, {"transformer": load_part(found, "transformer")})
    again = split_params(load_part(detect(tmp_path / "y"), "transformer", None))[1]
    assert {k: v.dtype for k, v in again.items()} == {k: v.dtype for k, v in half.items()}
    with pytest.raises(ValueError, match="expected no such folder"):
        save_weights(tmp_path / "x", SMALL, parts)


def test_a_save_that_is_cut_off_changes_nothing(tmp_path, monkeypatch):
    folder, first = tmp_path / "x", random_params(SMALL)
    save_weights(folder, SMALL, {"transformer": first})
    other = {"transformer": random_params(SMALL, seed=1)}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(save_module, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            save_weights(folder, SMALL, other, overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            export_weights(tmp_path / "y", SMALL, other)
    assert not (tmp_path / "y").exists()
    assert_same(params_of(load_part(detect(folder), "transformer", jnp.float32)), first)
    folder.rename(tmp_path / ".x.replaced")  # as if it had ended between two renames
    with pytest.raises(ValueError, match="expected no such folder"):
        save_weights(folder, SMALL, other)
    save_weights(folder, SMALL, other, overwrite=True)
    got = params_of(load_part(detect(folder), "transformer", jnp.float32))
    assert_same(got, other["transformer"])
    assert sorted(p.name for p in tmp_path.iterdir() if "y" not in p.name) == ["x"]


def test_damaged_saves(tmp_path):
    folder = tmp_path / "x"
    save_weights(folder, SMALL, {"transformer": random_params(SMALL)})
    (folder / "transformer/_METADATA").unlink()
    with pytest.raises(ValueError, match="expected a complete set of parameters"):
        load_part(detect(folder), "transformer")
    note = json.loads((folder / NOTE).read_text())
    (folder / NOTE).write_text(json.dumps(note | {"convention": "other"}))
    with pytest.raises(ValueError, match="expected convention of orbax"):
        detect(folder)
    other = dataclasses.replace(TRANSFORMER, ffn_dim=44)
    wrong = config_to_json(dataclasses.replace(SMALL, transformer=other))
    (folder / NOTE).write_text(json.dumps(note | {"config": wrong}))
    save_weights(tmp_path / "y", SMALL, {"transformer": random_params(SMALL)})
    (tmp_path / "y" / NOTE).write_text(json.dumps(note | {"config": wrong}))
    with pytest.raises(ValueError, match=re.escape("of shape (3, 24, 44), got (3, 24, 40)")):
        load_part(detect(tmp_path / "y"), "transformer")


def test_eight_devices_read_their_shares(tmp_path):
    # The number of CPU devices is fixed when JAX starts, so this takes a process of its own.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, HERE.parent / "wan_weights_sharded.py", tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "devices": 8,
        "loaded": True,
        "split": True,
        "shares": True,
        "restored elsewhere": True,
        "exported": True,
        "lora": True,
    }
