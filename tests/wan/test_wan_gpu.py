"""`benchmarks.wan_gpu`: its gates, its record, and its checks of routes without a GPU."""

import dataclasses

import pytest
from repository import run_benchmark
from vmonarch_jax.models.wan.weights.random_folder import small_config

from benchmarks import wan_gpu, wan_gpu_run
from vmonarch_jax import dispatch

HLO = """
  %a = bf16[1,100,4,8]{3,2,1,0} transpose(%x), dimensions={0,2,1,3}, metadata={}
  ROOT %b.1 = f32[4,100,8]{2,1,0} transpose(%y), dimensions={1,0,2}
  %c = bf16[1,100,32]{2,1,0} transpose(%x), dimensions={1,0,2}
  %d = bf16[10,4,8]{2,1,0} transpose(%z), dimensions={1,0,2}
"""


def test_transposes_of_large_arrays():
    expected = ["bf16[1,100,4,8] of 0,2,1,3", "f32[4,100,8] of 1,0,2"]
    assert wan_gpu.transposes(HLO, 3200) == expected


def test_recorded_cases_pass_their_gates_and_make_the_table(tmp_path, monkeypatch):
    found = wan_gpu.record()["cases"]
    known = {case.name: case for case in wan_gpu.cases()}
    assert len(found) >= 20
    for name, entry in found.items():
        assert wan_gpu.wrong(known[name], entry) == []
        assert 0 < wan_gpu.total(entry) < 79.1 * 2**30
    written = wan_gpu.RECORD.with_suffix(".md").read_text()
    copy = tmp_path / "wan_gpu.json"
    copy.write_text(wan_gpu.RECORD.read_text())
    monkeypatch.setattr(wan_gpu, "RECORD", copy)
    wan_gpu.report()
    assert copy.with_suffix(".md").read_text() == written


def test_what_is_wrong_is_said():
    case = wan_gpu.cases()[0]
    assert (case.route, case.attention, case.count) == ("pallas_gpu", "vmonarch", 1)
    good = {"calls": [0, 0, 6], "spills": 0, "transposes": [], "unannounced": []}
    assert wan_gpu.wrong(case, good) == []
    for key, bad, words in (
        ("calls", [5, 0, 2], "got (5, 0, 2)"),
        ("spills", 8, "spill 8 bytes"),
        ("transposes", ["bf16[9,9] of 1,0"], "bf16[9,9] of 1,0"),
        ("unannounced", [{"kind": "all-reduce"}], "all-reduce"),
    ):
        (said,) = wan_gpu.wrong(case, good | {key: bad})
        assert words in said


def test_without_a_gpu_it_says_so():
    done = run_benchmark("wan_gpu", "--run")
    assert done.returncode == 2, done.stderr
    assert done.stdout == "No GPU here (JAX sees 'cpu'): nothing to check or to time.\n"


@pytest.mark.slow
def test_a_wrong_route_is_found(monkeypatch):
    run = wan_gpu_run.Run(small_config(), (5, 32, 48), "vmonarch")
    assert wan_gpu_run.check(run, "xla", ("cudnn", "xla"))["right"]
    failed = wan_gpu_run.check(run, "cudnn", "cudnn")
    assert not failed["right"]
    assert "NVIDIA" in failed["failed"]
    load = dispatch.BACKENDS["xla"]

    def other():
        backend = load()
        # attention without its scale
        return dataclasses.replace(
            backend, l_last=lambda q, *rest, **options: backend.l_last(2 * q, *rest, **options)
        )

    monkeypatch.setitem(dispatch.BACKENDS, "pallas_gpu", other)
    wrong = wan_gpu_run.check(run, "pallas_gpu", "pallas_gpu")
    assert wrong["bar"] < 2 * wrong["error"]
    assert not wrong["right"]
