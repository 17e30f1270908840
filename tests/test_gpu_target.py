"""What is read from the compilers for GPUs, on what they print."""

import pytest

from benchmarks import gpu_gates, gpu_roofline
from benchmarks.gpu_target import DEVICES, Compiled, read_ptxas

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : (C7509) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    16 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
PTX = """.version 8.4
.visible .entry first( )
{ wgmma.mma_async.sync.aligned.m64n128k16; wgmma.mma_async.sync.aligned.m64n128k16; }
.visible .entry second( )
{ ret; }
"""


def test_ptxas():
    first, second = read_ptxas(SAID, PTX)
    assert (first.name, first.registers, first.spills, first.stack) == ("first", 168, 64, 16)
    assert (first.shared, first.wgmma) == (1024, 2)
    assert "serialized" in first.notes[0]
    assert (second.registers, second.spills, second.stack) == (32, 0, 0)
    assert (second.shared, second.wgmma) == (0, 0)


def test_devices():
    assert DEVICES["h100"].capability == "9.0"
    assert DEVICES["a100"].capability == "8.0"
    for device in DEVICES.values():
        assert "{{" not in device.config
        assert device.config.count("{") == device.config.count("}")


HLO = """HloModule m

%fused (p: bf16[8,128]) -> bf16[128,8] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %t = bf16[128,8]{1,0} transpose(%p), dimensions={1,0}
}

ENTRY %main (a: bf16[8,128]) -> bf16[128,8] {
  %a = bf16[8,128]{1,0} parameter(0)
  %c = (bf16[8,128]{1,0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  %g = bf16[8,128]{1,0} get-tuple-element(%c), index=0
  ROOT %f = bf16[128,8]{1,0} fusion(%g), kind=kLoop, calls=%fused
}
"""


IN_PLACE = """HloModule m

%fused (p: bf16[64,128], u: bf16[8,128]) -> bf16[512,16] {
  %p = bf16[64,128]{1,0} parameter(0)
  %b = bf16[512,16]{1,0} bitcast(%p)
  %u = bf16[8,128]{1,0} parameter(1)
  %s = bf16[64,16]{1,0} bitcast(%u)
  %zero = s32[] constant(0)
  ROOT %d = bf16[512,16]{1,0} dynamic-update-slice(%b, %s, %zero, %zero)
}

ENTRY %main (a: bf16[64,128], u: bf16[8,128]) -> bf16[512,16] {
  %a = bf16[64,128]{1,0} parameter(0)
  %u = bf16[8,128]{1,0} parameter(1)
  ROOT %f = bf16[512,16]{1,0} fusion(%a, %u), kind=kLoop, calls=%fused
}
"""


def test_an_update_in_place_moves_what_is_new():
    assert gpu_gates.around(Compiled(IN_PLACE, None, {})) == 2 * 2 * 8 * 128


def test_gates():
    compiled = Compiled(HLO, None, {})
    assert compiled.calls("__cudnn") == ["__cudnn$fmhaSoftmax"]
    assert gpu_gates.around(compiled) == 2 * 2 * 8 * 128
    assert gpu_gates.counted(compiled) == (1, 0, 0)
    found = {"calls": (4, 0, 2), "moved": 1, "temporary": 1}
    what = ("h100", "cudnn", "forward")
    assert gpu_gates.wrong(what, **found) == []
    gradients = ("h100", "cudnn", "forward + backward")
    both = {"calls": (4, 4, 2), "moved": 100, "temporary": 20}
    assert len(gpu_gates.wrong(gradients, **both)) == 3
    for wrong, message in (
        ({"calls": (1, 0, 0)}, "expected (4, 0, 2) calls"),
        ({"moved": 1000}, "XLA moves 1000.0 times q"),
        ({"temporary": 1000}, "temporaries are 1000.0 times q"),
    ):
        (problem,) = gpu_gates.wrong(what, **(found | wrong))
        assert problem.startswith(message)
    assert gpu_gates.wrong(("a100", "cudnn", "forward"), **(found | {"calls": (4, 0, 0)})) == []


CALL = """ENTRY %main (q: bf16[2,960,3,64]) -> f32[] {
  %c = (bf16[2,3,960,64]{3,1,2,0}, f32[2,3,960]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,960,3,64]{3,2,1,0}, \
bf16[2,1024,3,64]{3,2,1,0}, bf16[2,1024,3,64]{3,2,1,0}}, api_version=API_VERSION_STATUS_RETURNING
}
"""


def test_roofline():
    (kernel,) = gpu_roofline.cudnn_calls(Compiled(CALL, None, {}))
    assert kernel.flops == 4 * 2 * 3 * 960 * 1024 * 64
    assert kernel.moved == 2 * 2 * 3 * 64 * (2 * 960 + 2 * 1024) + 4 * 2 * 3 * 960
    assert kernel.seconds == pytest.approx(kernel.flops / 574e12)  # the speed at 1,024 keys
    assert 574e12 < gpu_roofline.speed(gpu_roofline.FORWARD, 1456) < 617e12
    assert gpu_roofline.speed(gpu_roofline.BACKWARD, 100_000) == 516e12
