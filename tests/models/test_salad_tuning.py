"""SALAD's recipe on a small model: branches put in, tuned with adapters, dropped, stored."""

import dataclasses
import json
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from flax import nnx
from repository import ROOT
from vmonarch_jax.models import VideoDiT, VideoDiTConfig, load_model, load_params, split_params
from vmonarch_jax.models.arrays import read_arrays
from vmonarch_jax.models.cli import main
from vmonarch_jax.models.export import export_params
from vmonarch_jax.models.lora import init_adapters, merge_adapters
from vmonarch_jax.models.salad import (
    add_branches,
    drop_branches,
    mean_gates,
    merge_tuned,
    split_for_tuning,
)
from vmonarch_jax.models.wan.presets import MODELS
from vmonarch_jax.models.wan.transformer import WanTransformer

import vmonarch_jax as vm

CONFIG = VideoDiTConfig(frames=3, height=8, width=8, patch=(1, 2, 2), dim=24, depth=3, heads=2)
METHOD = vm.Salad(sparsity=0.5, block_size=8)


def count(model):
    return sum(math.prod(value.shape) for value in split_params(model)[1].values())


def call(config, params, method=METHOD):
    model = nnx.eval_shape(lambda: VideoDiT(config, attention=method, rngs=nnx.Rngs(0)))
    rebuild, _ = split_params(model)
    key = jax.random.key(0)
    args = jax.random.normal(key, (2, *config.video_shape)), jnp.array([0.3, 0.8])
    label, caption = jnp.array([1, 2]), jnp.eye(2, config.caption_dim)
    return jit(lambda params: rebuild(params)(*args, label, caption))(params)


@pytest.fixture(scope="module")
def plain(awake):
    return split_params(awake(CONFIG))[1]


def test_parameters_added_to_wan():
    """The paper: 4.99% more parameters for Wan2.1-1.3B."""
    sizes = MODELS["wan2.1-t2v-1.3B"].transformer
    whole = count(nnx.eval_shape(lambda: WanTransformer(sizes, rngs=nnx.Rngs(0))))
    salad, own = (
        count(nnx.eval_shape(lambda layer=layer: layer(sizes.dim, sizes.heads, rngs=nnx.Rngs(0))))
        for layer in (vm.nn.SaladAttention, vm.nn.VideoSelfAttention)
    )
    assert 100 * sizes.layers * (salad - own) / whole == pytest.approx(4.99, abs=0.1)


def test_new_branches_change_nothing(plain):
    config, params = add_branches(CONFIG, plain, [2, 0])
    assert config.linear_layers == (0, 2)
    assert len(params) == len(plain) + 2 * 3
    chex.assert_trees_all_close(call(config, params), call(CONFIG, plain), atol=1e-5)
    assert add_branches(config, params, [0])[1] == params
    more, filled = add_branches(config, params)
    assert more.linear_layers == (0, 1, 2)
    assert count_of(filled) - count_of(plain) == 3 * (24 * 24 + 24 + 1)


def count_of(params):
    return sum(value.size for value in params.values())


def test_adapters_are_products_of_each_projection():
    params = {"a.qkv.kernel": jnp.ones((4, 6)), "a.out.kernel": jnp.ones((2, 4))}
    adapters = init_adapters(params, {"a.qkv.kernel": 3, "a.out.kernel": 1}, 2, jax.random.key(0))
    chex.assert_trees_all_equal(merge_adapters(params, adapters), params)
    rng = np.random.default_rng(0)
    adapters = {name: jnp.asarray(rng.normal(size=x.shape)) for name, x in adapters.items()}
    a, b = (np.asarray(adapters[f"a.qkv.lora_{x}"], np.float64) for x in "ab")
    assert a.shape == (4, 6)
    assert b.shape == (6, 2)
    merged = merge_adapters(params, adapters)
    for part in range(3):
        own = slice(2 * part, 2 * part + 2)
        expected = 1 + a[:, own] @ b[own]
        np.testing.assert_allclose(merged["a.qkv.kernel"][:, own], expected, atol=1e-5)
    a, b = (np.asarray(adapters[f"a.out.lora_{x}"], np.float64) for x in "ab")
    np.testing.assert_allclose(merged["a.out.kernel"], 1 + a @ b, atol=1e-5)
    with pytest.raises(ValueError, match="rank >= 1, got 0"):
        init_adapters(params, {"a.qkv.kernel": 3}, 0, jax.random.key(0))


def test_what_is_tuned_and_what_is_frozen(plain):
    _, params = add_branches(CONFIG, plain)
    trained, frozen = split_for_tuning(params, 2, seed=0)
    assert frozen.keys() == plain.keys()
    assert len(trained) == CONFIG.depth * (2 + 2 + 3)
    chex.assert_trees_all_equal(merge_tuned(trained, frozen), params)
    tuned = {name: value + 0.1 for name, value in trained.items()}
    changed = merge_tuned(tuned, frozen)
    different = {name for name in changed if not np.array_equal(changed[name], params[name])}
    assert different == {
        f"blocks.{n}.attention.{end}"
        for n in range(3)
        for end in ("qkv.kernel", "out.kernel", "linear_out.kernel", "gate.kernel", "gate.bias")
    }


def videos(batches=2):
    rng = np.random.default_rng(8)
    for _ in range(batches):
        yield {
            "video": rng.normal(size=(2, *CONFIG.video_shape)).astype(np.float32),
            "label": np.array([0, 1], np.int32),
            "caption": np.eye(2, CONFIG.caption_dim, dtype=np.float32),
        }


def test_branches_with_the_smallest_gates_go(plain):
    config, params = add_branches(dataclasses.replace(CONFIG, remat=True), plain)
    # Gates that depend on nothing, so that their means are known, but for the last one.
    for layer, bias in enumerate((1.0, -2.0, 0.5)):
        params[f"blocks.{layer}.attention.gate.bias"] = jnp.full((1,), bias)
        params[f"blocks.{layer}.attention.linear_out.kernel"] = jnp.eye(24)
    params["blocks.2.attention.gate.kernel"] = jnp.full((24, 1), 0.05)
    rebuild, _ = split_params(VideoDiT(config, attention=METHOD, rngs=nnx.Rngs(0)))
    gates = mean_gates(rebuild(params), videos())
    assert [gates[0], gates[1]] == pytest.approx([1 / (1 + math.exp(-x)) for x in (1, -2)])
    of_bias = 1 / (1 + math.exp(-0.5))
    assert gates[2] == pytest.approx(of_bias, abs=0.1)
    assert gates[2] != pytest.approx(of_bias, abs=1e-4)
    smaller, left = drop_branches(config, params, gates, share=0.5)
    assert smaller.linear_layers == (0,)
    assert not any(name.startswith("blocks.1.attention.gate") for name in left)
    # Without them the model is the one whose branches there are shut.
    shut = dict(params)
    for layer in (1, 2):
        shut[f"blocks.{layer}.attention.linear_out.kernel"] = jnp.zeros((24, 24))
    chex.assert_trees_all_close(call(smaller, left), call(config, shut), atol=1e-5)
    assert drop_branches(config, params, gates, share=0.1)[0].linear_layers == (0, 1, 2)
    assert drop_branches(config, params, gates)[0].linear_layers == (0, 2)


def test_errors(plain):
    config, params = add_branches(CONFIG, plain, [0, 1])
    with pytest.raises(ValueError, match=r"rise within 0\.\.2, got \(0, 1, 7\)"):
        add_branches(config, params, [7])
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1\.5"):
        drop_branches(config, params, {0: 0.1, 1: 0.2}, 1.5)
    with pytest.raises(ValueError, match=r"gates of the layers \(0, 1\), got \(0,\)"):
        drop_branches(config, params, {0: 0.1})
    model = VideoDiT(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"a model with linear branches, got linear_layers \(\)"):
        mean_gates(model, videos())
    rebuild, _ = split_params(VideoDiT(config, attention=METHOD, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="at least one batch of videos, got none"):
        mean_gates(rebuild(params), [])
    with pytest.raises(ValueError, match="in all scanned layers or in none, got linear_layers"):
        dataclasses.replace(config, scan_layers=True)


def test_scanned_layers_with_branches(plain):
    config, params = add_branches(CONFIG, plain)
    params |= {
        name: value + 0.2 for name, value in params.items() if name.endswith("linear_out.kernel")
    }
    scanned = dataclasses.replace(config, scan_layers=True)
    chex.assert_trees_all_close(call(scanned, params), call(config, params), atol=2e-5)


def test_exports_with_and_without_branches(plain, tmp_path):
    export_params(tmp_path / "plain", CONFIG, plain)
    stored = json.loads((tmp_path / "plain" / "config.json").read_text())
    # What an older version wrote knows of no branches.
    del stored["config"]["linear_layers"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(stored))
    assert load_params(tmp_path / "plain")[0] == CONFIG
    model = load_model(tmp_path / "plain", attention=METHOD, linear_layers=(1,))
    assert model.config.linear_layers == (1,)
    config, params = add_branches(*load_params(tmp_path / "plain"), [1])
    chex.assert_trees_all_equal(split_params(model)[1], params)
    export_params(tmp_path / "salad", config, params)
    again, found = load_params(tmp_path / "salad")
    assert again == config
    chex.assert_trees_all_equal(found, params)
    assert load_model(tmp_path / "salad", linear_layers=(0,)).config.linear_layers == (0, 1)
    assert load_model(tmp_path / "salad").config.linear_layers == (1,)


def test_exports_beside_their_base(plain, tmp_path):
    export_params(tmp_path / "plain", CONFIG, plain)
    config, params = add_branches(*load_params(tmp_path / "plain"), [1])
    params["blocks.0.attention.qkv.kernel"] += 1
    export_params(tmp_path / "whole", config, params)
    folder = tmp_path / "deep" / "salad"
    export_params(folder, config, params, base=tmp_path / "plain")
    chex.assert_trees_all_equal(load_params(folder), load_params(tmp_path / "whole"))
    stored = read_arrays(folder / "params")
    assert set(stored) == {
        "blocks.0.attention.qkv.kernel",
        *(f"blocks.1.attention.{x}" for x in ("linear_out.kernel", "gate.kernel", "gate.bias")),
    }
    changed = dict(plain) | {"label.embedding": plain["label.embedding"] + 1}
    export_params(tmp_path / "plain", CONFIG, changed)
    with pytest.raises(ValueError, match="expected values of SHA-256"):
        load_params(folder)
    shutil.rmtree(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain/config\.json: expected the configuration"):
        load_params(folder)


def test_shipped_weights():
    folder = ROOT / "models" / "tiny"
    config, params = load_params(folder / "salad")
    assert config.linear_layers == tuple(range(6))
    dense = load_params(folder / "dense")[1]
    assert params.keys() - dense.keys() == {
        f"blocks.{n}.attention.{x}"
        for n in range(6)
        for x in ("linear_out.kernel", "gate.kernel", "gate.bias")
    }
    # Adapters and branches are all that was tuned.
    same = {name for name in dense if np.array_equal(dense[name], params[name])}
    assert dense.keys() - same == {
        f"blocks.{n}.attention.{x}.kernel" for n in range(6) for x in ("qkv", "out")
    }
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 15e6


@pytest.mark.slow
def test_commands(awake, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, depth=1)
    plain = split_params(awake(config))[1]
    export_params(tmp_path / "plain", config, plain)
    flags = ["--attention", "salad", "--sparse", "top_k", "--sparsity", "0.5", "--block-size", "8"]
    run = ["--steps", "2", "--batch-size", "2", "--quiet", "--rank", "3", "--warmup-steps", "0"]
    out = tmp_path / "run"
    tune = ["finetune", "--from", str(tmp_path / "plain"), "--out", str(out), *flags, *run]
    assert main([*tune, "--full"]) == 2
    assert "expected no --rank with --full, got 3" in capsys.readouterr().err
    assert main([*tune, "--rank", "0"]) == 2
    assert "expected --rank >= 1, got 0" in capsys.readouterr().err
    assert not out.exists()
    assert main(tune) == 0
    settings = json.loads((out / "run.json").read_text())
    assert settings["adapter_rank"] == 3
    assert "Salad(" in settings["attention"]
    tuned, params = load_params(out / "export")
    assert tuned.linear_layers == (0,)
    assert params.keys() == add_branches(config, plain)[1].keys()
    stored = load_params(tmp_path / "plain")[1]
    moved = {name for name in stored if not np.array_equal(params[name], stored[name])}
    assert moved == {"blocks.0.attention.qkv.kernel", "blocks.0.attention.out.kernel"}
    assert np.abs(params["blocks.0.attention.linear_out.kernel"]).max() > 0
    # the control: the same adapters under dense attention
    dense = ["finetune", "--from", str(tmp_path / "plain"), "--attention", "dense", *run]
    assert main([*dense, "--out", str(tmp_path / "control")]) == 0
    config_of_control, params = load_params(tmp_path / "control" / "export")
    assert config_of_control == config
    moved = {name for name in stored if not np.array_equal(params[name], stored[name])}
    assert moved == {"blocks.0.attention.qkv.kernel", "blocks.0.attention.out.kernel"}
    drop = ["--batches", "1", "--batch-size", "2", "--share", "1", *flags]
    smaller = tmp_path / "smaller"
    assert main(["drop-branches", "--from", str(out / "export"), "--out", str(smaller), *drop]) == 0
    assert "layer 0: mean gate 0.5" in capsys.readouterr().out
    assert load_params(smaller)[0] == config
