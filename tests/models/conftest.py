"""Fixtures of the models' tests."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from vmonarch_jax.models import VideoDiT, VideoDiTConfig, split_params


@pytest.fixture(scope="session")
def awake():
    """Makes a model without any zeros in its parameters, so that everything matters."""

    def make(config: VideoDiTConfig, **kwargs) -> VideoDiT:
        abstract = nnx.eval_shape(lambda: VideoDiT(config, rngs=nnx.Rngs(0), **kwargs))
        rebuild, params = split_params(abstract)
        rng = np.random.default_rng(5)

        def draw(shape):
            scale = 1 / math.sqrt(shape[0]) if len(shape) == 2 else 0.3
            return np.asarray(scale * rng.normal(size=shape), np.float32)

        drawn = {name: draw(params[name].shape) for name in sorted(params)}
        # the scales of norms stay near one
        return rebuild({n: p + n.endswith("scale") for n, p in drawn.items()})

    return make


@pytest.fixture(scope="session")
def forward():
    """Calls a model under one `jit`, which compiles far faster than its operations one by one."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(graph, methods, state, args):
        return nnx.merge(graph, state)(*args, attention=methods)

    def call(model: VideoDiT, *args, attention=None):
        graph, state = nnx.split(model)
        return run(graph, model.methods(attention), state, args)

    return call
