"""What a step costs on a GPU that is not here: kernels, products, links, without its compiler."""

import pytest

from coca_jax.estimate import chips, gpu, hlo


def test_a_gpu_s_kernels_are_bounded_by_bytes_and_products():
    """A loop of three runs around a product, a fusion that slices what it reads, a copy."""
    launched, unknown = gpu.kernels(GPU_STEP)
    found = {k.name: (k.flops, k.bytes, k.runs) for k in launched}
    assert not unknown
    assert found["gemm"] == (2 * 64 * 32 * 16, 2 * (64 * 16 + 16 * 32 + 64 * 32), 3)
    assert found["slice"] == (0, 4 * (16 + 16 + 1), 3)  # a row of eight, the result, the index
    assert found["copy"] == (0, 2 * 4 * 128, 1)
    h100 = chips.GPUS["h100"]
    large = gpu.Kernel("k", "", flops=h100.peak, bytes=0, runs=1)
    assert large.seconds(h100) == pytest.approx(1 / gpu.PRODUCT_SHARE + gpu.LAUNCH)
    wide = gpu.Kernel("k", "", flops=0, bytes=h100.stream, runs=1)
    assert wide.seconds(h100) == pytest.approx(1 / gpu.MEMORY_SHARE + gpu.LAUNCH)


def test_a_report_adds_up_its_kernels_and_places():
    """The loop's product, its slice and the copy, each as long as its bytes or products."""
    h100 = chips.GPUS["h100"]
    found = gpu.analyse(GPU_STEP, h100, devices=1, flops_per_device=1e6)
    launched, _ = gpu.kernels(GPU_STEP)
    seconds = sum(k.seconds(h100) * k.runs for k in launched)
    assert found["kernels"] == 3 + 3 + 1 and found["collectives"] == 0
    assert found["memory_traffic_bytes"] == 3 * (2 * (1024 + 512 + 2048) + 4 * 33) + 2 * 4 * 128
    assert found["roofline_compute_seconds"] == found["roofline_step_seconds"] == seconds
    assert found["roofline_mfu"] == pytest.approx(1e6 / h100.peak / seconds)
    (where, share), *others = found["costliest"]
    assert share == pytest.approx(1) and not others  # no instruction says where it is from


ATTENTION = """HloModule m

%cheap (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %few = f32[8]{0} exponential(%c)
}

%dear (d: f32[8]) -> f32[8] {
  %d = f32[8]{0} parameter(0)
  %wide = f32[1000]{0} broadcast(%d), dimensions={}
  ROOT %narrow = f32[8]{0} slice(%wide), slice={[0:8]}
}

%product (l: f32[32,16], r: f32[16,64]) -> f32[32,64] {
  %l = f32[32,16]{1,0} parameter(0)
  %r = f32[16,64]{1,0} parameter(1)
  ROOT %inner = f32[32,64]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%loop_body (t: (s32[])) -> (s32[]) {
  %t = (s32[]) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %more = s32[] negate(%n)
  ROOT %next = (s32[]) tuple(%more)
}

%loop_if (t.1: (s32[])) -> pred[] {
  %t.1 = (s32[]) parameter(0)
  ROOT %yes = pred[] custom-call(), custom_call_target="ask"
}

ENTRY %main (q: bf16[2,64,4,32], k: bf16[2,48,4,32], x: f32[8], a: f32[32,16], b: f32[16,64], \
p: pred[], i: (s32[])) -> f32[32,64] {
  %q = bf16[2,64,4,32]{3,2,1,0} parameter(0)
  %k = bf16[2,48,4,32]{3,2,1,0} parameter(1)
  %x = f32[8]{0} parameter(2)
  %a = f32[32,16]{1,0} parameter(3)
  %b = f32[16,64]{1,0} parameter(4)
  %p = pred[] parameter(5)
  %i = (s32[]) parameter(6)
  %forward = (bf16[2,64,4,32]{3,2,1,0}, u8[512]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax"
  %backward = (bf16[2,64,4,32]{3,2,1,0}, u8[512]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"mask_type":"CAUSAL"}
  %choice = f32[8]{0} conditional(%p, %x, %x), true_computation=%cheap, false_computation=%dear
  %fused = f32[32,64]{1,0} fusion(%a, %b), kind=kCustom, calls=%product
  %alone = f32[32,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %rounds = (s32[]) while(%i), condition=%loop_if, body=%loop_body
  ROOT %sum = f32[32,64]{1,0} all-reduce(%alone), replica_groups={{0,1,2,3}}, to_apply=%cheap
}
"""


def test_products_are_those_of_cudnn_and_of_xla_and_of_branches_the_dearest_counts():
    launched, unknown = gpu.kernels(ATTENTION)
    found = {k.name: (k.flops, k.bytes, k.runs) for k in launched}
    scores = 2 * 2 * 4 * 64 * 48 * 32  # a multiplication and an addition each
    moved = 2 * 2 * 4 * 32 * (64 + 2 * 48 + 64)  # query, key, value, result; no scratch memory
    assert found["forward"] == (2 * scores, moved, 1)
    assert found["backward"] == (5 * scores / 2, moved, 1)  # what the order hides is not computed
    product = 2 * 32 * 16 * 64
    read = 4 * (32 * 16 + 16 * 64 + 32 * 64)
    assert found["fused"] == found["alone"] == (product, read, 1)
    assert "few" not in found and found["wide"][1] == 4 * (8 + 1000)
    assert unknown == ["rounds"] and found["more"][2] == 1
    assert "sum" not in found  # the links', not a kernel's
    report = gpu.analyse(ATTENTION, chips.GPUS["h100"], devices=4, flops_per_device=product)
    assert (report["collectives"], report["loops_of_unknown_length"]) == (1, 1)
    assert report["collective_bound_seconds"] == 2 * 4 * 32 * 64 * (3 / 4) / chips.GPUS["h100"].link
    low, high = report["roofline_mfu_no_overlap"], report["roofline_mfu"]
    assert 0 < low < high == report["roofline_mfu_compute_only"]


def test_collectives_of_gpus_are_bounded_by_the_switch():
    def seconds(kind):
        return gpu.collective_seconds(hlo.Collective(kind, 1e9, 8, 1, ""), 4.5e11)

    assert seconds("all-gather") == pytest.approx(1e9 * 7 / 8 / 4.5e11)
    assert seconds("all-reduce") == pytest.approx(2 * seconds("all-gather"))
    assert seconds("reduce-scatter") == pytest.approx(8 * seconds("all-gather"))  # of its result


def test_jax_s_questions_are_answered_for_the_gpu_that_is_compiled_for_and_no_longer():
    from jax._src.cudnn import fused_attention_stablehlo as questions

    before = questions.check_compute_capability
    for name, newest, own in (("a100", False, "8.0"), ("h100", True, "9.0")):
        with gpu.answering_for(chips.GPUS[name]):
            assert questions.check_compute_capability("8.0")
            assert questions.check_compute_capability("9.0") == newest
            assert questions.is_cuda_compute_capability_equal(own)
            assert not questions.is_cuda_compute_capability_equal("10.0")
            assert questions.check_cudnn_version() >= 91000
    assert questions.check_compute_capability is before


def test_a_gpu_s_topology_is_a_number_and_needs_the_compiler():
    with pytest.raises(ValueError, match="--topology=h100:2x4: give the number of GPUs, such as h"):
        chips.get_slice("h100:2x4")
    target = chips.GPUS["h200"].target()
    assert "core_count: 132" in target and f"device_memory_size: {chips.GPUS['h200'].hbm}" in target
    try:
        found = chips.get_slice("h100:8")
    except ValueError as error:
        assert "the compiler comes with pip install jax-cuda12-plugin==" in str(error)
        assert "\n" not in str(error)
    else:
        assert len(found.devices) == 8


GPU_STEP = """HloModule m

%fused (p: f32[8,16], i: s32[]) -> f32[1,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,16]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,16}
}

%body (t: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %t = (s32[], f32[8,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%t), index=1
  %a = bf16[64,16]{1,0} constant({...})
  %b = bf16[16,32]{1,0} constant({...})
  %gemm = (bf16[64,32]{1,0}, s8[4096]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %slice = f32[1,16]{1,0} fusion(%x, %n), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%n, %x)
}

%condition (t.1: (s32[], f32[8,16])) -> pred[] {
  %t.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x.1: f32[8,16]) -> f32[128] {
  %x.1 = f32[8,16]{1,0} parameter(0)
  %start = s32[] constant(0)
  %init = (s32[], f32[8,16]{1,0}) tuple(%start, %x.1)
  %loop = (s32[], f32[8,16]{1,0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %last = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  %flat = f32[128]{0} bitcast(%last)
  ROOT %copy = f32[128]{0} copy(%flat)
}
"""
