"""The Wan transformer at full size, compiled for GPUs with no GPU: `make aot-gpu`."""

import importlib.util
import os
import subprocess
import sys

import pytest
from repository import ROOT

pytestmark = [
    pytest.mark.skipif("AOT_GPU" not in os.environ, reason="set AOT_GPU=1; see `make aot-gpu`"),
    pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="no CUDA JAX"),
    pytest.mark.timeout(3600),
]

CASES = [
    "1.3B 480p h100 x1 pallas_gpu vmonarch batch 2 step",
    "1.3B 480p h100 x1 cudnn vmonarch batch 2 step",
    "1.3B 480p h100 x1 cudnn dense batch 2 step",
    "1.3B 480p h100 x1 cudnn vmonarch batch 1 tuning",
    "1.3B 480p h100 x1 pallas_gpu vmonarch batch 1 tuning",
    "1.3B 480p h100 x2 pallas_gpu vmonarch batch 2 step",
    "1.3B 480p a100 x1 cudnn vmonarch batch 2 step",
]


@pytest.mark.parametrize("case", CASES)
def test_gates(case):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.wan_gpu", "--check", "--only", case],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{case}: passed." in done.stdout
