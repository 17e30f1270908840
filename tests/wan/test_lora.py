"""LoRA files of every common format, merged and written."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from vmonarch_jax.models.wan.weights.lora import merge_lora, save_lora
from vmonarch_jax.models.wan.weights.parts import part_entries
from wan_weights import IMAGE, SMALL, random_params, tensors_of

ENTRIES = part_entries(SMALL, "transformer")
RANK = 2
# Modules: their name in Diffusers, in the original repository, and out and in.
MODULES = (
    ("blocks.0.attn1.to_q", "blocks.0.self_attn.q", 24, 24),
    ("blocks.2.attn1.to_out.0", "blocks.2.self_attn.o", 24, 24),
    ("blocks.1.attn2.to_v", "blocks.1.cross_attn.v", 24, 24),
    ("blocks.1.ffn.net.0.proj", "blocks.1.ffn.0", 40, 24),
    ("blocks.0.ffn.net.2", "blocks.0.ffn.2", 24, 40),
    ("condition_embedder.time_proj", "time_projection.1", 144, 24),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0", 24, 10),
    ("proj_out", "head.head", 16, 24),
)


def factors():
    random = np.random.default_rng(7)
    return [
        (random.normal(size=(RANK, inputs)), random.normal(size=(outputs, RANK)))
        for _, _, outputs, inputs in MODULES
    ]


def expected(params, factor, convention="diffusers", config=SMALL):
    """The merged parameters, by adding to the stored tensors in their own layout."""
    tensors = {k: v.astype(np.float64) for k, v in tensors_of(config, params, convention).items()}
    for (diffusers, *_), (down, up) in zip(MODULES, factors(), strict=True):
        tensors[f"{diffusers}.weight"] += factor * up @ down
    return tensors


def written(path, tensors, metadata=None):
    save_file({k: np.asarray(v, np.float32) for k, v in tensors.items()}, path, metadata)
    return path


def check(merged, want, config=SMALL, tolerance=2e-6):
    merged = {name: np.asarray(value) for name, value in merged.items()}
    got = tensors_of(config, merged, "diffusers")
    assert got.keys() == want.keys()
    for key, value in want.items():
        error = np.abs(got[key] - value).max() / np.abs(value).max()
        assert error <= tolerance, (key, error)


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


FORMATS = {
    "diffusers": (lambda d, o: f"transformer.{d}", "lora_A.weight", "lora_B.weight"),
    "diffusers, old": (lambda d, o: f"transformer.{d}", "lora_down.weight", "lora_up.weight"),
    "peft": (lambda d, o: f"base_model.model.{d}", "lora_A.weight", "lora_B.weight"),
    "peft, named": (lambda d, o: d, "lora_A.default.weight", "lora_B.default.weight"),
    "original": (lambda d, o: f"diffusion_model.{o}", "lora_A.weight", "lora_B.weight"),
    "comfy": (lambda d, o: f"model.diffusion_model.{o}", "lora_down.weight", "lora_up.weight"),
    "bare": (lambda d, o: o, "lora_A.weight", "lora_B.weight"),
    "kohya": (lambda d, o: kohya(o), "lora_down.weight", "lora_up.weight"),
    "kohya of diffusers": (lambda d, o: kohya(d), "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("form", FORMATS)
def test_formats(tmp_path, form, alpha):
    name, down_ending, up_ending = FORMATS[form]
    tensors = {}
    for (diffusers, original, *_), (down, up) in zip(MODULES, factors(), strict=True):
        module = name(diffusers, original)
        tensors |= {f"{module}.{down_ending}": down, f"{module}.{up_ending}": up}
        if alpha is not None:
            tensors[f"{module}.alpha"] = alpha
    params = random_params(SMALL)
    before = {name: value.copy() for name, value in params.items()}
    file = written(tmp_path / "x.safetensors", tensors)
    merged = merge_lora(params, file, ENTRIES, 0.7)
    check(merged, expected(params, 0.7 * (1.0 if alpha is None else alpha / RANK)))
    for name, value in before.items():
        np.testing.assert_array_equal(params[name], value)


def test_dtypes_are_kept(tmp_path):
    params = random_params(SMALL, dtype=ml_dtypes.bfloat16)
    down, up = np.ones((1, 24)), np.full((24, 1), 1 / 64)
    key = "transformer.blocks.1.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    jax_params = {name: jnp.asarray(value) for name, value in params.items()}
    merged = merge_lora(jax_params, written(tmp_path / "x.safetensors", tensors), ENTRIES)
    want = params["blocks.attn.q.kernel"].astype(np.float32)
    want[1] += 1 / 64
    got = merged["blocks.attn.q.kernel"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got), want.astype(ml_dtypes.bfloat16))
    # the given arrays are alive and what they were
    np.testing.assert_array_equal(
        np.asarray(jax_params["blocks.attn.q.kernel"]), params["blocks.attn.q.kernel"]
    )


def test_full_differences(tmp_path):
    random = np.random.default_rng(0)
    diffs = {
        "diffusion_model.blocks.1.self_attn.q.diff": ("blocks.1.attn1.to_q.weight", (24, 24)),
        "diffusion_model.blocks.1.self_attn.q.diff_b": ("blocks.1.attn1.to_q.bias", (24,)),
        "diffusion_model.blocks.2.norm3.diff": ("blocks.2.norm2.weight", (24,)),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": ("blocks.0.attn1.norm_q.weight", (24,)),
        "diffusion_model.patch_embedding.diff": ("patch_embedding.weight", (24, 4, 1, 2, 2)),
        "diffusion_model.head.head.diff_b": ("proj_out.bias", (16,)),
        "diffusion_model.blocks.1.modulation.diff": ("blocks.1.scale_shift_table", (1, 6, 24)),
    }
    params = random_params(SMALL)
    want = {k: v.astype(np.float64) for k, v in tensors_of(SMALL, params, "diffusers").items()}
    tensors = {}
    for key, (stored, shape) in diffs.items():
        tensors[key] = random.normal(size=shape).astype(np.float32)
        want[stored] += 0.5 * tensors[key]
    merged = merge_lora(params, written(tmp_path / "x.safetensors", tensors), ENTRIES, 0.5)
    check(merged, want)


def test_pair_with_biases_and_a_convolution(tmp_path):
    random = np.random.default_rng(0)
    key, alpha = "transformer.blocks.0.attn1.to_k", 1.0
    down, up = random.normal(size=(RANK, 24)), random.normal(size=(24, RANK))
    inner, outer = random.normal(size=(RANK, 4, 1, 2, 2)), random.normal(size=(24, RANK, 1, 1, 1))
    bias, other = random.normal(size=24), random.normal(size=24)
    tensors = {
        f"{key}.lora_A.weight": down,
        f"{key}.lora_B.weight": up,
        f"{key}.alpha": alpha,
        f"{key}.lora_B.bias": bias,
        "transformer.patch_embedding.lora_A.weight": inner,
        "transformer.patch_embedding.lora_B.weight": outer,
        "transformer.patch_embedding.diff_b": other,
    }
    params = random_params(SMALL)
    want = {k: v.astype(np.float64) for k, v in tensors_of(SMALL, params, "diffusers").items()}
    want["blocks.0.attn1.to_k.weight"] += alpha / RANK * up @ down
    want["blocks.0.attn1.to_k.bias"] += alpha / RANK * bias
    product = outer.reshape(24, RANK) @ inner.reshape(RANK, -1)
    want["patch_embedding.weight"] += product.reshape(24, 4, 1, 2, 2)
    want["patch_embedding.bias"] += other
    check(merge_lora(params, written(tmp_path / "x.safetensors", tensors), ENTRIES), want)


@pytest.mark.parametrize("where", ["metadata", "beside"])
def test_alpha_of_the_settings(tmp_path, where):
    settings = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {"to_q": 5}}
    prefix = "transformer." if where == "metadata" else "base_model.model."
    tensors = {}
    for (diffusers, *_), (down, up) in zip(MODULES, factors(), strict=True):
        tensors[f"{prefix}{diffusers}.lora_A.weight"] = down
        tensors[f"{prefix}{diffusers}.lora_B.weight"] = up
    metadata, file = None, tmp_path / "adapter_model.safetensors"
    if where == "metadata":
        text = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
        metadata = {"lora_adapter_metadata": text}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    written(file, tensors, metadata)
    params = random_params(SMALL)
    want = expected(params, 6 / RANK)
    down, up = factors()[0]
    want["blocks.0.attn1.to_q.weight"] += (5 - 6) / RANK * up @ down
    check(merge_lora(params, file, ENTRIES), want)
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
        with pytest.raises(ValueError, match="expected plain LoRA, got DoRA"):
            merge_lora(params, file, ENTRIES)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
        want = expected(params, 6 / RANK**0.5)
        want["blocks.0.attn1.to_q.weight"] += (5 - 6) / RANK**0.5 * up @ down
        check(merge_lora(params, file, ENTRIES), want)


def test_image_projections(tmp_path):
    params = random_params(IMAGE)
    down, up = np.ones((1, 24)), np.ones((24, 1))
    tensors = {
        "diffusion_model.blocks.1.cross_attn.k_img.lora_down.weight": down,
        "diffusion_model.blocks.1.cross_attn.k_img.lora_up.weight": up,
    }
    file = written(tmp_path / "x.safetensors", tensors)
    want = {k: v.astype(np.float64) for k, v in tensors_of(IMAGE, params, "diffusers").items()}
    want["blocks.1.attn2.add_k_proj.weight"] += 1
    check(merge_lora(params, file, part_entries(IMAGE, "transformer")), want, IMAGE)
    with pytest.raises(ValueError, match=r"unexpected .*k_img\.lora_down\.weight of \(1, 24\)"):
        merge_lora(random_params(SMALL), file, ENTRIES)


def test_every_problem_is_said_once(tmp_path):
    to_q, to_k = "transformer.blocks.0.attn1.to_q", "transformer.blocks.0.attn1.to_k"
    tensors = {
        f"{to_q}.lora_A.weight": np.ones((2, 24)),
        f"{to_k}.lora_A.weight": np.ones((2, 20)),
        f"{to_k}.lora_B.weight": np.ones((24, 2)),
        f"{to_k}.dora_scale": np.ones(24),
        "transformer.blocks.7.attn1.to_q.lora_A.weight": np.ones((2, 24)),
        "transformer.proj_out.diff_b": np.ones(3),
        "transformer.blocks.0.attn1.norm_q.diff_b": np.ones(24),
        "transformer.blocks.1.norm2.lora_A.weight": np.ones((2, 24)),
        "transformer.blocks.1.norm2.lora_B.weight": np.ones((24, 2)),
    }
    file = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError) as raised:
        merge_lora(random_params(SMALL), file, ENTRIES)
    first, *lines = str(raised.value).splitlines()
    assert first.endswith("expected a LoRA of this model, got 7 problems:")
    for pattern in (
        r"blocks\.0\.attn1\.to_q: expected a pair of matrices, got .*to_q\.lora_A\.weight$",
        r"to_k.* \(our blocks\.attn\.k\.kernel\): expected .*\(24, 24\), got \(2, 20\) and",
        r"unexpected .*to_k\.dora_scale of \(24,\)",
        r"unexpected .*blocks\.7\.attn1\.to_q\.lora_A\.weight of \(2, 24\)",
        r"proj_out\.diff_b \(our out\.bias\): expected \(16,\), got \(3,\)",
        r"norm_q\.diff_b: expected a module with a bias, got blocks\.0\.attn1\.norm_q",
        r"norm2\.lora_A\.weight and .* expected matrices whose product is \(24,\)",
    ):
        assert sum(bool(re.search(pattern, line)) for line in lines) == 1, pattern
    empty = written(tmp_path / "empty.safetensors", {})
    with pytest.raises(ValueError, match="got no tensors"):
        merge_lora(random_params(SMALL), empty, ENTRIES)


@pytest.mark.parametrize("convention", ["diffusers", "original"])
def test_saved_and_merged(tmp_path, convention):
    random = np.random.default_rng(0)
    deltas = {
        name: (
            random.normal(size=(*stack, inputs, 3)).astype(np.float32),
            random.normal(size=(*stack, 3, outputs)).astype(np.float32),
        )
        for name, stack, inputs, outputs in (
            ("blocks.attn.q.kernel", (3,), 24, 24),
            ("blocks.attn.out.kernel", (3,), 24, 24),
            ("blocks.mlp_in.kernel", (3,), 24, 40),
            ("out.kernel", (), 24, 16),
        )
    }
    params = random_params(SMALL)
    assert deltas.keys() <= params.keys()
    path = tmp_path / "x.safetensors"
    save_lora(path, deltas, ENTRIES, 0.5, convention, {"made": "here"})
    keys = load_file(path)
    name = {
        "diffusers": "transformer.blocks.2.ffn.net.0.proj.lora_A.weight",
        "original": "diffusion_model.blocks.2.ffn.0.lora_A.weight",
    }[convention]
    np.testing.assert_array_equal(keys[name], deltas["blocks.mlp_in.kernel"][0][2].T)
    merged = merge_lora(params, path, ENTRIES)
    for name, value in params.items():
        if name in deltas:
            a, b = (np.asarray(factor, np.float64) for factor in deltas[name])
            value = value + 0.5 * (a @ b).reshape(value.shape)
        np.testing.assert_allclose(np.asarray(merged[name]), value, rtol=2e-6, atol=2e-6)


def test_wrong_deltas(tmp_path):
    a, b = np.ones((3, 24, 2)), np.ones((3, 2, 24))
    wrong = {
        "blocks.attn.q.kernel": (a, b[:, :, :5]), "blocks.none.kernel": (a, b),
        "blocks.attn.q.bias": (a, b), "patch.kernel": (a, b),
    }  # fmt: skip
    with pytest.raises(ValueError) as raised:
        save_lora(tmp_path / "x.safetensors", wrong, ENTRIES)
    message = str(raised.value)
    assert "q.kernel: expected (3, 24, 2) and (3, 2, 24), got (3, 24, 2), (3, 2, 5)" in message
    for name in ("blocks.none.kernel", "blocks.attn.q.bias", "patch.kernel"):
        assert f"{name}: expected a matrix of the model" in message
    with pytest.raises(ValueError, match="got no tensors"):
        save_lora(tmp_path / "x.safetensors", {}, ENTRIES)
    with pytest.raises(ValueError, match="expected convention of diffusers or original, got 'x'"):
        save_lora(tmp_path / "x.safetensors", {"blocks.attn.q.kernel": (a, b)}, ENTRIES, 1, "x")
    assert not (tmp_path / "x.safetensors").exists()
