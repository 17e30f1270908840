"""The Wan transformer: stored outputs of Diffusers, methods by layer, gradients, errors, keys."""

import dataclasses
import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from flax import nnx
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan import embeddings, transformer_layers
from vmonarch_jax.models.wan.embeddings import rope_tables, rotate, time_features
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.presets import MODELS
from vmonarch_jax.models.wan.transformer import WanTransformer
from vmonarch_jax.models.wan.transformer_layers import OneDevice, layer_norm
from wan_transformer_cases import CASES, inputs_of, params_of, relative_error, stored_weights

import vmonarch_jax as vm

GOLDENS = Path(__file__).parent.parent / "goldens" / "wan" / "transformer.npz"


DENSE = vm.Dense()


def rebuild(config, attention=DENSE):
    """From parameters to the model."""
    make = functools.partial(WanTransformer, config, attention=attention)
    return split_params(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]


def weights_of(config):
    return params_of(config, stored_weights(config))


@functools.cache
def compiled(config, attention, methods):
    model = rebuild(config, methods)
    return jax.jit(lambda params, x: model(params)(**x, attention=attention))


def run(case, config=None, inputs=None, attention=None, methods=DENSE):
    """The output with the case's weights; `methods` are the constructor's."""
    config = config or case.config
    return compiled(config, attention, methods)(weights_of(config), inputs or inputs_of(case))


@functools.cache
def plain():
    """The output of the first case, as it is."""
    return run(CASES["text"])


@pytest.mark.parametrize("name", CASES)
def test_equals_stored_outputs_of_diffusers(name):
    out = run(CASES[name])
    assert out.dtype == jnp.float32
    with np.load(GOLDENS) as goldens:
        assert relative_error(out, goldens[name]) <= 1e-5


def test_text_may_lack_its_zeros():
    case = CASES["text"]
    inputs = inputs_of(case)
    longest = max(case.texts)
    chex.assert_trees_all_equal(
        run(case, inputs=inputs | {"text": inputs["text"][:, :longest]}), plain()
    )


def test_times_of_frames_are_times_of_their_tokens():
    case = dataclasses.replace(CASES["token_times"], times="frames")
    inputs = inputs_of(case)
    tokens = inputs | {"time": inputs["time"].repeat(case.grid.frame_tokens, axis=1)}
    frames = run(case, inputs=inputs)
    chex.assert_trees_all_close(frames, run(case, inputs=tokens), rtol=1e-5, atol=1e-5)


def test_equal_times_of_frames_are_one_time():
    case = CASES["token_times"]
    inputs = inputs_of(CASES["text"])
    times = inputs["time"][:, None].repeat(case.grid.frames, axis=1)
    out = run(case, inputs=inputs | {"time": times})
    chex.assert_trees_all_close(out, plain(), rtol=1e-5, atol=1e-5)
    assert (
        relative_error(run(case, inputs=inputs | {"time": times * [[1, 1, 1, 1, 0]]}), out) > 0.01
    )


class Recorder(OneDevice):
    """Notes the methods and the names of axes that a forward pass uses."""

    def __init__(self):
        self.methods, self.names = [], []

    def constrain(self, x, *logical):
        assert x.ndim == len(logical)
        self.names.append(logical)
        return x

    def attend(self, method, q, k, v, grid):
        if grid is not None:
            self.methods.append(method)
        return super().attend(method, q, k, v, grid)


def test_one_method_a_layer_equals_a_plain_loop():
    case, methods = CASES["text"], (vm.Dense(scale=0.1), vm.Dense(scale=1.0), vm.Dense(scale=0.1))
    scanned = run(case, attention=methods)
    assert relative_error(scanned, plain()) > 1e-3
    chex.assert_trees_all_equal(scanned, run(case, methods=methods))
    recorder, model = Recorder(), rebuild(case.config)
    arrays = jax.tree.map(jnp.asarray, (weights_of(case.config), inputs_of(case)))
    with jax.disable_jit():  # a scan is a loop, and a switch runs its branch alone
        looped = model(arrays[0])(**arrays[1], attention=methods, sharding=recorder)
    assert recorder.methods == list(methods)
    chex.assert_trees_all_close(looped, scanned, rtol=1e-4, atol=1e-5)


def test_methods_alternate_in_one_program():
    case = CASES["text"]
    config = dataclasses.replace(case.config, layers=6)
    methods = (vm.Dense(), vm.VMonarch()) * 3
    model = rebuild(config)
    params, x = weights_of(config), inputs_of(case)
    program = jax.make_jaxpr(lambda p: model(p)(**x, attention=methods))(params)
    names = [str(equation.primitive) for equation in program.eqns]
    assert names.count("scan") == 1
    recorder = Recorder()
    jax.eval_shape(lambda p: model(p)(**x, attention=methods, sharding=recorder), params)
    assert recorder.methods == [vm.Dense(), vm.VMonarch()]


def test_axes_are_named_for_a_mesh():
    recorder, case = Recorder(), CASES["image"]
    model, x = rebuild(case.config), inputs_of(case)
    jax.eval_shape(lambda p: model(p)(**x, sharding=recorder), weights_of(case.config))
    assert set(recorder.names) >= {
        ("seq", None),
        ("batch", "seq", None),
        ("batch", "seq", "mlp"),
        ("batch", "heads", "seq", None),
        ("batch", "heads", "text", None),
    }


def test_vmonarch_on_one_frame_is_dense():
    case = CASES["one_frame"]
    dense, monarch = (run(case, attention=m) for m in (vm.Dense(), vm.VMonarch()))
    chex.assert_trees_all_close(monarch, dense, rtol=1e-4, atol=1e-5)


SLOW = pytest.mark.slow
MIXED = (DENSE, vm.VMonarch())


@functools.cache
def gradient(remat, methods):
    """Of a scalar of the output, by every parameter, in a model with all branches."""
    case = CASES["image"]
    config = dataclasses.replace(case.config, text_length=5)
    case = dataclasses.replace(case, config=config, latents=(2, 2, 6), texts=(5,))
    model = rebuild(dataclasses.replace(config, remat=remat))
    loss = lambda p, x: jnp.square(model(p)(**x, attention=methods)).mean()  # noqa: E731
    # Compiled quickly rather than well: it runs once.
    compiled = jit(jax.grad(loss))
    return compiled(weights_of(config), inputs_of(case))


@pytest.mark.parametrize(
    ("remat", "methods"),
    [
        ("full", DENSE),
        pytest.param("dots", DENSE, marks=SLOW),
        pytest.param("full", MIXED, marks=SLOW),
    ],
)
def test_gradients_do_not_depend_on_remat(remat, methods):
    none = gradient("none", methods)
    chex.assert_tree_all_finite(none)
    for name, value in none.items():
        assert jnp.abs(value).max() > 0, name
    chex.assert_trees_all_close(gradient(remat, methods), none, rtol=1e-3, atol=1e-6)


def test_bfloat16_is_close_to_float32():
    case = CASES["text"]
    out = run(case, dataclasses.replace(case.config, dtype="bfloat16"))
    assert out.dtype == jnp.float32
    assert 1e-4 < relative_error(out, plain()) < 3e-2


def test_bfloat16_weights_keep_time_in_float32():
    config = dataclasses.replace(CASES["text"].config, dtype="bfloat16")
    model = nnx.eval_shape(
        lambda: WanTransformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    )
    build, params = split_params(model)
    assert {p.dtype for p in params.values()} == {jnp.dtype(jnp.bfloat16)}
    shapes = jax.eval_shape(lambda p: build(p).time(jnp.zeros((2, 1))), params)
    assert [x.dtype for x in shapes] == [jnp.float32] * 2


@SLOW
def test_initial_weights():
    config = dataclasses.replace(CASES["text"].config, layers=2)
    params = split_params(WanTransformer(config, rngs=nnx.Rngs(0)))[1]
    abstract = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, split_params(abstract)[1])
    kernel = params["blocks.attn.q.kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    assert 0.9 < float(kernel.std() * config.dim**0.5) < 1.1


@pytest.mark.parametrize(
    ("name", "billions"),
    [("wan2.1-t2v-14B", 14.29), ("wan2.1-i2v-14B-720P", 16.39), ("wan2.2-ti2v-5B", 5.0)],
)
def test_published_sizes_trace_at_720p(name, billions):
    preset = MODELS[name]
    config = preset.transformer
    model = nnx.eval_shape(
        lambda: WanTransformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    )
    build, params = split_params(model)
    count = sum(p.size for p in params.values()) / 1e9
    assert {"14B": 14 <= count < 16.5, "20P": 16 < count < 16.5, "-5B": 4.9 < count < 5.1}[
        name[-3:]
    ]
    sizes = preset.vae.latent_size(81, 704 if config.per_token_time else 720, 1280)
    grid = config.grid_of(*sizes)
    latents = jax.ShapeDtypeStruct((1, *sizes, config.in_channels), jnp.float32)
    time = (1, grid.frames) if config.per_token_time else (1,)
    text = jax.ShapeDtypeStruct((1, config.text_length, config.text_dim), jnp.bfloat16)
    image = config.image_dim and jax.ShapeDtypeStruct((1, 257, config.image_dim), jnp.bfloat16)
    methods = (vm.Dense(),) * 2 + (vm.VMonarch(),) * (config.layers - 2)
    out = jax.eval_shape(
        lambda p, *x: build(p)(*x, attention=methods),
        params, latents, jax.ShapeDtypeStruct(time, jnp.float32), text, image,
    )  # fmt: skip
    assert out.shape == (1, *sizes, config.out_channels)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("name", CASES)
def test_entries_cover_all_parameters_once(name):
    config = CASES[name].config
    entries = transformer_entries(config)
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    shapes = {name: p.shape for name, p in split_params(model)[1].items()}
    assert len(entries) == len(shapes)
    assert {entry.name: entry.full_shape for entry in entries} == shapes
    for entry in entries:
        assert len(entry.logical) == len(entry.full_shape)
        named = [name for name in entry.logical if name]
        assert len(named) == len(set(named)), entry.name


def test_original_keys():
    config = dataclasses.replace(CASES["two_images"].config, layers=1)
    both = ("weight", "bias")
    linear = [
        "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0",
        "time_embedding.2", "time_projection.1", "head.head",
        *(f"img_emb.proj.{n}" for n in (0, 1, 3, 4)),
        "blocks.0.norm3", "blocks.0.ffn.0", "blocks.0.ffn.2",
        *(f"blocks.0.self_attn.{x}" for x in "qkvo"),
        *(f"blocks.0.cross_attn.{x}" for x in ("q", "k", "v", "o", "k_img", "v_img")),
    ]  # fmt: skip
    norms = ["self_attn.norm_q", "self_attn.norm_k"]
    norms += ["cross_attn.norm_q", "cross_attn.norm_k", "cross_attn.norm_k_img"]
    expected = {f"{name}.{part}" for name in linear for part in both}
    expected |= {f"blocks.0.{name}.weight" for name in norms}
    expected |= {"img_emb.emb_pos", "head.modulation", "blocks.0.modulation"}
    keys = [key for entry in transformer_entries(config) for key in entry.keys("original")]
    assert sorted(keys) == sorted(expected)


def test_entries_there_and_back():
    config = CASES["two_images"].config
    weights = stored_weights(config)
    for entry in transformer_entries(config):
        for key in entry.keys("diffusers"):
            np.testing.assert_array_equal(entry.theirs(entry.ours(weights[key])), weights[key])


def test_rope_turns_pairs_by_place():
    grid = vm.VideoGrid(3, 2, 4)
    cos, sin = rope_tables(grid, 128, 10_000.0)
    x = np.random.RandomState(0).standard_normal((1, 2, grid.tokens, 128))
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    place = np.stack(np.unravel_index(np.arange(grid.tokens), grid.shape), -1)
    rates = [10_000.0 ** (-np.arange(n) / n) for n in (22, 21, 21)]
    angles = np.concatenate([place[:, [i]] * rate for i, rate in enumerate(rates)], -1)
    turned = pairs * np.exp(1j * angles)
    got = rotate(jnp.asarray(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(got[..., 0::2], turned.real, atol=2e-6)
    np.testing.assert_allclose(got[..., 1::2], turned.imag, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_partners_of_pairs_are_exact_either_way(dtype):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 3, 8)), dtype)
    expected = np.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape).astype(np.float32)
    for partner in (embeddings.partner_by_product, embeddings.partner_by_shift):
        assert partner(x).dtype == jnp.float32
        np.testing.assert_array_equal(partner(x), expected)


def test_layer_norm_of_rows_far_from_zero():
    draw = np.random.RandomState(0)
    means = np.array([[0], [1], [-10], [30]])
    x = (draw.standard_normal((4, 1536)) + means).astype(np.float32)
    x[1] = 3.5  # no variance at all
    wide = x.astype(np.float64)
    mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
    expected = (wide - mean) / np.sqrt(variance + 1e-6)
    np.testing.assert_allclose(layer_norm(x, 1e-6), expected, atol=2e-3)
    # a mean within the spread, as residual streams have it, costs no digit
    np.testing.assert_allclose(layer_norm(x[:1], 1e-6), expected[:1], atol=3e-6)


def test_heads_of_tokens_are_equal_either_way():
    random = np.random.RandomState(0)
    x, kernel = random.standard_normal((2, 3, 4)), random.standard_normal((4, 5, 6))
    expected = np.einsum("znc,chd->zhnd", x, kernel)
    for heads in (transformer_layers.by_heads, transformer_layers.by_tokens):
        got = heads(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_time_features_are_cosines_then_sines():
    rates = 10_000.0 ** (-np.arange(128) / 128)
    phase = np.array([[0.0], [999.5]]) * rates
    expected = np.concatenate([np.cos(phase), np.sin(phase)], -1)
    np.testing.assert_allclose(time_features(jnp.array([0.0, 999.5]), 256), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("case", "wrong", "message"),
    [
        ("text", {"latents": (2, 5, 6, 10, 4)}, r"latents \[batch, frames, height, width, 5\]"),
        ("text", {"latents": (2, 5, 7, 10, 5)}, r"patch \(1, 2, 2\) divides, got \(5, 7, 10\)"),
        ("text", {"latents": (2, 5, 6, 5)}, "expected latents"),
        ("text", {"time": (2, 75)}, r"expected time of shape \(2,\), got \(2, 75\)"),
        ("text", {"time": ()}, r"got \(\)"),
        ("token_times", {"time": (2, 74)}, r"\(2,\) or \(2, 5\) or \(2, 75\), got \(2, 74\)"),
        ("text", {"text": (2, 17, 24)}, r"text \[2, 1 to 16, 24\], got \(2, 17, 24\)"),
        ("text", {"text": (2, 0, 24)}, "1 to 16"),
        ("text", {"text": (1, 16, 24)}, "expected text"),
        ("text", {"image": (2, 7, 28)}, r"none \(image_dim is None\) as image, got \(2, 7, 28\)"),
        ("image", {"image": None}, "image states as image, got None"),
        ("image", {"image": (2, 7, 27)}, r"image of shape \(2, 7, 28\), got \(2, 7, 27\)"),
        ("two_images", {"image": (2, 7, 28)}, r"image of shape \(2, 14, 28\), got \(2, 7, 28\)"),
    ],
)
def test_wrong_shapes_say_what_is_expected(case, wrong, message):
    case = CASES[case]
    x = {name: None if value is None else value.shape for name, value in inputs_of(case).items()}
    x = {name: shape and jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in x.items()}
    for name, shape in wrong.items():
        x[name] = None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
    model = rebuild(case.config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, x: model(p)(**x), weights_of(case.config), x)


def test_wrong_number_of_methods():
    config, methods = CASES["text"].config, (vm.Dense(),) * 4
    with pytest.raises(ValueError, match="each of 3 layers, got 4"):
        rebuild(config, attention=methods)
    with pytest.raises(ValueError, match="each of 3 layers, got 4"):
        run(CASES["text"], attention=methods)
