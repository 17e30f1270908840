"""Whole calls of the cuDNN route, compiled for an H100 with no GPU: `make aot-gpu`."""

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


# An A100 has no fused L step: one size is enough to see that it compiles.
@pytest.mark.parametrize("flags", [["--device", "h100"], ["--device", "a100", "--frames", "16"]])
def test_gates(flags):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_gates", *flags],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout[-20000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith(flags[1])]
    failed = [line for line in lines if ": FAILED" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stdout[-3000:]
    assert len(lines) == (2 if "--frames" in flags else 8), done.stdout[-3000:]
