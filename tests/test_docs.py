"""What the texts tell their readers to type is right: commands, modules, links, Python."""

import re
import shlex

import jax
import jax.numpy as jnp
import pytest
from repository import ROOT, files
from vmonarch_jax.models import cli_options
from vmonarch_jax.models.cli import make_parser
from vmonarch_jax.models.wan.weights.random_folder import random_folder

import vmonarch_jax as vm

TEXTS = sorted(
    name
    for name in files()
    if name.endswith(".md") or (name.startswith("notebooks/") and name.endswith(".py"))
)


def commands(text):
    """The `vmonarch` lines that stand alone, as in a shell or a cell of a notebook."""
    whole = re.sub(r"\\\n[#\s]*", " ", text)
    lines = re.findall(r"^(?:#? {4,}|)[!$ ]*(vmonarch [a-z][^\n]*)$", whole, re.MULTILINE)
    # prose may begin a line with the name, but no such line has a flag and is indented or fenced
    return [line for line in lines if " --" in line and "`" not in line]


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


COMMANDS = [(name, line) for name in TEXTS for line in commands((ROOT / name).read_text())]


def test_commands_are_found():
    found = {}
    for name, line in COMMANDS:
        found.setdefault(name, set()).add(shlex.split(line)[1])
    assert {"generate", "finetune", "drop-branches"} <= found["docs/wan.md"]
    assert {"README.md", "docs/attention.md", "notebooks/02_wan.py"} <= found.keys()


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=lambda value: value[:60])
def test_commands_parse(name, line, capsys):
    arguments = shlex.split(line, comments=True)[1:]
    try:
        args = make_parser().parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{name}: {line}\n{capsys.readouterr().err.splitlines()[-1]}")
    if hasattr(args, "attention"):
        cli_options.attention_of(args)


@pytest.mark.parametrize("name", TEXTS)
def test_modules_and_targets_are_there(name):
    text = (ROOT / name).read_text()
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".md")])
def test_links_lead_somewhere(name):
    here = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
        if "://" not in target:
            assert (here / target).exists(), target


def run_blocks(name, known):
    """Runs the Python of a text from top to bottom, as a reader would; returns all its names."""
    for number, block in enumerate(blocks((ROOT / name).read_text())):
        exec(compile(block, f"{name}, block {number}", "exec"), known)
    return known


def test_python_of_the_readme(capsys):
    known = run_blocks("README.md", {})
    assert known["out"].shape == (1, 8190, 2, 64)
    assert 0 < float(known["kl"].max()) < 10
    assert "VMonarch" in capsys.readouterr().out


@pytest.mark.slow
def test_python_of_the_page_on_attention():
    grid, batch, heads, head_dim = vm.VideoGrid(4, 8, 16), 1, 1, 16
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, grid.tokens, heads, head_dim))
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
    names = {"vm": vm, "jnp": jnp, "grid": grid, "q": q, "k": k, "v": v, **sizes}
    known = run_blocks("docs/attention.md", names)
    assert known["out"].shape == q.shape
    assert bool(jnp.isfinite(known["out"]).all())


def test_python_of_the_page_on_wan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_folder("wan-1.3B", "t2v", "original")  # the layout whose note has a small default video
    known = run_blocks("docs/wan.md", {})
    assert known["video"].shape == (1, 9, 32, 48, 3)
    assert bool(jnp.isfinite(known["video"]).all())
    assert known["out"].shape == known["q"].shape
    assert known["config"].linear_layers == (0, 1, 2)


@pytest.mark.slow
def test_python_of_the_tiny_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_blocks("models/tiny/README.md", {})["videos"].shape == (1, 16, 32, 32, 3)
