"""The notebooks run from top to bottom, hold no outputs, and are the same as their scripts."""

import re

import jupytext
import nbclient
import nbformat
import pytest
from repository import ROOT

FOLDER = ROOT / "notebooks"
WEIGHTS = ROOT / "models" / "tiny"


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def run(name, folder, monkeypatch):
    """What the notebook prints at a small size, and the kinds of what it shows."""
    monkeypatch.setenv("VMONARCH_NOTEBOOK", "small")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    client = nbclient.NotebookClient(
        read(name), timeout=250, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    ran = client.execute()
    outputs = [output for cell in ran.cells for output in cell.get("outputs", ())]
    streams = {
        kind: "".join(o.text for o in outputs if o.output_type == "stream" and o.name == kind)
        for kind in ("stdout", "stderr")
    }
    return streams, [kind for output in outputs for kind in output.get("data", ())]


def test_every_notebook_has_a_script():
    names = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert names == {path.stem for path in FOLDER.glob("*.py")} == {"01_quickstart", "02_wan"}


@pytest.mark.parametrize("name", ["01_quickstart", "02_wan"])
def test_script_and_notebook_are_the_same(name):
    script = jupytext.read(FOLDER / f"{name}.py")
    assert [(c.cell_type, c.source) for c in read(name).cells] == [
        (c.cell_type, c.source) for c in script.cells
    ], f"run `jupytext --sync notebooks/{name}.py`"


@pytest.mark.parametrize("name", ["01_quickstart", "02_wan"])
def test_outputs_are_stripped(name):
    for cell in read(name).cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source


def test_first_call_is_in_the_third_cell():
    cells = read("01_quickstart").cells
    calls = [n for n, cell in enumerate(cells) if "vmonarch_attention(" in cell.source]
    assert calls[0] == 2


def test_quickstart_runs_at_a_small_size(tmp_path, monkeypatch):
    if not (WEIGHTS / "vmonarch").is_dir():
        pytest.fail(f"{WEIGHTS} must hold the shipped models")
    streams, kinds = run("01_quickstart", tmp_path, monkeypatch)
    printed = streams["stdout"]
    assert kinds.count("image/png") == 3
    assert kinds.count("image/gif") == 1
    relative = float(re.search(r"relative error of the output: ([\d.]+)", printed)[1])
    assert 0 < relative < 0.2, printed
    assert "VMonarch, tuned: 1 videos" in printed
    assert "nan" not in printed


def test_wan_runs_without_weights_and_network(tmp_path, monkeypatch):
    streams, kinds = run("02_wan", tmp_path, monkeypatch)
    printed = streams["stdout"]
    assert "videos are noise" in streams["stderr"]
    assert "peak memory: about" in printed
    psnr, ssim = re.search(r"VMonarch to dense: PSNR ([\d.]+) dB, SSIM ([\d.]+)", printed).groups()
    assert 10 < float(psnr) < 90
    assert 0.1 < float(ssim) < 1
    mean, worst = re.search(r"mean ([\d.]+) nats, worst row ([\d.]+)", printed).groups()
    assert 0 < float(mean) < float(worst)
    # comparison, certificate, loss, LoRA; and two videos to play
    assert kinds.count("image/png") == 4
    assert kinds.count("text/html") == 2
    changed = float(re.search(r"the LoRA changed the video: PSNR ([\d.]+) dB", printed)[1])
    assert changed < 90
    assert "nan" not in printed
    assert (tmp_path / "runs/vmonarch/lora.safetensors").is_file()
