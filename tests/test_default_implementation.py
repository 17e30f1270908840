"""The implementation of calls that name none."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import vmonarch_jax as vm
from vmonarch_jax import dispatch

X = jnp.ones((1, 8, 2, 8))
GRID = (2, 2, 2)


@pytest.fixture
def ran(monkeypatch):
    """The names of implementations whose attention was traced, in turn."""
    found = []

    def watched(load):
        backend = load()

        def attend(*arguments, **options):
            found.append(backend.name)
            return backend.attend(*arguments, **options)

        return dataclasses.replace(backend, attend=attend)

    for name in ("reference", "xla"):
        load = dispatch.BACKENDS[name]
        monkeypatch.setitem(dispatch.BACKENDS, name, lambda load=load: watched(load))
    return found


def test_calls_that_name_none_take_it(ran):
    with vm.default_implementation("reference"):
        vm.VMonarch()(X, X, X, grid=GRID)
        assert vm.explain(vm.Dense(), GRID).implementation == "reference"
        vm.Dense()(X, X, X, implementation="xla")  # names its own
        with vm.default_implementation(None):
            vm.Dense()(X, X, X)
        vm.Dense()(X, X, X)
    vm.Dense()(X, X, X)
    assert ran == ["reference", "xla", "xla", "reference", "xla"]


def test_compiled_functions_are_compiled_anew(ran):
    @jax.jit
    def dense(x):
        return vm.dense_attention(x, x, x)

    for name in ("xla", "reference", "xla", "reference"):
        with vm.default_implementation(name):
            dense(X)
    assert ran == ["xla", "reference"]


def test_a_sequence_falls_through_and_a_name_does_not(ran):
    with vm.default_implementation(("pallas_tpu", "cudnn", "reference")):
        vm.dense_attention(X, X, X)
    assert ran == ["reference"]
    with (
        vm.default_implementation(["cudnn"]),
        pytest.raises(NotImplementedError, match="'cudnn': needs"),
    ):
        vm.dense_attention(X, X, X)


@pytest.mark.parametrize(
    ("wrong", "words"), [("cuda", "got 'cuda'"), (("xla", "cuda"), "got 'cuda'"), ((), "got none")]
)
def test_unknown_names(wrong, words):
    with pytest.raises(ValueError, match=words), vm.default_implementation(wrong):
        pass
