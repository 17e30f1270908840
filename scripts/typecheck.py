"""Run pyright over the three code folders.

Across rooms the code says `vmonarch_jax.models...`, which only an installed tree has. `.types`
shows pyright that tree, as links. Pyright fetches its own program at first use; where it cannot,
this says so and passes, except with `--strict`.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = {
    "__init__.py": "vmonarch_jax/__init__.py",
    "models": "models",
    "pallas_kernels": "pallas_kernels",
}


def main() -> int:
    """Pyright's exit status."""
    tree = ROOT / ".types" / "vmonarch_jax"
    tree.mkdir(parents=True, exist_ok=True)
    for name, target in LINKS.items():
        if not (tree / name).exists():
            (tree / name).unlink(missing_ok=True)
            (tree / name).symlink_to(Path("../..") / target)
    os.environ["PYRIGHT_PYTHON_IGNORE_WARNINGS"] = "1"
    pyright = [sys.executable, "-m", "pyright"]
    try:
        starts = subprocess.run(
            [*pyright, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=240
        )
        ready = starts.returncode == 0
    except subprocess.TimeoutExpired:
        ready = False
    if not ready:
        print("pyright could not fetch its program (it needs the npm registry): types NOT checked")
        return "--strict" in sys.argv
    return subprocess.run([*pyright, "--pythonpath", sys.executable], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
