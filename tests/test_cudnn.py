"""The cuDNN route's algebra, with einsums in cuDNN's place; and what it declines."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cotangents_of, expected, inputs_of, library, make
from compiling import jit
from cudnn_stand_in import standing_in
from jax.interpreters import mlir
from tolerances import assert_close
from vmonarch_jax.pallas_kernels.attend import cudnn as attend
from vmonarch_jax.pallas_kernels.attend import reference as attend_reference
from vmonarch_jax.pallas_kernels.block_sizes import BlockSizes
from vmonarch_jax.pallas_kernels.gpu import cudnn, mode
from vmonarch_jax.pallas_kernels.r_step import cudnn as r_step
from vmonarch_jax.pallas_kernels.r_step import reference as r_reference

import vmonarch_jax as vm

CASES = [
    make("dense", 17, 23),
    make("dense", 1, 1, batch=1, heads=1),
    make("monarch", 24, block_size=6, steps=2),
    make("vmonarch", 3, 2, 4, steps=1, recompute_frames=0),
    make("vmonarch", 5, 1, 3, steps=3, entropy_gradient=True, scale=0.5),
    make("vmonarch", 7, 3, 1, recompute_frames=(0, 5)),
    make("vmonarch", 4, 2, 2, block=(2, 2, 2), recompute_frames=3),
    make("vmonarch", 5, 2, 3, block=(5, 1, 1), recompute_frames=0),
    make("tiled", 3, 4, 4, entropy_gradient=True),
]
DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES] + [(CASES[n], "bfloat16") for n in (0, 4, 8)],
    ids=str,
)
def test_calls(case, dtype):
    function = library(case, implementation="cudnn")

    @jit
    def everything(arrays, cotangents):
        results, pull = jax.vjp(lambda *a: tuple(function(*a)), *arrays)
        return *results, pull(cotangents)

    with standing_in():
        out, lse, gradients = everything(inputs_of(case, dtype), cotangents_of(case, dtype))
    want_out, want_lse, want_gradients = expected(case, dtype)
    assert out.dtype == dtype
    assert_close(out, want_out, dtype, "forward")
    assert_close(lse, want_lse, dtype, "lse")
    for got, want in zip(gradients, want_gradients, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, dtype, "gradient")


def arrays(*shapes, dtype="float32"):
    generator = np.random.default_rng(sum(map(np.prod, shapes)))
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def compare(function, reference, inputs, bars, dtype):
    """Results and gradients, of any number of leaves, against the float32 oracle."""

    def everything(function):
        @jit
        def run(inputs, bars):
            outs, pull = jax.vjp(function, *inputs)
            return outs, pull(jax.tree.map(lambda x, bar: bar.astype(x.dtype), outs, bars))

        return run

    with standing_in():
        outs, gradients = everything(function)(inputs, bars)
    wide = [x.astype(jnp.float32) for x in inputs]
    wanted, wanted_gradients = everything(reference)(wide, bars)
    for got, want in zip(jax.tree.leaves(outs), jax.tree.leaves(wanted), strict=True):
        assert_close(got, want, dtype, "forward")
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert_close(got, want, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silent", [False, True], ids=["", "silent"])
def test_gradient_of_the_log_sum_exp(dtype, silent):
    """Also where no gradient flows into the output, whose rows then cannot carry it."""
    q, k, v = arrays((2, 9, 16), (2, 13, 16), (2, 13, 16), dtype=dtype)
    out_bar, lse_bar = arrays((2, 9, 16), (2, 9))
    if silent:
        out_bar = out_bar.at[:, ::2].set(0)
    lse_bar = lse_bar.at[:, 3].set(0)

    def run(attention, **more):
        def call(q, k, v):
            (out,), lse = attention(q, k, (v,), scale=0.3, gains=(0.7,), **more)
            return out, lse

        return call

    compare(
        run(attend.attend, block_sizes=BlockSizes()), run(attend_reference.attend),
        (q, k, v), (out_bar, lse_bar), dtype,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [1, 3, 13])
def test_keys_in_parts(parts, monkeypatch):
    monkeypatch.setattr(cudnn, "split_keys", lambda *_: parts)
    q, k, v = arrays((2, 5, 8), (2, 39, 8), (2, 39, 8))
    q = q * 20  # parts of very different weight

    def run(attention, **more):
        return lambda q, k, v: attention(q, k, (v,), scale=0.3, **more)

    bars = ((arrays((2, 5, 8))[0],), arrays((2, 5))[0])
    compare(
        run(attend.attend, block_sizes=BlockSizes()), run(attend_reference.attend),
        (q, k, v), bars, "float32",
    )  # fmt: skip


def test_how_keys_are_split():
    def busy(groups, rows, keys):
        parts = cudnn.split_keys(groups, rows, keys)
        assert keys % parts == 0
        assert parts == 1 or keys // parts >= cudnn.LEAST_KEYS
        rounds = groups * -(-rows // cudnn.TILE) * parts / mode.multiprocessors()
        return parts, rounds / -(-rounds // 1)

    for frames in (16, 20, 46, 81):
        for heads in (1, 12):  # a first frame
            assert busy(heads, 1456, frames * 1456)[1] >= 0.85
    assert busy(12, 81 * 1456, 81 * 1456)[0] == 1
    assert busy(1, 7, 997)[0] == 1


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("values", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_r_step(dtype, values, entropy_gradient):
    inputs = arrays((2, 3, 7, 16), *[(2, 3, 11, 16)] * (1 + values), dtype=dtype)
    settings = {"scale": 16**-0.5, "entropy_gradient": entropy_gradient}

    def run(function, **more):
        return lambda q, k, *v: function(q, k, v, **settings, **more)

    kernel = run(r_step.r_step, block_sizes=BlockSizes())
    bars = jax.tree.map(
        lambda x: arrays(x.shape)[0], jax.eval_shape(run(r_reference.r_step), *inputs)
    )
    compare(kernel, run(r_reference.r_step), inputs, bars, dtype)


def test_known_results_are_not_computed_again():
    q, k, v = arrays((2, 3, 7, 16), (2, 3, 7, 16), (2, 3, 7, 16))
    settings = {"scale": 0.25, "block_sizes": BlockSizes()}

    def gradient(known):
        def run(q, k, v):
            return r_step.r_step(q, k, (v,), known=known, **settings).ys[0].sum()

        return jax.jit(jax.grad(run, (0, 1, 2)))

    with standing_in():
        step = r_step.r_step(q, k, (v,), **settings)
        jaxprs = [str(gradient(known).trace(q, k, v).jaxpr) for known in (None, step)]
        results = [gradient(known)(q, k, v) for known in (None, step)]
    assert jaxprs[0].count(" = log ") > jaxprs[1].count(" = log ")
    for got, want in zip(*results, strict=True):
        assert_close(got, want, "float32", "gradient")


def test_vmap_of_the_call_joins_the_groups():
    def lowered(function, *shapes):
        with mode.compiling_for_hopper():
            given = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
            traced = jax.jit(function).trace(*given)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    def call(q, k):
        return cudnn.forward(q, k, k, 0.125)

    shape = (2, 3, 64, 64)
    text = lowered(jax.vmap(call, (0, None)), (5, *shape), shape)
    assert text.count("stablehlo.custom_call @__cudnn$fmhaSoftmax") == 1
    assert "tensor<10x3x64x64xbf16>" in text


@pytest.mark.parametrize("backward", [False, True])
def test_the_call_is_the_one_that_jax_makes(backward):
    """Of arrays `[x, n, y, d]`: which axes each product contracts, and where results lie."""
    calls = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    x, y, n, s, d, scale = 5, 3, 96, 128, 64, 0.125
    with mlir.make_ir_context(), mlir.ir.Location.unknown():
        wanted = calls.create_dot_product_attention_backend_config(
            x, y, n, s, mlir.ir.BF16Type.get(), scale, 42, 0.0, calls.MaskType.NO_MASK,
            calls.AttentionLayout.BTNH.value, 0, 1, False, backward,
        )  # fmt: skip
    q, k = (jax.ShapeDtypeStruct((x, y, rows, d), jnp.bfloat16) for rows in (n, s))
    lse = jax.ShapeDtypeStruct((x, y, n), jnp.float32)

    def call(q, k, lse):
        return (
            cudnn.backward(q, k, k, lse, q, q, scale) if backward else cudnn.forward(q, k, k, scale)
        )

    with mode.compiling_for_hopper():
        text = jax.jit(call).trace(q, k, lse).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
    config = re.search(r'backend_config = "((?:[^"\\]|\\.)*)"', line)[1].replace("\\22", '"')
    assert json.loads(config) == json.loads(wanted)
    arrays, results = re.findall(r"_layouts = \[(.*?)\](?:, |\})", line)
    assert arrays.count("dense<[3, 2, 1, 0]>") == (5 if backward else 3)
    assert results.count("dense<[3, 1, 2, 0]>") == (3 if backward else 1)
    assert f"(tensor<{x}x{n}x{y}x{d}xbf16>, tensor<{x}x{s}x{y}x{d}xbf16>" in line


def test_reasons():
    q = jnp.ones((1, 24, 1, 8))
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, and this is a"):
            vm.dense_attention(q, q, q, implementation="cudnn")
    mask = jnp.ones((1, 24), bool)
    with mode.compiling_for_hopper():
        for dtype, dim, message in (
            ("float32", 64, "takes bfloat16 or float16, got float32"),
            ("bfloat16", 12, "multiple of 8 up to 128, got 12"),
            ("bfloat16", 256, "multiple of 8 up to 128, got 256"),
        ):
            x = jax.ShapeDtypeStruct((1, 24, 1, dim), dtype)
            with pytest.raises(NotImplementedError, match=message):
                jax.eval_shape(lambda x: vm.dense_attention(x, x, x, implementation="cudnn"), x)
    with standing_in():
        with pytest.raises(NotImplementedError, match="no bias or mask"):
            vm.dense_attention(q, q, q, key_mask=mask, implementation="cudnn")
        with pytest.raises(NotImplementedError, match="must equal the head dimension 8, got 4"):
            vm.dense_attention(q, q, q[..., :4], implementation="cudnn")
        # Blocks that do not divide the grid are padded, and padding is masked.
        with pytest.raises(NotImplementedError, match="no masked keys"):
            vm.vmonarch_attention(q, q, q, grid=(3, 2, 4), block=(2, 2, 4), implementation="cudnn")
        # Another implementation then serves the call.
        both = vm.dense_attention(q, q, q, key_mask=mask, implementation=("cudnn", "xla"))
    np.testing.assert_allclose(both, jnp.ones_like(q), rtol=1e-6)
