"""The benchmarks run and print finite numbers; how fast they are is no test's business."""

import csv
import json
import math
import re
import subprocess
import sys

import pytest
from repository import ROOT, run_benchmark

from benchmarks.methods_list import ENTRIES
from benchmarks.methods_report import in_readme


def run(module, *flags):
    done = run_benchmark(module, "--quick", *flags)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def numbers(printed):
    """Every number in the cells of the printed tables."""
    cells = [
        cell.strip().rstrip("x")
        for line in printed.splitlines()
        if line.startswith("|")
        for cell in line.strip("|").split("|")
    ]
    return [float(cell) for cell in cells if re.fullmatch(r"-?[\d.]+(e-?\d+)?|nan|-?inf", cell)]


@pytest.mark.parametrize(("module", "columns", "tables"), [("attention", 8, 2), ("memory", 2, 1)])
def test_tables(module, columns, tables):
    printed = run(module)
    found = numbers(printed)
    extra = 7 if module == "attention" else 0  # the prediction, forward
    assert len(found) == 7 * columns * tables + extra, printed  # seven methods
    assert all(math.isfinite(x) and x > 0 for x in found), printed


def test_wrong_grid_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--grid", "21x15"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "expected FRAMESxHEIGHTxWIDTH such as 21x15x26, got '21x15'" in done.stderr


def test_fidelity(tmp_path):
    printed = run("fidelity", "--out", tmp_path)
    assert (tmp_path / "fidelity.md").read_text().strip() in printed
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000
    with (tmp_path / "fidelity.csv").open() as file:
        dense, *others = csv.DictReader(file)
    assert float(dense["flops"]) == 1
    assert float(dense["error"]) < 1e-5
    assert float(dense["loss"]) == 1
    for row in others:
        assert math.isfinite(float(row["error"])), row
        assert 0 <= float(row["kl"]) <= float(row["worst_kl"]), row


@pytest.mark.slow
def test_adaspa_ablation(tmp_path):
    printed = run("adaspa_ablation", "--out", tmp_path)
    assert (tmp_path / "adaspa_ablation.md").read_text().strip() in printed
    with (tmp_path / "adaspa_ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["variant"] for row in rows}) * 5 == len(rows)  # 5 steps, the first ones dense
    for row in rows:
        step, error = int(row["step"]), float(row["error"])
        assert error < 1e-5 if step < 2 else 0 <= error < math.inf, row
        assert 0 <= float(row["kl"]) < math.inf, row


@pytest.mark.slow
def test_past_papers(tmp_path):
    printed = run("past_papers", "--out", tmp_path)
    assert (tmp_path / "past_papers.md").read_text().strip() in printed
    assert (tmp_path / "past_papers.png").stat().st_size > 10_000
    with (tmp_path / "past_papers.csv").open() as file:
        rows = list(csv.DictReader(file))
    errors = {(r["method"], r["age"]): float(r["error"]) for r in rows if r["part"] == "corrected"}
    for method in {method for method, age in errors if age == "0"}:
        assert 0 < errors[method, "1"] < errors[method, "0"], method
    guided = [row for row in rows if row["part"] == "guided"]
    assert {row["guide"] for row in guided} >= {"none", "true gap", "mass alone"}
    assert all(0 <= float(row["error"]) < 1 and float(row["flops"]) > 0 for row in guided)
    assert all(float(row["error"]) >= 0 for row in rows if row["part"] == "samples")


@pytest.mark.slow
def test_methods(tmp_path):
    run("methods", "--out", tmp_path)
    rows = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert rows["dense"]["difference"] == 0
    assert rows["dense"]["error"] < 1e-5
    for row in rows.values():
        assert 0 < row["flops"] <= 1, row
        assert all(0 <= row[name] < math.inf for name in ("error", "run_error", "difference")), row
    assert "| dense" in (tmp_path / "methods.md").read_text()
    assert (tmp_path / "methods.png").stat().st_size > 10_000


def test_the_readme_has_the_recorded_comparison():
    record = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text())["rows"]
    rows = [record[entry.key] | {"key": entry.key} for entry in ENTRIES if entry.key in record]
    assert len(rows) == len(ENTRIES)
    text = (ROOT / "README.md").read_text()
    assert in_readme(text, rows) == text
