"""The order of the house: imports flow one way, files stay short, public names are explained."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from repository import ROOMS, ROOT, files, modules

import vmonarch_jax

MODULES = modules()
LONGEST = {"vmonarch_jax": 400, "models": 400, "pallas_kernels": 600}


def room_of(module: str) -> str | None:
    """The package name of the room that a dotted name lies in; None outside the project."""
    for package in sorted(ROOMS, key=len, reverse=True):
        if module == package or module.startswith(package + "."):
            return package
    return None


def imported(source: str) -> list[tuple[int, int, str]]:
    """Line, level (0: absolute) and dotted target of every import, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from a import b` may mean the module a.b, in another room than a.
            base = node.module or ""
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            found += [(node.lineno, node.level, name) for name in names]
    return found


def complaints(module: str, file: str, source: str) -> list[str]:
    order = list(ROOMS)
    room = room_of(module)
    depth = len(Path(file).parts) - 1  # folders from the room's own (1) down to the file's
    found = []
    for line, level, target in imported(source):
        where = f"{file}:{line}"
        if level > depth:
            found.append(f"{where}: relative import leaves its room; say vmonarch_jax...")
        if level:
            continue
        if target.split(".")[0] in ("models", "pallas_kernels"):
            found.append(f"{where}: `{target}` is installed as vmonarch_jax.{target}")
        other = room_of(target)
        if other == room:
            found.append(f"{where}: `{target}` is in the same room; import it relatively")
        elif other is not None and order.index(other) < order.index(room):
            found.append(f"{where}: {room} must not import {other}")
    return found


@pytest.mark.parametrize("folder", ROOMS.values())
def test_imports_flow_one_way(folder):
    found = []
    for module, file in MODULES.items():
        if file.startswith(folder + "/"):
            found += complaints(module, file, (ROOT / file).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("import vmonarch_jax.models.dit", "must not import"),
        ("from vmonarch_jax import models", "must not import"),
        ("def f():\n    from vmonarch_jax.models.dit import VideoDiT", "must not import"),
        ("from ..models import dit", "leaves its room"),
        ("import models", "is installed as"),
        ("from vmonarch_jax.grid import VideoGrid", "same room"),
    ],
)
def test_the_rule_catches(source, word):
    found = complaints("vmonarch_jax.bad", "vmonarch_jax/bad.py", source)
    assert any(word in text for text in found)


def test_the_rule_lets_pass():
    source = "import vmonarch_jax as vm\nfrom . import dit\nfrom .dit import VideoDiT\nimport jax"
    assert not complaints("vmonarch_jax.models.good", "models/good.py", source)


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_module_imports(module):
    imported_module = importlib.import_module(module)
    assert Path(imported_module.__file__).samefile(ROOT / MODULES[module]), "not this tree"


def test_code_lies_in_packages():
    """A folder of modules without __init__.py would be shipped as data."""
    bare = {
        str(Path(file).parent)
        for file in MODULES.values()
        if not (ROOT / file).with_name("__init__.py").exists()
    }
    assert not bare


def test_files_are_short():
    lengths = {
        file: (len((ROOT / file).read_text(encoding="utf-8").splitlines()), LONGEST[room])
        for file in MODULES.values()
        for room in [file.split("/")[0]]
    }
    assert not {file: pair for file, pair in lengths.items() if pair[0] > pair[1]}


def test_public_names_are_explained():
    assert len(set(vmonarch_jax.__all__)) == len(vmonarch_jax.__all__)
    bare = []
    for name in vmonarch_jax.__all__:
        value = getattr(vmonarch_jax, name)
        if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
            continue  # a constant or a type alias has no docstring of its own
        doc = (value.__doc__ or "").strip()
        # A dataclass without a docstring gets its signature for one.
        if len(doc) < 20 or doc.startswith(f"{name}("):
            bare.append(name)
    assert not bare


def test_no_file_names_a_package_registry():
    """Where packages come from is the affair of the machine that installs them."""
    hosts = ("pypi" + ".org", "python" + "hosted", "npm" + "js", "conda." + "anaconda")
    pattern = re.compile("|".join(map(re.escape, hosts)), re.IGNORECASE)
    found = []
    for file in files():
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file}: {hit.group()}" for hit in pattern.finditer(text)]
    assert not found
