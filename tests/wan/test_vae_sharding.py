"""Devices that share the autoencoder's pictures make what one makes, in a part of its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "wan_vae_sharded.py"


def run(*names):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, SCRIPT, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "names",
    [("flat",), pytest.param(("shortcuts", "flat_odd", "shortcuts_odd"), marks=pytest.mark.slow)],
    ids=["one", "more"],
)
def test_autoencoder_on_eight_devices_is_that_of_one(names):
    found = run(*names)
    for name in names:
        for direction in ("encode", "decode"):
            got, where = found[name][direction], f"{name}, {direction}"
            assert got["difference"] < 1e-5, where
            assert got["unannounced"] == [], where
            assert got["kinds"] == ["all-gather", "collective-permute"], where
            if name.endswith("odd"):
                continue
            # the latents that the encoder makes are whole on every device
            shared = ["input"] if direction == "encode" else ["input", "output"]
            for part in shared:
                alone, spread = got[part]
                assert 8 * spread == alone, f"{where}: {part}"
            alone, spread = got["temporaries"]
            # an eighth, and the edges of the neighbours
            assert 5.5 * spread < alone, where


@pytest.mark.slow
def test_pipeline_makes_conditions_and_videos_on_a_mesh():
    found = run("pipeline")["pipeline"]
    assert sorted(found) == ["beside_channels", "decode", "first_frame"]
    assert {name: error for name, error in found.items() if not error < 1e-5} == {}
