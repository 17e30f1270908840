"""The calls of the AdaSpa tests: methods, arrays, and one denoising step, compiled once each."""

import dataclasses
import functools

import adaspa_oracle as oracle
import jax.numpy as jnp
import numpy as np
from compiling import jit

import vmonarch_jax as vm

GRID = vm.VideoGrid(3, 3, 4)  # 36 tokens
HEADS, DIM = 5, 6
SMALL = vm.AdaSpa(sparsity=0.5, block_size=4, search_steps=(1, 3), warmup_steps=1, recall=0.7)
# Sequences that are no multiple of the block, borders within blocks, text on both sides.
METHODS = {
    "video": SMALL,
    "short last block": dataclasses.replace(SMALL, block_size=5, scale=0.7),
    "one budget": dataclasses.replace(SMALL, head_adaptive=False),
    "no cache": dataclasses.replace(SMALL, lse_cache=False),
    "sparse": dataclasses.replace(SMALL, sparsity=0.8, recall=0.4),
    "dense-ish": dataclasses.replace(SMALL, sparsity=0.2),
    "text after": dataclasses.replace(SMALL, text_tokens=6, block_size=5),
    "text before": dataclasses.replace(SMALL, text_tokens=6, block_size=5, text="before"),
    "text in whole blocks": dataclasses.replace(SMALL, text_tokens=8),
}
# The least to compile; where the implementation matters, a test names it.
SIMPLE = "reference"


def arrays(method, seed=0, batch=2, heads=HEADS, dtype="float32", grid=GRID):
    """q, k, v whose heads and entries differ in how much they concentrate."""
    rng = np.random.default_rng(seed)
    shape = (batch, grid.tokens + method.text_tokens, heads, DIM)
    q, k, v = (rng.standard_normal(shape) for _ in range(3))
    sharpness = np.array([4.0, 0.3, 2.0, 6.0, 1.0])[np.arange(heads) % 5]
    entry = np.array([1.0, 0.4])[np.arange(batch) % 2]
    q = q * sharpness[:, None] * entry[:, None, None, None]
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def drifting(method, steps):
    """q, k and v of some denoising steps, each a little further from the first."""
    first, last = (arrays(method, seed) for seed in (0, 1))
    return [
        tuple(a + 0.1 * n * (b - a) for a, b in zip(first, last, strict=True)) for n in range(steps)
    ]


def fresh(method, batch=2, heads=HEADS, dtype="float32", grid=GRID):
    """The state before the first step."""
    return vm.init_state(method, grid, batch=batch, heads=heads, head_dim=DIM, dtype=dtype)


def plain(method, step, state, q, k, v, grid=GRID, implementation=SIMPLE):
    """`(part, state)` of one denoising step, to be compiled with what is around it."""
    on = {"grid": grid, "return_lse": True, "implementation": implementation}
    return vm.attend(method, q, k, v, state=state, step=step, **on)


@functools.cache
def compiled(method, step, grid, implementation):
    def call(q, k, v, state, traced):
        number = traced if step is None else step
        return plain(method, number, state, q, k, v, grid, implementation)

    return jit(call)


def attend(method, step, state, q, k, v, *, traced=False, grid=GRID, implementation=SIMPLE):
    """`(part, state)` of one denoising step, compiled for this step or for any."""
    call = compiled(method, None if traced else step, grid, implementation)
    return call(q, k, v, state, 0 if step is None else step)


def alone(method, q, k, v, implementation=SIMPLE):
    """The part of a call without a state."""
    return attend(method, None, None, q, k, v, implementation=implementation)[0]


dense = jit(functools.partial(vm.dense_attention, implementation=SIMPLE, return_lse=True))


def unrolled(method, inputs, state, implementation=SIMPLE):
    """All steps as a Python loop of static ones: `[(part, state)]`."""
    found = []
    for number, qkv in enumerate(inputs):
        part, state = attend(method, number, state, *qkv, implementation=implementation)
        found.append((part, state))
    return found


def kept_of(state):
    """The state's key blocks as sets, `[batch][heads][row blocks]`."""
    indices, counts = np.asarray(state.indices), np.asarray(state.counts)
    batch, heads, rows = counts.shape
    return [
        [
            [set(indices[z, h, p, : counts[z, h, p]].tolist()) for p in range(rows)]
            for h in range(heads)
        ]
        for z in range(batch)
    ]


def all_kept(state):
    """The same, as one flat list."""
    return [kept for heads in kept_of(state) for rows in heads for kept in rows]


def expected(method, q, k):
    """The oracle's logits, dense log-sum-exp and kept pairs of tokens for a fresh search."""
    x = oracle.logits(method, *(np.asarray(y, np.float64) for y in (q, k)))
    lse = oracle.log_sum_exp(x)
    found = [oracle.choose(method, GRID.tokens, *pair) for pair in zip(x, lse, strict=True)]
    return x, lse, oracle.where(method, GRID.tokens, found)
