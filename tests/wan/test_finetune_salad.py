"""Tuning a Wan model to SALAD: linear branches beside adapters, in a file and in a whole model."""

import dataclasses
import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import wan_weights as small
from PIL import Image
from vmonarch_jax.models import cli, split_params
from vmonarch_jax.models.step import TrainConfig
from vmonarch_jax.models.wan.finetune.adapters import LoRA
from vmonarch_jax.models.wan.finetune.cache import ClipCache, ClipSettings
from vmonarch_jax.models.wan.finetune.data import find_clips
from vmonarch_jax.models.wan.finetune.tune import (
    Tuning,
    check_tuning,
    prepare,
    save_model,
    tune,
)
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.linear_branch import BRANCH, add_linear_branches
from vmonarch_jax.models.wan.pipeline import LoRAFile, WanPipeline
from vmonarch_jax.models.wan.weights.detect import NOTE, detect
from vmonarch_jax.models.wan.weights.load import load_part
from vmonarch_jax.models.wan.weights.lora import linear_layers_of, merge_lora, save_lora
from vmonarch_jax.models.wan.weights.random_folder import (
    parts_of,
    random_folder,
    random_params,
    small_config,
    write_tokenizer,
)
from vmonarch_jax.models.wan.weights.save import export_weights, save_weights
from wan_clips import write_clips

import vmonarch_jax as vm

TUNING = Tuning(vm.Salad(), LoRA(rank=3), dtype="bfloat16", linear_branch=True)


def with_branches(kind="t2v", layers=(0, 1, 2)):
    config = small_config(kind)
    sizes = dataclasses.replace(config.transformer, linear_layers=layers)
    return dataclasses.replace(config, transformer=sizes)


def branch(params):
    return {name: value for name, value in params.items() if name.startswith(BRANCH)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("salad") / "wan", small_config("t2v"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A LoRA with branches, and what is in it."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    return path, written(path, "diffusers")


def written(path, convention):
    entries = transformer_entries(with_branches().transformer)
    draw = np.random.default_rng(3).standard_normal
    whole = branch(random_params(with_branches(), "transformer", seed=5))
    pair = tuple(draw(shape).astype(np.float32) for shape in ((3, 48, 2), (3, 2, 48)))
    save_lora(path, {"blocks.attn.q.kernel": pair}, entries, 0.5, convention, whole=whole)
    return whole


def test_branches_and_adapters_are_what_is_tuned(folder):
    model, trained, frozen = prepare(detect(folder), TUNING, 0)
    assert model.config.linear_layers == (0, 1, 2)
    ends = {name.rpartition(".")[2] for name in trained if not name.startswith(BRANCH)}
    assert ends == {"lora_a", "lora_b"}
    assert branch(trained).keys() == {
        f"{BRANCH}{n}" for n in ("kernel", "gate.kernel", "gate.bias")
    }
    assert not any(np.any(value) for value in branch(trained).values())
    assert {value.dtype for value in trained.values()} == {jnp.dtype("float32")}
    assert not branch(frozen)
    assert {*trained, *frozen} == split_params(model)[1].keys()
    every = prepare(detect(folder), dataclasses.replace(TUNING, lora=None), 0)
    assert branch(every[1]).keys() == branch(trained).keys()


@pytest.mark.parametrize("convention", ["diffusers", "original"])
def test_branches_in_a_file_are_merged(folder, tmp_path, convention):
    path = tmp_path / "lora.safetensors"
    whole = written(path, convention)
    assert linear_layers_of(path) == (0, 1, 2)
    params = split_params(load_part(detect(folder), "transformer", jnp.float32))[1]
    sizes, params = add_linear_branches(small_config().transformer, params)
    merged = merge_lora(params, path, transformer_entries(sizes))
    chex.assert_trees_all_equal(branch(merged), whole)
    assert np.any(merged["blocks.attn.q.kernel"] != params["blocks.attn.q.kernel"])


def test_a_pipeline_has_the_branches_of_its_files(folder, file):
    path, whole = file
    pipeline = WanPipeline.open(folder, "float32", lora=[LoRAFile(path, strength=0.5)])
    assert pipeline.config.transformer == with_branches().transformer
    model = pipeline.part("transformer")
    assert model.config.linear_layers == (0, 1, 2)
    for name, value in branch(split_params(model)[1]).items():
        np.testing.assert_allclose(value, 0.5 * whole[name], rtol=1e-6)
    assert WanPipeline.open(folder, "float32").config.transformer.linear_layers == ()


@pytest.mark.parametrize("convention", ["diffusers", "original", "orbax"])
def test_a_whole_model_keeps_its_branches(tmp_path, convention):
    parts = {"transformer": small.random_params(small.SMALL)}
    if convention == "orbax":
        save_weights(tmp_path / "wan", small.SMALL, parts)
    else:
        export_weights(tmp_path / "wan", small.SMALL, parts, convention)
        (tmp_path / "wan" / NOTE).unlink()  # as it is published
    found = detect(tmp_path / "wan")
    tuned = dataclasses.replace(found, config=TUNING.config_of(found.config))
    params = small.random_params(tuned.config, seed=1)
    for name in ("once", "again"):  # the second from the first, whose note there is already
        save_model(tmp_path / name, tuned, "transformer", params)
        again = detect(tmp_path / name)
        assert again.convention == convention
        assert again.config.transformer == tuned.config.transformer
        got = split_params(load_part(again, "transformer", jnp.float32))[1]
        chex.assert_trees_all_equal(branch(got), branch(params))
        tuned, params = again, got


def test_experts_are_tuned_with_adapters(tmp_path):
    found = detect(random_folder(tmp_path / "wan", small_config("t2v-two")))
    check_tuning(found, TUNING)
    with pytest.raises(ValueError, match="expected adapters beside linear branches"):
        check_tuning(found, dataclasses.replace(TUNING, lora=None))


@pytest.mark.slow
def test_commands_tune_and_use_branches(folder, tmp_path, capsys):
    write_clips(tmp_path / "videos", 2)
    common = ["--weights", folder, "--size", "48x32", "--frames", "5", "--dtype", "float32"]
    common += ["--attention", "salad", "--block-size", "4"]
    flags = ["--data", tmp_path / "videos", "--steps", "4", "--warmup-steps", "1", "--rank", "2"]
    flags += ["--learning-rate", "0.05", "--quiet"]

    def run(command, *more):
        return cli.main([str(word) for word in (command, *common, *more)])

    assert run("finetune", "--out", tmp_path / "run", *flags) == 0
    path = tmp_path / "run" / "lora.safetensors"
    assert linear_layers_of(path) == (0, 1, 2)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["tuning"]["linear_branch"]
    plain = tmp_path / "plain"
    assert run("finetune", "--out", plain, "--no-linear-branch", *flags) == 0
    assert linear_layers_of(plain / "lora.safetensors") == ()

    frames = []
    for number, lora in enumerate(([], ["--lora", path])):
        out = tmp_path / f"{number}.mp4"
        more = ["--prompt", "a red fox", "--steps", "2", "--png", "--out", out, *lora]
        assert run("generate", *more) == 0
        found = sorted((tmp_path / str(number)).glob("*.png"))
        frames.append(np.stack([np.asarray(Image.open(one), int) for one in found]))
    assert np.abs(frames[1] - frames[0]).mean() > 1
    capsys.readouterr()
    common[common.index("salad")] = "dense"
    del common[-2:]
    assert run("finetune", "--out", tmp_path / "no", "--no-linear-branch", *flags) == 2
    assert "expected no --no-linear-branch with --attention dense" in capsys.readouterr().err


@pytest.mark.slow
def test_branches_that_were_there_are_kept_as_differences(tmp_path):
    config = with_branches()
    parts = {part: random_params(config, part) for part in parts_of(config)}
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    export_weights(tmp_path / "wan", config, parts, tokenizer=tokenizer)
    write_clips(tmp_path / "videos", 1)
    found = detect(tmp_path / "wan")
    clips, settings = find_clips(tmp_path / "videos"), ClipSettings(5, (48, 32), 16)
    cache = ClipCache(found, clips, settings, tmp_path / "cache", "float32")
    how = dataclasses.replace(TUNING, attention=vm.Dense(), dtype="float32")
    run = TrainConfig(steps=2, batch_size=1, warmup_steps=0, learning_rate=1e-3, ema_decay=0.0)
    path = tune(tmp_path / "run", cache, run, how, progress=False)
    base = split_params(load_part(found, "transformer", jnp.float32))[1]
    merged = merge_lora(base, path, transformer_entries(config.transformer))
    for name, value in branch(base).items():
        # Adam's steps are at most about the learning rate
        assert 0 < np.abs(merged[name] - value).max() < 1e-2, name
        assert np.abs(value).max() > 0.1
