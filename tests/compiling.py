"""A `jax.jit` that compiles six times faster on CPU, for tests that run each program once."""

import functools

import jax
import jax.numpy as jnp

# Without LLVM's optimisations, and without the emitters that lower every fusion through MLIR.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def options():
    """The quick options that this JAX and this backend know."""
    if jax.default_backend() != "cpu":
        return {}
    known = {}
    for name, value in QUICK.items():
        try:
            jax.jit(jnp.negative, compiler_options={name: value})(0.0)
        except jax.errors.JaxRuntimeError:
            continue
        known[name] = value
    return known


def jit(function, **keywords):
    return jax.jit(function, compiler_options=options(), **keywords)
