"""How GPU kernels run here, and which tests of the TPU kernels are slow.

Long bodies take the interpreter long to compile.
"""

import pytest
from vmonarch_jax.pallas_kernels.gpu import mode


@pytest.fixture
def gpu_interpreted():
    """GPU kernels run on this machine; as for the copy engine, there are zeros beyond an end."""
    interpret = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    how = interpret.InterpretGPUParams(
        out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )
    with mode.interpreted(how):
        yield


# More than about ten seconds each, alone on two cores; `make test-slow` runs them.
SLOW = (
    "test_tiled.py::test_forward[(1, 1, 2, 1, 130, 64, 128)-float32",
    "test_tiled.py::test_gradients[(1, 1, 2, 1, 66, 64, 64)-float32",
    "test_tiled.py::test_gradients[(2, 1, 2, 4, 3, 128, 128)-bfloat16",
    "test_tiled.py::test_gradients[(1, 2, 2, 3, 4, 128, 64)-bfloat16",
    "test_tiled.py::test_gradients_of_extreme_scores",
    "test_tiled.py::test_extreme_scores_take_the_safe_kernel[negative]",
    "test_l_step.py::test_position_attention_and_its_gradient",
    "test_l_step.py::test_gradients_of_last_and_middle",
    "test_l_step_backward.py::test_last[(1, 70, 81",
    "test_l_step_backward.py::test_middle[(1, 70, 81",
    "test_l_step_backward.py::test_last[(1, 46, 46",
    "test_l_step_backward.py::test_middle[(1, 46, 46",
    "test_l_step_backward.py::test_last[(2, 13, 13, 34, 128, 64, 16)-float32",
    "test_l_step_backward.py::test_middle[(2, 13, 13, 34, 128, 64, 16)-float32",
    "test_l_step_backward.py::test_middle[(1, 21, 21, 24, 128, 128, 16)-bfloat16",
    "test_l_step_backward.py::test_last_as_an_r_step",
    "test_r_step.py::test_gradient[('float32', 9, 11, True, True, True, False)]",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)
