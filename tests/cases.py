"""The calls that every implementation must get right, each with its oracle.

A case is a public function, sizes and settings. `library` makes the call, `expected` what float64
says it is: output, log-sum-exp and the three gradients for fixed random cotangents.
"""

import dataclasses
import functools
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import jit

import vmonarch_jax as vm

# Later implementations join here. One that cannot do a call on this machine is skipped, with why.
# "xla-chunked" is "xla" with chunks so small that even these sizes need many, not all of them full.
IMPLEMENTATIONS = {
    "reference": {"implementation": "reference"},
    "xla": {"implementation": "xla"},
    "xla-chunked": {"implementation": "xla", "block_sizes": vm.BlockSizes(xla_scores=200)},
    "pallas_tpu": {"implementation": "pallas_tpu"},  # interpreted: see `tpu_interpreted`
}


@dataclasses.dataclass(frozen=True)
class Case:
    function: str  # dense, monarch, vmonarch, tiled
    size: tuple  # (queries, keys), (tokens,), or the grid
    settings: tuple = ()  # keyword arguments, as pairs
    batch: int = 2
    heads: int = 2
    dim: int = 4
    value_dim: int = 4
    masked: bool = False

    def __str__(self):
        words = [self.function, "x".join(map(str, self.size))]
        words += [f"{k}={v}".replace(" ", "") for k, v in self.settings]
        odd = {"batch": 2, "heads": 2, "value_dim": 4, "masked": False}
        words += [
            f"{k}={getattr(self, k)}" for k, usual in odd.items() if getattr(self, k) != usual
        ]
        return "-".join(words)

    @property
    def queries(self):
        return self.size[0] if self.function == "dense" else int(np.prod(self.size))

    @property
    def keys(self):
        return self.size[1] if self.function == "dense" else self.queries

    @property
    def entropy_gradient(self):
        # The plain sequence has no such switch: its gradient is that of the whole function.
        return dict(self.settings).get("entropy_gradient", self.function == "monarch")


def make(function, *size, **settings):
    own = {f.name for f in dataclasses.fields(Case)}
    fields = {k: settings.pop(k) for k in list(settings) if k in own}
    return Case(function, size, tuple(settings.items()), **fields)


# --- inputs ---------------------------------------------------------------------------------------


def rng_of(case):
    return np.random.default_rng(zlib.crc32(str(case).encode()))


def mask_of(case):
    """About a third of the keys masked; blocks that lose all of theirs are in test_robustness."""
    if not case.masked:
        return None
    mask = rng_of(case).random((case.batch, case.keys)) < 0.67
    mask[:, :: dict(case.settings).get("block_size", case.keys)] = True
    mask[:, -1] = True
    return mask


def inputs_of(case, dtype="float32"):
    """Query, key, value with logits of a few units, exactly representable in `dtype`."""
    rng = rng_of(case)
    shapes = [
        (case.batch, case.queries, case.heads, case.dim),
        (case.batch, case.keys, case.heads, case.dim),
        (case.batch, case.keys, case.heads, case.value_dim),
    ]
    scale = {"float32": 1.5, "bfloat16": 1.0}[dtype]
    return tuple(jnp.asarray(rng.normal(size=s) * scale, dtype) for s in shapes)


def cotangents_of(case, dtype="float32"):
    rng = np.random.default_rng(zlib.crc32(str(case).encode()) + 1)
    out = rng.normal(size=(case.batch, case.queries, case.heads, case.value_dim))
    lse = rng.normal(size=(case.batch, case.queries, case.heads))
    return jnp.asarray(out, dtype), jnp.asarray(lse, jnp.float32)


# --- the library ----------------------------------------------------------------------------------


def library(case, **how):
    """The public function of a case as `f(query, key, value) -> (out, lse)`."""
    keywords = dict(case.settings) | {"return_lse": True} | how
    if case.masked:
        keywords["key_mask"] = jnp.asarray(mask_of(case))
    if case.function in ("vmonarch", "tiled"):
        keywords["grid"] = vm.VideoGrid(*case.size)
    function = {
        "dense": vm.dense_attention,
        "monarch": vm.monarch_attention,
        "vmonarch": vm.vmonarch_attention,
        "tiled": vm.tiled_monarch_attention,
    }[case.function]
    return functools.partial(function, **keywords)


def run(case, implementation, dtype="float32"):
    """Output, log-sum-exp and gradients in one compiled call, the same to the bit in a second.

    Skips what cannot run here.
    """
    function = library(case, **IMPLEMENTATIONS[implementation])

    @jit
    def everything(arrays, cotangents):
        results, pull = jax.vjp(lambda *a: tuple(function(*a)), *arrays)
        return *results, pull(cotangents)

    arguments = inputs_of(case, dtype), cotangents_of(case, dtype)
    try:
        results = everything(*arguments)
    except NotImplementedError as reason:
        pytest.skip(f"{implementation}: {reason}")
    chex.assert_trees_all_equal(results, everything(*arguments))
    return results


# --- the oracle -----------------------------------------------------------------------------------


def oracle_of(case, mask=None):
    """The oracle's function of a case, `f(query, key, value, entropies=None) -> Part`."""
    settings = dict(case.settings)
    settings.pop("entropy_gradient", None)
    if "c_r_floor" in settings:
        settings["floor"] = settings.pop("c_r_floor")
    if case.function == "dense":
        return lambda q, k, v, entropies=None: oracle.dense(q, k, v, key_mask=mask, **settings)
    if case.function == "monarch":
        return functools.partial(oracle.monarch_sequence, key_mask=mask, **settings)
    _, height, width = case.size
    defaults = {
        "vmonarch": {"block": (1, height, width), "recompute_frames": 1},
        "tiled": {"block": (1, 1, width), "tile": (1, height, width), "steps": 1},
    }[case.function]
    settings = {"grid": case.size, "key_mask": mask} | defaults | settings
    return functools.partial(oracle.monarch_grid, **settings)


@functools.cache
def expected(case, dtype="float32"):
    """`(out, lse, gradients)` of a case in float64, from the inputs as `dtype` holds them."""
    arrays, cotangents = inputs_of(case, dtype), cotangents_of(case, dtype)
    mask = mask_of(case)
    part = oracle_of(case, mask)(*arrays)
    gradients = []
    for z in range(case.batch):
        one = [np.asarray(a, np.float64)[z : z + 1] for a in (*arrays, *cotangents)]
        function = oracle_of(case, None if mask is None else mask[z])
        gradients.append(
            oracle.monarch_gradients(
                function, one[:3], one[3:], entropy_gradient=case.entropy_gradient
            )
        )
    return part.out, part.lse, tuple(np.concatenate(g) for g in zip(*gradients, strict=True))
