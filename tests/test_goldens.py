"""Parity with MonarchAttention's published torch results: goldens/make_monarch_attention.py."""

import functools
from pathlib import Path

import numpy as np
import oracle
import pytest
from compiling import jit
from tolerances import assert_close

import vmonarch_jax as vm

GOLDENS = Path(__file__).parent / "goldens" / "monarch_attention.npz"


@functools.cache
def load():
    with np.load(GOLDENS) as file:
        return dict(file)


INDICES = range(len(load()["cases"]))


def golden(index):
    """Query, key, value, mask and their result, and the settings it was made with."""
    n, block_size, steps, pre = (int(x) for x in load()["cases"][index])
    query, key, value = (load()[f"{name}.{n}"] for name in ("query", "key", "value"))
    mask, out = load()[f"mask.{index}"], load()[f"out.{index}"]
    # In their code a masked token still starts as a mean query: only a zero one means the same.
    query = np.where(mask[:, :, None, None], query, np.float32(0))
    settings = {"block_size": block_size, "steps": steps, "pad": "pre" if pre else "post"}
    return (query, key, value), mask, out, settings


@pytest.mark.parametrize("index", INDICES)
def test_oracle(index):
    arrays, mask, out, settings = golden(index)
    part = oracle.monarch_sequence(*arrays, key_mask=mask, **settings)
    assert_close(out, part.out, "float32", "forward")


@functools.cache
def compiled(implementation, block_size, steps, pad):
    return jit(
        functools.partial(
            vm.monarch_attention,
            block_size=block_size,
            steps=steps,
            pad=pad,
            implementation=implementation,
        )
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("index", INDICES)
def test_library(index, implementation):
    arrays, mask, expected, settings = golden(index)
    out = compiled(implementation, **settings)(*arrays, key_mask=mask)
    assert_close(out, expected, "float32", "forward")
