"""SALAD's linear branch in the Wan transformer: formula, layers, gradients, weights."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import salad_oracle as oracle
import tolerances
from compiling import jit
from flax import nnx
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.attention import SelfAttention
from vmonarch_jax.models.wan.config import TransformerConfig
from vmonarch_jax.models.wan.embeddings import rope_tables
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.linear_branch import BRANCH, LinearBranch, add_linear_branches
from vmonarch_jax.models.wan.transformer import WanTransformer
from vmonarch_jax.models.wan.transformer_layers import OneDevice
from vmonarch_jax.models.wan.weights.configs import config_from_json, config_to_json
from vmonarch_jax.models.wan.weights.detect import detect
from vmonarch_jax.models.wan.weights.load import load_part
from vmonarch_jax.models.wan.weights.save import export_weights, save_weights
from wan_transformer_cases import CASES, inputs_of, params_of, stored_weights
from wan_weights import SMALL, assert_same, random_params

import vmonarch_jax as vm

PLAIN = CASES["text"].config
INPUTS = inputs_of(CASES["text"])
METHOD = vm.Dense()  # the branch is the same beside every method


def with_branches(*layers):
    return dataclasses.replace(PLAIN, linear_layers=layers)


@functools.cache
def compiled(config):
    rebuild = split_params(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))[0]
    return jit(lambda params: rebuild(params)(**INPUTS, attention=METHOD))


@functools.cache
def weights(*layers):
    config = with_branches(*layers)
    return params_of(config, stored_weights(config))


def test_new_branches_change_nothing():
    before = params_of(PLAIN, stored_weights(PLAIN))
    config, params = add_linear_branches(PLAIN, before)
    assert config == with_branches(0, 1, 2)
    assert before.keys() == {name for name in params if not name.startswith(BRANCH)}
    for name, value in split_params(LinearBranch(config, param_dtype=jnp.float32))[1].items():
        added = params[f"{BRANCH}{name}"]
        assert added.shape == (3, *value.shape)
        assert not np.any(added)
        assert not np.any(value)
    out = compiled(config)(params)
    chex.assert_trees_all_close(out, compiled(PLAIN)(before), rtol=1e-5, atol=1e-5)
    changed = params | {f"{BRANCH}kernel": weights(0, 1, 2)[f"{BRANCH}kernel"]}
    assert np.abs(compiled(config)(changed) - out).max() > 1e-3


def test_layer_equals_its_formula():
    config, grid, heads = dataclasses.replace(PLAIN, linear_layers=(0,), layers=1), (2, 3, 4), 3
    rng = np.random.default_rng(0)
    layer = SelfAttention(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    rebuild, shapes = split_params(layer)
    params = {n: 0.3 * rng.standard_normal(p.shape).astype(np.float32) for n, p in shapes.items()}
    x = rng.standard_normal((2, 24, config.dim)).astype(np.float32)
    rope = rope_tables(vm.VideoGrid(*grid), config.head_dim, config.rope_theta)

    def attend(q, k, v):
        return vm.dense_attention(q, k, v), None

    got = jit(lambda p: rebuild(p)(x, rope, attend, OneDevice())[0])(params)

    p = {name: value.astype(np.float64) for name, value in params.items()}
    x = x.astype(np.float64)

    def projected(name):
        rows = np.einsum("znc,chd->znhd", x, p[f"{name}.kernel"]) + p[f"{name}.bias"]
        if name == "v":
            return rows
        mean = np.square(rows).mean((2, 3), keepdims=True)
        return rows / np.sqrt(mean + config.eps) * p[f"{name}_norm.scale"]

    # the angles have a test of their own; here it matters what is turned, and when
    angles = np.arctan2(np.asarray(rope[1], np.float64), rope[0])[:, ::2]
    q, k, v = map(projected, "qkv")
    scores = np.einsum("znhd,zshd->zhns", *(oracle.turn(a, angles) for a in (q, k)))
    scores = np.exp(scores / np.sqrt(config.head_dim))
    out = np.einsum("zhns,zshe->znhe", scores / scores.sum(-1, keepdims=True), v)
    beside = np.einsum("znhd,hdc->znc", oracle.linear(q, k, v, angles), p["linear.kernel"])
    logit = x.mean(1) @ p["linear.gate.kernel"] + p["linear.gate.bias"]
    gate = 1 / (1 + np.exp(-logit))
    out = out + gate[:, :, None, None] * beside.reshape(2, 24, heads, -1)
    expected = np.einsum("znhd,hdc->znc", out, p["out.kernel"]) + p["out.bias"]
    tolerances.assert_close(got, expected, "float32", "forward")


def test_layers_without_a_branch_ignore_the_stack():
    params = weights(0, 1, 2)
    some = compiled(with_branches(0, 2))
    out = some(params)
    own = jax.tree.map(jnp.asarray, branch(params))
    off = {name: value.at[1].set(0) for name, value in own.items()}
    chex.assert_trees_all_close(
        out, compiled(with_branches(0, 1, 2))(params | off), rtol=1e-4, atol=1e-5
    )
    for layer, counts in enumerate((True, False, True)):
        other = {
            n: v.at[layer].add(1) for n, v in jax.tree.map(jnp.asarray, branch(params)).items()
        }
        changed = float(np.abs(some(params | other) - out).max())
        assert (changed > 1e-3) if counts else (changed == 0), layer


def branch(params):
    return {name: value for name, value in params.items() if name.startswith(BRANCH)}


def test_scan_equals_a_loop():
    config, params = with_branches(1), weights(1)
    rebuild = split_params(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))[0]
    arrays = jax.tree.map(jnp.asarray, (params, INPUTS))
    with jax.disable_jit():  # a scan is a loop, and a choice runs what is chosen
        looped = rebuild(arrays[0])(**arrays[1], attention=METHOD)
    chex.assert_trees_all_close(looped, compiled(config)(params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_gradients_reach_the_branches_in_use(layers):
    config, params = add_linear_branches(PLAIN, weights_of_plain(), layers)
    config = dataclasses.replace(config, remat="full")
    rebuild = split_params(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))[0]

    def loss(own):
        model = rebuild(params | own)
        return jnp.square(model(**INPUTS, attention=METHOD)).mean()

    gradient = jit(jax.grad(loss))(branch(params))
    chex.assert_tree_all_finite(gradient)
    size = np.abs(gradient[f"{BRANCH}kernel"]).max((1, 2, 3))
    np.testing.assert_array_equal(size > 1e-6, np.isin(np.arange(3), layers))
    # while W is zero the gate does not matter
    assert not np.any(gradient[f"{BRANCH}gate.kernel"])


def weights_of_plain():
    return params_of(PLAIN, stored_weights(PLAIN))


def test_more_branches_start_at_zero_and_keep_those_there():
    before = jax.tree.map(jnp.asarray, weights(1))
    config, params = add_linear_branches(with_branches(1), before, (2,))
    assert config.linear_layers == (1, 2)
    for name, value in branch(params).items():
        np.testing.assert_array_equal(value[1], before[name][1])
        assert not np.any(value[2])
        assert np.any(before[name][2])
    assert add_linear_branches(config, params, (1, 2)) == (config, params)
    with pytest.raises(ValueError, match=r"linear_layers that rise within 0\.\.2, got \(1, 2, 3\)"):
        add_linear_branches(config, params, (3,))


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1,), (3,)])
def test_wrong_layers(layers):
    with pytest.raises(ValueError, match=r"rise within 0\.\.2"):
        with_branches(*layers)


def test_configuration_there_and_back():
    config = dataclasses.replace(SMALL, transformer=with_branches(0, 2))
    found = json.loads(json.dumps(config_to_json(config)))
    assert config_from_json(found) == config
    del found["transformer"]["linear_layers"]  # as it was written before there were any
    assert config_from_json(found).transformer == PLAIN
    assert TransformerConfig().linear_layers == ()


def test_keys_are_our_own_and_published_models_have_none():
    keys = {
        convention: {
            key
            for entry in transformer_entries(with_branches(0))
            if entry.name.startswith(BRANCH)
            for key in entry.keys(convention)
        }
        for convention in ("diffusers", "original")
    }
    ends = ("weight", "gate.weight", "gate.bias")
    assert keys["diffusers"] == {
        f"blocks.{n}.attn1.linear_branch.{end}" for n in range(3) for end in ends
    }
    assert keys["original"] == {
        f"blocks.{n}.self_attn.linear_branch.{end}" for n in range(3) for end in ends
    }
    assert not any(entry.name.startswith(BRANCH) for entry in transformer_entries(PLAIN))
    model = nnx.eval_shape(lambda: WanTransformer(with_branches(0), rngs=nnx.Rngs(0)))
    shapes = {name: value.shape for name, value in split_params(model)[1].items()}
    entries = transformer_entries(with_branches(0))
    assert {entry.name: entry.full_shape for entry in entries} == shapes


@pytest.mark.parametrize("convention", ["orbax", "diffusers", "original"])
def test_weights_there_and_back(tmp_path, convention):
    config = dataclasses.replace(
        SMALL, transformer=dataclasses.replace(SMALL.transformer, linear_layers=(0, 2))
    )
    params = random_params(config)
    if convention == "orbax":
        save_weights(tmp_path / "x", config, {"transformer": params})
    else:
        export_weights(tmp_path / "x", config, {"transformer": params}, convention)
    found = detect(tmp_path / "x")
    assert found.config == config
    assert_same(split_params(load_part(found, "transformer", jnp.float32))[1], params)
    half = split_params(load_part(found, "transformer", jnp.bfloat16))[1]
    assert {n: str(v.dtype) for n, v in branch(half).items()} == {
        f"{BRANCH}kernel": "bfloat16", f"{BRANCH}gate.kernel": "float32",
        f"{BRANCH}gate.bias": "float32",
    }  # fmt: skip
