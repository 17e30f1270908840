"""The TPU kernels by the real compiler, without a TPU: `make aot`.

Each chip has a process of its own, since libtpu serves one kind of chip a process.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
from repository import ROOT
from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS

# "full" or "part"; set by the Makefile, so that an installed libtpu alone starts nothing long.
WANTED = os.environ.get("AOT", "")
pytestmark = [
    pytest.mark.skipif(WANTED not in ("full", "part"), reason="run by `make aot`"),
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: `make aot`"),
    pytest.mark.timeout(5400),
]


@pytest.mark.parametrize("chip", CHIPS)
def test_gates(chip):
    command = [sys.executable, "-m", "benchmarks.gates", "--chip", chip]
    if WANTED == "part":
        command.append("--part")
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout[-20000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{chip} ")]
    failed = [line for line in lines if ": FAILED" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stdout[-3000:]
    assert lines, "no kernel was compiled"
