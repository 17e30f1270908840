"""Host memory and time of loading a Wan transformer: a file is written and read.

python -m benchmarks.wan_loading [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from vmonarch_jax.models.params import split_params
from vmonarch_jax.models.wan.config import TransformerConfig, WanConfig
from vmonarch_jax.models.wan.weights.configs import write_config
from vmonarch_jax.models.wan.weights.detect import detect
from vmonarch_jax.models.wan.weights.load import load_part
from vmonarch_jax.models.wan.weights.parts import part_entries
from vmonarch_jax.models.wan.weights.stored import write_safetensors

_MB = 1e6


def resident() -> int:
    """Bytes of this process in memory, mapped files included (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def write(folder: pathlib.Path, config: WanConfig) -> int:
    """Writes float32 weights of a transformer and returns the bytes of the largest tensor."""
    shapes = {
        key: (entry.stored, np.dtype(np.float32))
        for entry in part_entries(config, "transformer")
        for key in entry.keys("diffusers")
    }
    write_safetensors(
        folder / "diffusion_pytorch_model.safetensors",
        shapes,
        lambda key: np.ones(shapes[key][0], np.float32),
    )
    (folder / "config.json").write_text(json.dumps(write_config("transformer", config)))
    return max(4 * int(np.prod(shape)) for shape, _ in shapes.values())


def measure(config: WanConfig) -> dict[str, float]:
    """What loading takes, in MB and seconds; the peak is over what the process had before."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        stored = write(folder, config)
        found = detect(folder)
        jax.block_until_ready(jnp.ones(3))
        peak = before = resident()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        model = load_part(found, "transformer")
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    size = sum(value.nbytes for value in split_params(model)[1].values())
    return {
        "model MB": size / _MB,
        "largest stored tensor MB": stored / _MB,
        "peak MB": (peak - before) / _MB,
        "peak over model MB": (peak - before - size) / _MB,
        "seconds": seconds,
    }


def main() -> None:
    """Prints the figures of one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model")
    quick = parser.parse_args().quick
    sizes = TransformerConfig(dim=384, heads=3, layers=2, ffn_dim=1024) if quick else (
        TransformerConfig(dim=1536, heads=12, layers=6, ffn_dim=8960)
    )  # fmt: skip
    for name, value in measure(WanConfig("measured", sizes)).items():
        print(f"{name:>26} {value:10.1f}")


if __name__ == "__main__":
    main()
