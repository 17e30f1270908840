"""The wheel holds the three packages and every file of theirs, and works where it is installed."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from repository import ROOMS, ROOT, files

import vmonarch_jax

# Modules that only the extras bring; `import vmonarch_jax` must do without.
EXTRA_MODULES = ("av", "grain", "imageio", "matplotlib", "PIL", "skimage", "torch", "tqdm")


def run(*command, cwd, **env):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project's files, and of nothing that was built among them."""
    source = tmp_path_factory.mktemp("source")
    for name in files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Built from the source archive, which is built from the copy."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (built,) = out.glob("*.whl")
    return built


def expected_contents(source: Path) -> dict[str, Path]:
    """Each path in the wheel, and the file of the tree that it is a copy of."""
    return {
        str(Path(package.replace(".", "/")) / Path(name).relative_to(folder)): source / name
        for package, folder in ROOMS.items()
        for name in files()
        if name.startswith(folder + "/")
    }


def test_wheel_holds_the_tree(source, wheel):
    expected = expected_contents(source)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        assert len(names) == len(set(names))
        assert {name for name in names if ".dist-info/" not in name} == set(expected)
        for name, file in expected.items():
            assert archive.read(name) == file.read_bytes(), name
        assert any(name.endswith("licenses/LICENSE") for name in names)
        (meta_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        meta = Parser().parsestr(archive.read(meta_name).decode())
    assert {f"{package.replace('.', '/')}/py.typed" for package in ROOMS} <= set(expected)
    assert meta["Name"] == "vmonarch-jax"
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=3.11"


def test_installed_wheel_works_elsewhere(wheel, tmp_path):
    target = tmp_path / "site"
    pip = ("pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    run(sys.executable, "-m", *pip, cwd=tmp_path)
    script = f"""
import pathlib, importlib, importlib.metadata
for name in {list(ROOMS)}:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to({str(target)!r}), module.__file__
import vmonarch_jax as vm
import jax.numpy as jnp
grid = vm.VideoGrid(frames=2, height=2, width=3)
x = jnp.ones((1, 12, 1, 4))
assert vm.vmonarch_attention(x, x, x, grid=grid).shape == x.shape
print(importlib.metadata.version("vmonarch-jax"))
"""
    printed = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target))
    assert printed.strip() == vmonarch_jax.__version__


def test_version_is_said_once():
    assert importlib.metadata.version("vmonarch-jax") == vmonarch_jax.__version__


def test_core_needs_no_extra(tmp_path):
    script = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRA_MODULES}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: it is an extra", name=name)
sys.meta_path.insert(0, Missing())
import vmonarch_jax
assert not set({EXTRA_MODULES}) & set(sys.modules)
assert "vmonarch_jax.models" not in sys.modules
"""
    run(sys.executable, "-c", script, cwd=tmp_path)


def test_command_is_declared():
    (command,) = (
        entry
        for entry in importlib.metadata.entry_points(group="console_scripts")
        if entry.name == "vmonarch"
    )
    assert command.value == "vmonarch_jax.models.cli:main"
