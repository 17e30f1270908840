"""The repository seen as files: the three code folders ("rooms") and all that is beside them."""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Package name of each room, and its folder. From high to low: a room imports only what is below.
ROOMS = {
    "vmonarch_jax.models": "models",
    "vmonarch_jax": "vmonarch_jax",
    "vmonarch_jax.pallas_kernels": "pallas_kernels",
}


def run_benchmark(module: str, *flags) -> subprocess.CompletedProcess:
    """`python -m benchmarks.MODULE FLAGS` on a CPU, without anything to read from."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )


@functools.cache
def files() -> tuple[str, ...]:
    """Every file of the project, relative to its root; by git where there is one."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0 and listing.stdout:
        names = listing.stdout.rstrip("\0").split("\0")
    else:
        skipped = {"__pycache__", "build", "dist", "out"}
        names = [
            path.relative_to(ROOT).as_posix()
            for path in ROOT.rglob("*")
            if not any(
                part in skipped or part.startswith(".") or part.endswith(".egg-info")
                for part in path.relative_to(ROOT).parts
            )
        ]
    return tuple(sorted(name for name in set(names) if (ROOT / name).is_file()))


def modules() -> dict[str, str]:
    """Each module of the rooms by its dotted name, with its file."""
    found = {}
    for package, folder in ROOMS.items():
        for name in files():
            if name.startswith(folder + "/") and name.endswith(".py"):
                parts = Path(name).relative_to(folder).with_suffix("").parts
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                found[".".join((package, *parts))] = name
    return found
