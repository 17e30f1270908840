"""cuDNN's flash attention, forward and backward, as XLA's custom calls.

`jax.nn.dot_product_attention` reaches the same calls, but it rounds the log-sum-exp to the dtype
of the output, and drops the gradient that flows into it. Here it stays float32, and the backward
call is within reach. Arrays are `[x, y, rows, dim]`, x and y any two batch axes. In memory the rows
come before y, as tokens come before heads in the arrays of a caller: where these are what is handed
in and out, by whatever axes they are named here, XLA has nothing to transpose.
"""

import contextlib
import contextvars
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import mode
from .batching import flat_vmap

DTYPES = {"bfloat16": "BF16", "float16": "F16"}

# Wider heads need Hopper, and their backward pass a recent cuDNN.
MOST_DIM = 128

# The kernels' grids count both batch axes in fields of 16 bits.
MOST_GROUPS = 65_535

# How keys are split: rows of a group that a block of cuDNN's threads takes; keys that make a part
# worth its merging; the most parts; the share of the multiprocessors' time that is good enough.
TILE, LEAST_KEYS, MOST_PARTS, BUSY = 128, 512, 64, 0.9

_FORWARD = "__cudnn$fmhaSoftmax"
_BACKWARD = "__cudnn$fmhaSoftmaxBackward"

_stand_in: contextvars.ContextVar[Any] = contextvars.ContextVar("cudnn_stand_in", default=None)


@contextlib.contextmanager
def standing_in(forward: Callable[..., Any], backward: Callable[..., Any]) -> Iterator[None]:
    """Calls traced inside go to functions of the same contract instead, on any device and dtype.

    They are `forward(q, k, v, scale) -> (out, lse)` and
    `backward(q, k, v, lse, out, dout, scale) -> (dq, dk, dv)`.
    """
    token = _stand_in.set((forward, backward))
    try:
        yield
    finally:
        _stand_in.reset(token)


def unavailable() -> str:
    """Why cuDNN's attention can't be called here; empty if it can."""
    if _stand_in.get() is not None or mode.compiling_ahead():
        return ""
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, and this is a {jax.default_backend()}"
    device = jax.devices()[0]
    # AMD's have names such as "gfx942" here.
    major, dot, _ = str(getattr(device, "compute_capability", "")).partition(".")
    if not (dot and major.isdigit() and int(major) >= 8):
        return f"needs an NVIDIA GPU from Ampere on, and this is a {device.device_kind}"
    return ""


def check(q: Array, k: Array, values: tuple[Array, ...]) -> None:
    """What cuDNN can't do.

    Raises:
        NotImplementedError: for a dtype, a head dimension or a number of groups out of its reach.
    """
    dim = q.shape[-1]
    for v in values:
        if v.shape[-1] != dim:
            raise NotImplementedError(
                f"the value dimension must equal the head dimension {dim}, got {v.shape[-1]}"
            )
    if _stand_in.get() is not None:
        return
    if q.dtype.name not in DTYPES or k.dtype != q.dtype:
        raise NotImplementedError(f"takes {' or '.join(DTYPES)}, got {q.dtype} and {k.dtype}")
    if dim > MOST_DIM or dim % 8:
        raise NotImplementedError(
            f"the head dimension must be a multiple of 8 up to {MOST_DIM}, got {dim}"
        )
    if max(q.shape[:2]) > MOST_GROUPS:
        raise NotImplementedError(f"at most {MOST_GROUPS} groups an axis, got {max(q.shape[:2])}")


def unserved(q: Array, k: Array, values: tuple[Array, ...]) -> str:
    """Why cuDNN can't serve these arrays here; empty if it can."""
    try:
        check(q, k, values)
    except NotImplementedError as error:
        return str(error)
    return unavailable()


def forward(
    q: Float[Array, "x y n d"], k: Float[Array, "x y s d"], v: Float[Array, "x y s d"], scale: float
) -> tuple[Float[Array, "x y n d"], Float[Array, "x y n"]]:
    """`(out, lse)`: softmax attention, out in the dtype of v, lse in float32."""
    stand_in = _stand_in.get()
    if stand_in is not None:
        return stand_in[0](q, k, v, scale)
    return flat_vmap(functools.partial(_forward, scale=float(scale)), q, k, v)


def backward(
    q: Float[Array, "x y n d"],
    k: Float[Array, "x y s d"],
    v: Float[Array, "x y s d"],
    lse: Float[Array, "x y n"],
    out: Float[Array, "x y n d"],
    dout: Float[Array, "x y n d"],
    scale: float,
) -> tuple[Float[Array, "x y n d"], Float[Array, "x y s d"], Float[Array, "x y s d"]]:
    """`(dq, dk, dv)`, with the weights computed again from lse.

        p = exp(scale q . k - lse) ;  dx = p (dout . v - dout . out)
        dq = scale dx k ;  dk = scale dx^T q ;  dv = p^T dout

    `out` is used in `dout . out` alone: another `out` shifts every dx of a row.
    """
    stand_in = _stand_in.get()
    if stand_in is not None:
        return stand_in[1](q, k, v, lse, out, dout, scale)
    function = functools.partial(_backward, scale=float(scale))
    return flat_vmap(function, q, k, v, lse, out, dout)


def _forward(q, k, v, *, scale):
    results = (
        jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), v.dtype),
        jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        _WORKSPACE,
    )
    call = _call(_FORWARD, results, (_ROWS_FIRST, None, None), q, k, scale, _PRODUCTS)
    out, lse, _ = call(*map(_rows_first, (q, k, v)))
    return out, lse


def _backward(q, k, v, lse, out, dout, *, scale):
    results = (*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)), _WORKSPACE)
    layouts = (*[_ROWS_FIRST] * 3, None)
    call = _call(_BACKWARD, results, layouts, q, k, scale, _GRADIENT_PRODUCTS)
    q, k, v, out, dout = map(_rows_first, (q, k, v, out, dout))
    dq, dk, dv, _ = call(q, k, v, lse, dout, out)
    return dq, dk, dv


def _rows_first(x: Float[Array, "x y n d"]) -> Float[Array, "x n y d"]:
    return x.swapaxes(1, 2)


# The same of a result, as an order of its axes in memory. Operands and results of the calls that
# JAX makes differ in this way too.
_ROWS_FIRST = (0, 2, 1, 3)

# XLA finds out how much the call needs and puts it here.
_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)

# The axes of each product, left and right: those that are contracted, and those of the batch.
# Scores are `[x, y, n, s]`, the rest is `[x, n, y, d]`.
_SCORES, _ROWS = (0, 1), (0, 2)
_PRODUCTS = {
    "bmm1": ((3, 3), (_ROWS, _ROWS)),
    "bmm2": ((3, 1), (_SCORES, _ROWS)),
}
_GRADIENT_PRODUCTS = {
    "bmm1_grad_gemm1": ((2, 1), (_SCORES, _ROWS)),
    "bmm1_grad_gemm2": ((3, 1), (_SCORES, _ROWS)),
    "bmm2_grad_gemm1": ((2, 1), (_SCORES, _ROWS)),
    "bmm2_grad_gemm2": ((3, 3), (_ROWS, _ROWS)),
}


def _call(target, results, layouts, q, k, scale, products):
    return jax.ffi.ffi_call(
        target,
        results,
        output_layouts=layouts,
        custom_call_api_version=2,
        legacy_backend_config=config(q.shape, k.shape[2], q.dtype.name, scale, products),
    )


def config(
    shape: tuple[int, ...], keys: int, dtype: str, scale: float, products: dict[str, Any]
) -> str:
    """What XLA reads about a call: `GpuBackendConfig`, as JSON; its whole numbers are strings."""
    dimensions = [str(n) for n in (*shape[:3], keys)]
    settings: dict[str, Any] = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": scale,
        "intermediate_tensor_shape": {
            "element_type": DTYPES[dtype],
            "dimensions": dimensions,
            "tuple_shapes": [],
            "layout": {
                "dim_level_types": [],
                "dim_unique": [],
                "dim_ordered": [],
                "minor_to_major": ["3", "2", "1", "0"],
                "tiles": [],
                "element_size_in_bits": "0",
                "memory_space": "0",
                "index_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "dynamic_shape_metadata_prefix_bytes": "0",
            },
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "NO_MASK",
    }
    for name, (contracted, batch) in products.items():
        settings[f"{name}_dot_dimension_numbers"] = {
            "lhs_contracting_dimensions": [str(contracted[0])],
            "rhs_contracting_dimensions": [str(contracted[1])],
            "lhs_batch_dimensions": [str(n) for n in batch[0]],
            "rhs_batch_dimensions": [str(n) for n in batch[1]],
        }
    settings |= {
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": settings})


def split_keys(groups: int, rows: int, keys: int) -> int:
    """Into how many parts of equal length to cut the keys so that every multiprocessor has work.

    A call works on `TILE` rows of a group at a time, on one multiprocessor, and goes through all
    keys there: few rows leave most of the GPU idle, or its last round nearly empty. The parts are
    other groups, and are merged by their log-sum-exp.
    """
    tiles, cores = groups * math.ceil(rows / TILE), mode.multiprocessors()

    def busy(parts: int) -> float:
        rounds = tiles * parts / cores
        return rounds / math.ceil(rounds)

    choices = [p for p in range(1, MOST_PARTS + 1) if keys % p == 0 and keys >= p * LEAST_KEYS]
    return next((p for p in choices if busy(p) >= BUSY), max(choices, key=busy, default=1))
