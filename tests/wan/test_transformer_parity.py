"""The Wan transformer against Diffusers', through a folder that Diffusers saved."""

import pytest

pytest.importorskip("torch")

import jax
from flax import nnx
from safetensors.numpy import load_file
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.transformer import WanTransformer
from wan_transformer_cases import CASES, inputs_of, params_of, relative_error
from wan_transformer_reference import reference_model, reference_output


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name, tmp_path):
    case = CASES[name]
    reference = reference_model(case)
    reference.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    keys = [k for entry in transformer_entries(case.config) for k in entry.keys("diffusers")]
    assert sorted(keys) == sorted(stored)
    model = nnx.eval_shape(lambda: WanTransformer(case.config, rngs=nnx.Rngs(0)))
    rebuild, _ = split_params(model)
    out = jax.jit(lambda params, x: rebuild(params)(**x))(
        params_of(case.config, stored), inputs_of(case)
    )
    error = relative_error(out, reference_output(case, reference))
    print(f"{name}: relative error {error:.1e}")
    assert error <= 1e-5
