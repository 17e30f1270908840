"""The gradient of attention and of R steps through the compilers of an H100: `make aot-gpu`."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from aot_gpu.test_mosaic import check
from vmonarch_jax.pallas_kernels.attend.gpu_backward import softmax_rows_backward

pytestmark = [
    pytest.mark.skipif("AOT_GPU" not in os.environ, reason="set AOT_GPU=1; see `make aot-gpu`"),
    pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="no CUDA JAX"),
]

# Groups, heads, rows, keys, head dim, widths of values beside K, whether K is a value.
ROWS = [
    (21, 12, 1560, 1560, 128, (), True),
    (21, 12, 1560, 1560, 128, (128,), True),
    (21, 12, 3600, 3600, 128, (128,), True),
    (81, 12, 1456, 1456, 128, (128,), True),
    (630, 12, 52, 52, 128, (128,), True),
    (21, 12, 1560, 1560, 64, (), True),
    (21, 12, 1560, 1560, 64, (64,), True),
    (21, 12, 1456, 1456, 128, (64,), True),
    (1, 12, 1560, 32760, 128, (128,), False),
    (1, 12, 1560, 32760, 128, (64, 64), False),
    (1, 12, 32768, 32768, 128, (128,), False),
    (1, 12, 32760, 32760, 64, (64,), False),
]


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradient(size, dtype, scaled):
    x, y, n, s, d, widths, shared = size
    if scaled and not (shared and widths):
        pytest.skip("only the first of several gains may be the scale")
    gains = ((0.1 if scaled else 1.0,) if shared else ()) + (1.0,) * len(widths)

    def gradient(q, k, values, outs, lse, dlse):
        return softmax_rows_backward(
            q, k, values, outs, lse, outs, dlse,
            scale=0.1, gains=gains, shared=shared, name="rows_backward",
        )  # fmt: skip

    def array(rows, width):
        return jax.ShapeDtypeStruct((x, y, rows, width), dtype)

    line = jax.ShapeDtypeStruct((x, y, n), jnp.float32)
    values = tuple(array(s, width) for width in widths)
    outs = tuple(array(n, width) for width in ((d,) * shared + widths))
    # Of 64 x 64 x 16: the scores, their gradient, dq (for 128 keys), dk, and values.
    parts = 128 // d
    products = 4 * (parts * (d + 2 * sum(x.shape[-1] for x in outs) + d) // 64 + 2)
    check(gradient, array(n, d), array(s, d), values, outs, line, line, products=products)
