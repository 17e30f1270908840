"""Fixtures of all tests."""

import pytest
from compiling import quicken
from vmonarch_jax.pallas_kernels.tpu.mode import interpreted

# Before any test asks JAX for a device: flags are read once.
quicken()


@pytest.fixture
def tpu_interpreted(request):
    """TPU kernels run on this machine in tests of `implementation == "pallas_tpu"`."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("implementation") == "pallas_tpu":
        with interpreted():
            yield
    else:
        yield
