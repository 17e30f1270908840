"""Eight devices, heads and batch split among them, give what one device gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_eight_devices_are_one():
    # The number of CPU devices is fixed when JAX starts, so this takes a process of its own.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, HERE / "sharded.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("devices") == 8
    assert len(found) == 12, "four functions, three ways each"
    # Forward, log-sum-exp and the three gradients; rounding differs where sums are cut anew.
    assert {how: distance for how, distance in found.items() if not distance < 1e-4} == {}
