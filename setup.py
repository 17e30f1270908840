"""The packages of the three code folders, and every file in them; pyproject.toml has the rest."""

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ROOMS = {
    "vmonarch_jax": "vmonarch_jax",
    "vmonarch_jax.pallas_kernels": "pallas_kernels",
    "vmonarch_jax.models": "models",
}


def walk(package: str, folder: str) -> dict[str, list[str]]:
    """Each package under a folder, with its data files relative to the package's own folder."""
    found: dict[str, list[str]] = {}
    owner = {}  # folder -> the innermost package it belongs to, and that package's folder
    for here, folders, files in os.walk(ROOT / folder):
        folders[:] = sorted(f for f in folders if f != "__pycache__" and not f.startswith("."))
        path = Path(here)
        if path == ROOT / folder or "__init__.py" in files:
            name = ".".join((package, *path.relative_to(ROOT / folder).parts))
            owner[path] = (name, path)
            found[name] = []
        else:
            owner[path] = owner[path.parent]
        name, base = owner[path]
        for file in sorted(files):
            is_module = file.endswith(".py") and path == base
            if not is_module and not file.startswith(".") and not file.endswith((".pyc", ".pyo")):
                found[name].append((path / file).relative_to(base).as_posix())
    return found


data = {}
for package, folder in ROOMS.items():
    data.update(walk(package, folder))

setup(packages=list(data), package_dir=ROOMS, package_data=data, include_package_data=False)
