"""Dropping the linear branches of a Wan model whose gates are smallest."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from flax import nnx
from vmonarch_jax.models import cli, split_params
from vmonarch_jax.models.flow import FlowConfig
from vmonarch_jax.models.wan.finetune.gates import mean_gates
from vmonarch_jax.models.wan.finetune.loss import error_sum, noised
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.linear_branch import BRANCH, Gate, drop_linear_branches
from vmonarch_jax.models.wan.pipeline import LoRAFile, WanPipeline
from vmonarch_jax.models.wan.transformer import WanTransformer
from vmonarch_jax.models.wan.weights.detect import detect
from vmonarch_jax.models.wan.weights.lora import linear_layers_of, save_lora, without_branches
from vmonarch_jax.models.wan.weights.random_folder import (
    parts_of,
    random_folder,
    random_params,
    small_config,
    write_tokenizer,
)
from vmonarch_jax.models.wan.weights.save import export_weights
from vmonarch_jax.models.wan.weights.stored import read_metadata
from wan_clips import write_clips

import vmonarch_jax as vm

METHOD = vm.Dense()  # the branch is the same beside every method
BIASES = (1.0, -2.0, 0.5)
RNG = np.random.default_rng(4)
INPUTS = (
    jnp.asarray(RNG.standard_normal((2, 3, 4, 6, 6)), jnp.float32),
    jnp.array([900.0, 200.0]),
    jnp.asarray(RNG.standard_normal((2, 5, 20)), jnp.float32),
)
MEANS = [1 / (1 + np.exp(-x)) for x in BIASES]


def with_branches(kind="t2v", layers=(0, 1, 2)):
    config = small_config(kind)
    sizes = dataclasses.replace(config.transformer, linear_layers=layers)
    return dataclasses.replace(config, transformer=sizes)


def params_with_gates(config, weight=0.0):
    """Random parameters whose gates are known but for `weight` of what the model sees."""
    params = random_params(config, "transformer")
    gate = f"{BRANCH}gate"
    params[f"{gate}.kernel"] *= weight
    params[f"{gate}.bias"] = np.array(BIASES, np.float32)[:, None]
    return params


def model_of(config, params):
    empty = nnx.eval_shape(lambda: WanTransformer(config.transformer, rngs=nnx.Rngs(0)))
    return split_params(empty)[0](jax.tree.map(jnp.asarray, params))


def batches(count=2):
    return [{"latents": INPUTS[0] + n, "text": INPUTS[2]} for n in range(count)]


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2)])
def test_gates_are_those_of_the_forward_pass(monkeypatch, layers):
    config = with_branches(layers=layers)
    model = model_of(config, params_with_gates(config, weight=1.0))
    got = jit(lambda model: model.gates(*INPUTS, attention=METHOD))(model)
    seen, gate = [], Gate.__call__

    def watched(self, x):
        seen.append(np.asarray(gate(self, x))[:, 0])
        return seen[-1][:, None]

    monkeypatch.setattr(Gate, "__call__", watched)
    with jax.disable_jit():  # a scan is a loop, and a choice runs what is chosen
        model(*INPUTS, attention=METHOD)
    assert got.shape == (2, len(layers))
    np.testing.assert_allclose(got, np.stack(seen, axis=1), rtol=1e-5, atol=1e-6)
    assert np.ptp(got, axis=0).min() > 1e-3  # each video has its own


def test_a_model_without_branches_has_no_gates():
    config = small_config()
    model = model_of(config, random_params(config, "transformer"))
    with pytest.raises(ValueError, match=r"with linear branches, got linear_layers \(\)"):
        model.gates(*INPUTS)
    with pytest.raises(ValueError, match=r"with linear branches, got linear_layers \(\)"):
        mean_gates(model, config, batches(), INPUTS[2][0], attention=METHOD)


def test_mean_gates_are_over_batches_noised_as_in_tuning():
    config = with_branches()
    flow, empty = FlowConfig(shift=3.0), jnp.zeros((5, 20))
    run = functools.partial(mean_gates, config=config, empty=empty, attention=METHOD, flow=flow)
    known = run(model_of(config, params_with_gates(config)), batches=batches())
    assert list(known) == [0, 1, 2]
    np.testing.assert_allclose(list(known.values()), MEANS, rtol=1e-5)

    model = model_of(config, params_with_gates(config, weight=1.0))
    found = run(model, batches=batches(), seed=3)
    expected = []
    for number, batch in enumerate(batches()):
        key = jax.random.fold_in(jax.random.key(3), number)
        seen = []

        def velocity(x, time, text, image, seen=seen):
            seen.append((x, time, text))
            return jnp.zeros_like(x)

        error_sum(velocity, noised(batch, empty, key, flow=flow), None)
        gates = jit(lambda model, *seen: model.gates(*seen, attention=METHOD))(model, *seen[0])
        expected.append(np.asarray(gates).mean(0))
    np.testing.assert_allclose(list(found.values()), np.mean(expected, 0), rtol=1e-5)
    with pytest.raises(ValueError, match="at least one batch of videos, got none"):
        run(model, batches=[])


def test_given_first_frames_are_at_time_zero():
    latents, _, text = INPUTS
    batch, key = {"latents": latents, "text": text}, jax.random.key(0)
    shown = noised(batch, text[0], key, flow=FlowConfig(), first_frame_share=1.0)
    np.testing.assert_array_equal(shown.x[:, 0], latents[:, 0])
    np.testing.assert_array_equal(shown.judged, [[0, 1, 1]] * 2)
    np.testing.assert_array_equal(shown.time[:, 0], 0)
    assert shown.time.shape == (2, 3)
    assert np.all(np.asarray(shown.time[:, 1:]) > 0)


def test_branches_with_the_smallest_gates_go():
    config = with_branches()
    params = params_with_gates(config, weight=1.0)
    gates = dict(enumerate(MEANS))
    sizes, left = drop_linear_branches(config.transformer, params, gates, share=0.4)
    assert sizes.linear_layers == (0, 2)
    assert left.keys() == params.keys()
    run = jit(lambda model: model(*INPUTS, attention=METHOD))
    small = dataclasses.replace(config, transformer=sizes)
    shut = dict(params)
    shut[f"{BRANCH}kernel"] = params[f"{BRANCH}kernel"] * np.array([1, 0, 1])[:, None, None, None]
    out, whole = (run(model_of(config, p)) for p in (shut, params))
    chex.assert_trees_all_close(run(model_of(small, left)), out, rtol=1e-4, atol=1e-5)
    assert np.abs(whole - out).max() > 1e-3
    assert drop_linear_branches(config.transformer, params, gates)[0].linear_layers == (0, 2)
    none, plain = drop_linear_branches(config.transformer, params, gates, share=1.0)
    assert none == with_branches(layers=()).transformer
    assert plain.keys() == random_params(with_branches(layers=()), "transformer").keys()
    with pytest.raises(ValueError, match=r"gates of the layers \(0, 1, 2\), got \(0,\)"):
        drop_linear_branches(config.transformer, params, {0: 0.5})
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got -1"):
        drop_linear_branches(config.transformer, params, gates, -1)


def write_lora(path, convention="diffusers"):
    config = with_branches()
    whole = {n: v for n, v in params_with_gates(config).items() if n.startswith(BRANCH)}
    draw = np.random.default_rng(3).standard_normal
    pair = tuple(draw(shape).astype(np.float32) for shape in ((3, 48, 2), (3, 2, 48)))
    save_lora(
        path, {"blocks.attn.q.kernel": pair}, transformer_entries(config.transformer), 0.5,
        convention, {"attention": "Salad"}, whole,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("convention", ["diffusers", "original"])
def test_a_file_without_some_branches(tmp_path, convention):
    config = small_config()
    folder = random_folder(tmp_path / "wan", config)
    path, fewer = write_lora(tmp_path / "lora.safetensors", convention), tmp_path / "f.safetensors"
    without_branches(path, fewer, [1])
    assert linear_layers_of(fewer) == (0, 2)
    assert read_metadata(fewer) == read_metadata(path)
    opened = [WanPipeline.open(folder, "float32", lora=[LoRAFile(p)]) for p in (path, fewer)]
    assert opened[1].config.transformer.linear_layers == (0, 2)
    before, after = (split_params(one.part("transformer"))[1] for one in opened)
    for name, value in before.items():
        value = value.at[1].set(0) if name.startswith(BRANCH) else value
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    without_branches(path, fewer, range(3))
    assert linear_layers_of(fewer) == ()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Weights without and with branches, a LoRA with some, and videos."""
    folder = tmp_path_factory.mktemp("dropping")
    random_folder(folder / "wan", small_config())
    config = with_branches()
    parts = {part: random_params(config, part) for part in parts_of(config)}
    parts["transformer"] = params_with_gates(config)
    tokenizer = write_tokenizer(folder / "tokenizer")
    export_weights(folder / "tuned", config, parts, tokenizer=tokenizer)
    (folder / "run").mkdir()
    write_lora(folder / "run" / "lora.safetensors")
    write_clips(folder / "videos", 2)
    return folder


def run(work, *more):
    common = ("drop-branches", "--data", work / "videos", "--cache", work / "cache", "--quiet")
    common += ("--size", "48x32", "--frames", "5", "--dtype", "float32", "--batches", "2")
    return cli.main([str(word) for word in (*common, "--block-size", "4", *more)])


@pytest.mark.slow
def test_command_of_a_file(work, capsys):
    lora, out = work / "run" / "lora.safetensors", work / "new" / "fewer.safetensors"
    assert run(work, "--weights", work / "wan", "--lora", lora, "--out", out) == 0
    printed = capsys.readouterr().out
    for line in ("layer 0: mean gate 0.731\n", "layer 1: mean gate 0.119, dropped\n", f"{out}\n"):
        assert line in printed
    assert linear_layers_of(out) == (0, 2)


@pytest.mark.slow
def test_command_of_a_whole_model(work, capsys):
    out = work / "fewer"
    assert run(work, "--weights", work / "tuned", "--out", out, "--share", "0.7") == 0
    assert "layer 2: mean gate 0.622, dropped" in capsys.readouterr().out
    assert detect(out).config.transformer.linear_layers == (0,)
    assert WanPipeline.open(out, "float32").part("transformer").config.linear_layers == (0,)
    before, after = (detect(work / name) for name in ("tuned", "fewer"))
    assert after.parts.keys() == before.parts.keys()


def test_command_names_what_is_wrong(work, tmp_path, capsys):
    lora, out = work / "run" / "lora.safetensors", tmp_path / "out.safetensors"
    wan, tuned = ("--weights", work / "wan"), ("--weights", work / "tuned")
    two = random_folder(tmp_path / "two", small_config("t2v-two"))
    plain = tmp_path / "plain.safetensors"
    without_branches(lora, plain, range(3))
    for flags, message in (
        ((*wan, "--out", out), "expected --lora, or weights with linear branches"),
        ((*tuned, "--lora", lora, "--out", out), "without linear branches with --lora"),
        ((*wan, "--lora", plain, "--out", out), "expected a LoRA with linear branches, got none"),
        ((*wan, "--lora", work / "none.safetensors", "--out", out), "none.safetensors"),
        ((*wan, "--lora", lora, "--out", lora), "expected --out of another .safetensors file"),
        ((*wan, "--lora", lora, "--out", tmp_path), "expected --out of another .safetensors file"),
        ((*wan, "--lora", lora, "--out", out, "--batch-size", 3), "of 1 to the 2 videos, got 3"),
        ((*wan, "--lora", lora, "--out", out, "--share", 1.5), "share in [0, 1], got 1.5"),
        ((*tuned, "--out", work / "tuned" / "x"), "expected --out outside of the weights"),
        (("--weights", two, "--lora", lora, "--out", out), "expected --expert high or low"),
        (("--from", work, "--out", out), "expected no --frames, --data, --size, --cache, --dtype"),
    ):
        assert run(work, *flags) == 2, flags
        assert message in capsys.readouterr().err
    assert not out.exists()
