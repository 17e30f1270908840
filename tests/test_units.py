"""Bytes as they are read."""

import pytest

import vmonarch_jax as vm
from vmonarch_jax.units import bytes_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (1000 * 2**10, "1000.0 KiB"),
        (49.5 * 2**20, "49.5 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (26.61 * 2**30, "26.61 GiB"),
    ],
)
def test_bytes_text(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize("method", [vm.Corrected(), vm.AdaSpa(), vm.Guided(every=4), vm.Salad()])
def test_small_calls_are_not_explained_as_zero(method):
    grid = vm.VideoGrid(4, 8, 8)
    report = str(vm.explain(method, grid, heads=2, head_dim=8, implementation="xla"))
    # q, k, v and the output: 4 arrays of 256 tokens, 2 heads of 8, 2 bytes each
    assert "q, k, v, out    32.0 KiB" in report
    assert " 0.0 " not in report


def test_flops_are_set_against_those_of_dense_attention():
    grid, sizes = vm.VideoGrid(4, 8, 8), {"heads": 2, "head_dim": 8}
    found = {
        method: str(vm.explain(method, grid, **sizes))
        for method in (vm.Dense(), vm.Guided(every=4), vm.SlidingWindow())
    }
    # 2 heads, 2 products of 256 x 256 x 8 multiplications and additions; a quarter of the blocks
    assert "4.194e+06 forward, those of dense attention" in found[vm.Dense()]
    assert "4.00x fewer than dense (4.194e+06)" in found[vm.SlidingWindow()]
    assert "1.09x those of dense (4.194e+06)" in found[vm.Guided(every=4)]
