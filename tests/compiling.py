"""Quick compiling on CPU, for tests that run each program once."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp

# Without LLVM's optimisations, without the emitters that lower every fusion through MLIR, and
# without cutting each program into 32 parts for cores that the other test process has.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
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


def quicken():
    """Makes the quick options those of this process, of its children and of all that they compile.

    On CPU by name alone: another backend, and the TPU compiler of `make aot`, have what they always
    have. XLA ends a process that has a flag which it does not know, so a child finds out.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if os.environ.get("JAX_PLATFORMS") != "cpu" or "AOT" in os.environ or "xla_llvm" in flags:
        return
    known = subprocess.run(
        [sys.executable, __file__], stdout=subprocess.PIPE, text=True, check=True
    )
    os.environ["XLA_FLAGS"] = f"{flags} {known.stdout}".strip()


if __name__ == "__main__":
    print(*(f"--{name}={str(value).lower()}" for name, value in options().items()))
