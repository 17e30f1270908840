"""Fixtures of all tests, and which of them run."""

import gc
import os
from collections import Counter

import pytest
from compiling import quicken
from vmonarch_jax.pallas_kernels.tpu.mode import interpreted

# Before any test asks JAX for a device: flags are read once.
quicken()

# With CASES=part, these modules run in full: kernels, shardings and Flax modules lean most on what
# JAX changes. Of every other test the first case runs, and every third one after it.
IN_FULL = ("/pallas/", "/test_sharding.py", "/test_nn.py")
STRIDE = 3


@pytest.hookimpl(trylast=True)  # the slow tests are gone by now
def pytest_collection_modifyitems(config, items):
    if os.environ.get("CASES") != "part":
        return
    seen, kept, left_out = Counter(), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        wanted = any(name in test for name in IN_FULL) or seen[test] % STRIDE == 0
        (kept if wanted else left_out).append(item)
        seen[test] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish():
    """Python looks for garbage less often: tracing makes many objects, nearly all of them live."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def tpu_interpreted(request):
    """TPU kernels run on this machine in tests of `implementation == "pallas_tpu"`."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("implementation") == "pallas_tpu":
        with interpreted():
            yield
    else:
        yield
