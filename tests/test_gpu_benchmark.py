"""`python -m benchmarks.gpu`: what it says without a GPU, and that its parts work."""

import json

import cudnn_stand_in
import jax
import pytest
from repository import run_benchmark
from vmonarch_jax.pallas_kernels.gpu import mode

import vmonarch_jax as vm
from benchmarks import gpu, gpu_gradients


def test_without_a_gpu_it_says_so():
    done = run_benchmark("gpu")
    assert done.returncode == 2, done.stderr
    assert done.stdout == "No GPU here (JAX sees 'cpu'): nothing to check or to time.\n"


def test_small(tmp_path):
    done = run_benchmark("gpu", "--small", "--only", "dense", "--out", tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    (path,) = tmp_path.iterdir()
    for check in json.loads(path.read_text())["checks"]:
        assert check["verdict"] == "right"
        for kind in ("forward", "lse", "gradient"):
            assert 0 < check[kind] < 0.04


def test_a_wrong_route_is_found(monkeypatch):
    check = gpu.Check("dense", vm.Dense(), (2, 2, 3), dim=8)
    arrays, bars = gpu.random(check, 0)
    wanted = gpu.oracle(check, arrays, bars)
    assert wanted[0].dtype == "float64"
    wanted[4] = wanted[4] * 1.2
    result = gpu.compare(check, "xla", arrays, bars, wanted)
    assert result["verdict"] == "WRONG"
    assert result["forward"] < 0.02 < 0.04 < result["gradient"]
    if jax.default_backend() != "gpu":
        assert gpu.compare(check, "cudnn", arrays, bars, wanted)["verdict"] == "not served"


@pytest.mark.parametrize("backward", [False, True])
def test_timings(backward):
    rows = gpu.timed(
        (3, 2, 4), vm.VMonarch(), backward, ("xla", "nonsense"), rounds=2,
        dense=jax.nn.dot_product_attention, size=(1, 8),
    )  # fmt: skip
    dense, ours, failed = rows
    assert dense["ratio"] == 1
    assert ours["ideal"] == pytest.approx(dense["ideal"] * _ratio())
    assert 0 < ours["median"] <= sum(ours["seconds"])
    assert "ValueError" in failed["failed"]
    lines = gpu.speed_table(rows).splitlines()
    assert len(lines) == 4
    assert "VMonarch 3x2x4, xla" in lines[3]


def _ratio():
    sizes = {"heads": 1, "head_dim": 8}
    dense = vm.flops.attention(vm.Dense(), (3, 2, 4), **sizes)
    return dense / vm.flops.attention(vm.VMonarch(), (3, 2, 4), **sizes)


def test_without_a_gpu_no_gradients_are_compared(capsys):
    assert gpu_gradients.main() == 2
    assert "needs a Hopper GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_gradients_are_compared(monkeypatch, capsys):
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    how = params.InterpretGPUParams(
        out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )
    case = gpu_gradients.Case("tiny", (1, 1, 20, 30), 2, True, dim=64)
    monkeypatch.setattr(gpu_gradients, "CASES", (case,))
    monkeypatch.setattr(gpu_gradients, "ROUNDS", 1)
    with mode.interpreted(how), cudnn_stand_in.standing_in():
        assert gpu_gradients.main() == 0
    assert "| tiny " in capsys.readouterr().out
