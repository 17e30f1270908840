"""Whole calls of the GPU routes, compiled for an H100 with no GPU: `make aot-gpu`."""

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


# Device, implementation, frames, entries of the batch. An A100 has no kernels of ours: one size
# tells enough.
CALLS = [
    ("h100", "cudnn", (16, 20, 46, 81), 1),
    ("h100", "pallas_gpu", (16, 81), 1),
    ("h100", "cudnn", (16,), 2),
    ("h100", "pallas_gpu", (16,), 2),
    ("a100", "cudnn", (16,), 1),
]


@pytest.mark.parametrize(("device", "implementation", "frames", "batch"), CALLS)
def test_gates(device, implementation, frames, batch):
    flags = ["--device", device, "--implementation", implementation, "--batch", str(batch)]
    flags += ["--frames", *map(str, frames)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_gates", *flags],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout[-20000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith(device)]
    failed = [line for line in lines if ": FAILED" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stdout[-3000:]
    assert len(lines) == 2 * len(frames), done.stdout[-3000:]
