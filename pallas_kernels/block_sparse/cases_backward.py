"""The two walks of the gradient of block-sparse attention at a real shape, one head of it."""

import functools

import jax
import jax.numpy as jnp

from ..block_sizes import BlockSizes
from ..tpu.case import Case
from .cases import BLOCKS, DIM, VIDEOS, blocks_of, label, lists, padded
from .tpu_backward import DKV, DQ, backward

SHARE = 0.1  # of the blocks that are kept


def _build(kernel: str, block: int, length: int, block_sizes: BlockSizes):
    def function(q, k, v, indices, counts, out, lse, dout, dlse):
        dq, *others = backward(
            q, k, v, indices, counts, out, lse, dout, dlse,
            block=block, length=length, scale=DIM**-0.5, block_sizes=block_sizes,
        )  # fmt: skip
        return dq if kernel == DQ else others  # the other walk is not compiled

    return function


def _case(kernel: str, name: str, tokens: int, block: int) -> Case:
    array = padded(tokens, block)
    n = array.shape[1]
    kept = lists(tokens, block, SHARE)
    room = kept[0].shape[-1]
    line = jax.ShapeDtypeStruct((1, n), jnp.float32)
    return Case(
        kernel=kernel,
        shape={"rows": n, "keys": n, "dim": DIM, "width": DIM} | blocks_of(block, room),
        dtype="bfloat16",
        build=functools.partial(_build, kernel, block, tokens),
        arguments=(array, array, array, *kept, array, line, array, line),
        candidates=tuple({"rows": r, "keys": k} for r in (1024, 2048) for k in (512, 1024)),
        name=label(name, block, SHARE),
    )


CASES = tuple(_case(kernel, *VIDEOS[0], block) for kernel in (DQ, DKV) for block in BLOCKS)
