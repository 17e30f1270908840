"""The notebook runs from top to bottom, holds no outputs, and is the same as its script."""

import re

import jupytext
import nbclient
import nbformat
import pytest
from repository import ROOT

NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"
SCRIPT = NOTEBOOK.with_suffix(".py")
WEIGHTS = ROOT / "models" / "tiny"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_script_and_notebook_are_the_same(notebook):
    script = jupytext.read(SCRIPT)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in script.cells
    ], "run `jupytext --sync notebooks/01_quickstart.py`"


def test_outputs_are_stripped(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source


def test_first_call_is_in_the_third_cell(notebook):
    calls = [n for n, cell in enumerate(notebook.cells) if "vmonarch_attention(" in cell.source]
    assert calls[0] == 2


def test_runs_at_a_small_size(notebook, tmp_path, monkeypatch):
    if not (WEIGHTS / "vmonarch").is_dir():
        pytest.fail(f"{WEIGHTS} must hold the shipped models")
    monkeypatch.setenv("VMONARCH_NOTEBOOK", "small")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    client = nbclient.NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    ran = client.execute()
    outputs = [output for cell in ran.cells for output in cell.get("outputs", ())]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    assert kinds.count("image/png") == 3
    assert kinds.count("image/gif") == 1
    relative = float(re.search(r"relative error of the output: ([\d.]+)", printed)[1])
    assert 0 < relative < 0.2, printed
    assert "VMonarch, tuned: 1 videos" in printed
    assert "nan" not in printed
