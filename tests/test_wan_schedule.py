"""What a block costs: loops that only count, kinds of operations, estimates against bytes."""

from vmonarch_jax.pallas_kernels.tpu.chips import CHIPS

from benchmarks import hlo, wan_schedule
from benchmarks.aot import Compiled

BODY = """
%body (p: (s32[], bf16[4096,1024])) -> (s32[], bf16[4096,1024]) {
  %p = (s32[], bf16[4096,1024]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4096,1024]{1,0} get-tuple-element(%p), index=1
  %fusion.1 = bf16[4096,1024]{1,0} fusion(%x), kind=kOutput, calls=%f, metadata={op_name="jit(f)/while/body/feed_forward/dot_general"}, backend_config={"convolution_algorithm_config":{"emitter":"E"},"window_config":{"estimated_cycles":"50000"}}
  %fusion.2 = bf16[4096,1024]{1,0} fusion(%fusion.1), kind=kLoop, calls=%f, metadata={op_name="jit(f)/while/body/self_attention/mul"}, backend_config={"window_config":{"estimated_cycles":"7"}}
  %copy.1 = bf16[4096,1024]{0,1} copy(%fusion.2)
  ROOT %t = (s32[], bf16[4096,1024]) tuple(%i, %copy.1)
}
%condition (p.1: (s32[], bf16[4096,1024])) -> pred[] {
  %p.1 = (s32[], bf16[4096,1024]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}
ENTRY %main (a: (s32[], bf16[4096,1024])) -> (s32[], bf16[4096,1024]) {
  %a = (s32[], bf16[4096,1024]) parameter(0)
  %once = bf16[1024,1024]{1,0} copy(%a)
  ROOT %w = (s32[], bf16[4096,1024]) while(%a), condition=%condition, body=%body
}
"""  # noqa: E501


def test_what_turns_with_the_layers_is_a_block():
    chip = CHIPS["v5e"]
    found = wan_schedule.measure(Compiled((), (), "", None, BODY), chip)
    moved = round(2 * 2 * 4096 * 1024 / chip.bytes_per_cycle)  # a read and a write
    assert found["cycles"] == {
        "projections": 0,
        "feed-forward": 50_000,
        "self-attention": 0,
        "cross-attention": 0,
        "passes": moved,
        "copies": moved,
    }
    assert found["once"] > 0
    assert found["largest"][0][2] == "fusion.1"


def test_kinds_of_operations():
    def kind(name, where, opcode="fusion", matmul=False):
        op = hlo.Operation(name, opcode, 1, 7, f"jit(f)/while/body/{where}", "bf16[1]")
        return wan_schedule.kind_of(op, matmul)

    assert kind("fusion.1", "self_attention/dot_general", matmul=True) == "projections"
    assert kind("fusion.1", "self_attention/rotation/dot_general", matmul=True) == "passes"
    assert kind("fusion.1", "cross_attention/dot_general", matmul=True) == "cross-attention"
    assert kind("r_step.1", "self_attention/pallas_call", "kernel") == "self-attention"
    assert kind("attend.1", "cross_attention/pallas_call", "kernel") == "cross-attention"
    assert kind("dynamic-update-slice_fusion.1", "self_attention/scatter") == "copies"
    assert kind("convert_reduce_fusion.1", "feed_forward/reduce_sum") == "passes"
    assert kind("copy.1", "", "copy") == "copies"
