"""`python -m benchmarks.check_tpu`: what it says without a TPU, and that its checks work."""

import json

from repository import run_benchmark


def test_without_a_tpu_it_says_so():
    done = run_benchmark("check_tpu")
    assert done.returncode == 2, done.stderr
    assert done.stdout == "No TPU here (JAX sees 'cpu'): nothing to check.\n"


def test_interpreted(tmp_path):
    done = run_benchmark("check_tpu", "--interpret", "--only", "dense rows", "--out", tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["checks"]) == 2  # a dtype each
    for check in report["checks"]:
        for kind in ("forward", "gradient"):
            assert 0 < check[kind]["error"] <= check[kind]["allowed"]
    assert "2 of 2 checks are right." in (tmp_path / "report.txt").read_text()
