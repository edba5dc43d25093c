"""The compile command: the sum over an HLO call tree, the step for cpu:8."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from coca_jax.cli import compile as compile_command
from coca_jax.estimate import chips, hlo, tpu

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HLO = os.path.join(os.path.dirname(__file__), "golden", "tpu_step.hlo")


def test_cycles_are_summed_over_loops_and_not_inside_fusions():
    with open(HLO) as file:
        cost = hlo.summarise(file.read(), devices=8)
    # 100 at the top, 40 loops of (10 + 7 of the inner loop's 3 runs), 5 in an asynchronous call,
    # and the dearer branch of the conditional.
    assert cost.cycles == 100 + 40 * (10 + 3 * 7) + 5 + 60
    assert cost.loops == {"while.1": 40, "while.2": 3}
    assert cost.unknown_loops == []
    assert cost.by_op["jit(step)/jvp(M)/blocks/while/body/mlp/in/dot_general"] == 400


def test_collectives_are_listed_with_bytes_groups_and_runs():
    with open(HLO) as file:
        cost = hlo.summarise(file.read(), devices=8)
    found = {(c.kind, c.bytes, c.group, c.runs) for c in cost.collectives}
    assert found == {
        ("all-gather", 2 * 64 * 32, 4, 40),
        ("all-reduce", 4 * 128, 2, 1),
        ("reduce-scatter", 4 * 16 * 8 / 8, 8, 1),
    }


ASYNCHRONOUS = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[64,32], b: f32[8]) -> (bf16[256,32], f32[8]) {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %all-gather-start.1 = (bf16[64,32]{1,0}, bf16[256,32]{1,0}) all-gather-start(%a), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}
  %exp.1 = f32[8]{0} exponential(%b), backend_config={"estimated_cycles":"70"}
  %exp.2 = f32[8]{0} exponential(%exp.1), backend_config={"estimated_cycles":"30"}
  %all-gather-done.1 = bf16[256,32]{1,0} all-gather-done(%all-gather-start.1)
  %exp.3 = f32[8]{0} exponential(%exp.2), backend_config={"estimated_cycles":"900"}
  %all-reduce.1 = f32[8]{0} all-reduce(%exp.3), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %tuple = (bf16[256,32]{1,0}, f32[8]{0}) tuple(%all-gather-done.1, %all-reduce.1)
}
"""  # noqa: E501


def test_a_collective_hides_behind_what_stands_between_its_start_and_its_end():
    gather, reduce = hlo.summarise(ASYNCHRONOUS, devices=4).collectives
    assert (gather.kind, gather.asynchronous, gather.hidden_cycles) == ("all-gather", True, 100)
    assert gather.bytes == 2 * 256 * 32
    assert (reduce.kind, reduce.asynchronous, reduce.hidden_cycles) == ("all-reduce", False, 0)
    chip = chips.TPUS["v4"]
    found = tpu.analyse(ASYNCHRONOUS, chip, (2, 2, 1), 4, flops_per_device=chip.peak * 1e-6)
    first, second = (tpu.collective_seconds(c, (2, 2, 1), chip.link) for c in (gather, reduce))
    exposed = max(0.0, first - 100 / chip.hertz) + second
    assert found["exposed_collective_seconds"] == pytest.approx(exposed)
    assert (found["collectives"], found["asynchronous_collectives"]) == (2, 1)
    low, by_schedule, high = (
        found[f"estimated_mfu{end}"] for end in ("_no_overlap", "_by_schedule", "")
    )
    assert low <= by_schedule <= high


def test_chips_are_those_of_jax_s_table():
    """Peaks and memory of a device: TFLOP/s in bfloat16, GB."""
    found = {k: (t.peak / 1e12, round(t.hbm / 1e9), t.hertz / 1e9) for k, t in chips.TPUS.items()}
    for name, peak, memory, clock in (
        ("v4", 275, 34, 1.05),
        ("v5e", 197, 17, 1.5),
        ("v5p", 459, 103, 1.75),
        ("v6e", 920, 34, 1.75),
        ("v7x", 1155, 103, 2.2),
    ):
        assert found[name] == pytest.approx((peak, memory, clock), rel=0.01)


KERNEL = """HloModule m

ENTRY %main (a: s32[1], q: bf16[8,64,256]) -> bf16[8,64,256] {
  %a = s32[1]{0} parameter(0)
  %q = bf16[8,64,256]{2,1,0} parameter(1)
  ROOT %attention_4_heads.2 = bf16[8,64,256]{2,1,0:T(8,128)(2,1)} custom-call(%a, %q, %q, %q), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1]{0}, \
bf16[8,64,256]{2,1,0}, bf16[8,32,256]{2,1,0}, bf16[8,32,256]{2,1,0}}, metadata={op_name="a"}
}
"""


def test_kernels_are_listed_with_their_operands_and_costed_by_steps_and_bytes():
    (name, types, runs), *others = hlo.summarise(KERNEL).kernels
    assert (name, runs, others) == ("attention_4_heads", 1, [])
    assert types == ("s32[1]", "bf16[8,64,256]", "bf16[8,32,256]", "bf16[8,32,256]")
    moved = 2 * 8 * 256 * (64 + 32) * 2  # query and result, key and value; bfloat16
    assert tpu.work(name, list(types)) == (8, moved)
    stack = ["s32[1]", "bf16[40,32,64,1408]", "f32[1,1408]", *["bf16[32,64,1408]"] * 2]
    assert tpu.work("norm_gradient", stack) == (8, 4 * 2 * 32 * 64 * 1408)  # 4 rows a step
    rows = ["s32[1]", "bf16[40,8,1024,1408]", "f32[1,1408]", *["bf16[8,1024,1408]"] * 2]
    assert tpu.work("norm_gradient", rows)[0] == 8 * 4  # a row in four steps
    long = ["s32[1]", *["bf16[8,1024,1408]"] * 3]  # 128 queries a step, and backward 256 keys
    one = 2 * 8 * 1024 * 1408
    assert tpu.work("long_attention_16_heads", long) == (8 * 8, 4 * one)
    gradient = [*long, *["bf16[8,1024,1408]"] * 2, "f32[8,1024,128]"]
    # Queries, results and gradients for each block of keys; results.
    assert tpu.work("long_attention_gradient_16_heads", gradient) == (8 * 4 * 8, 17 * one)


@pytest.mark.tpu_backend
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.long
def test_the_compiler_s_schedule_of_a_kernel_is_counted(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # libtpu does not know all of a CPU's
    short, long = (["s32[1]", *[f"bf16[8,{n},256]"] * 3] for n in (64, 256))
    row = "bf16[8,1024,256]"
    calls = [
        ("attention_4_heads", short),
        ("attention_4_heads", long),
        ("long_attention_4_heads", ["s32[1]", *[row] * 3]),
        ("long_attention_gradient_4_heads", ["s32[1]", *[row] * 5, "f32[8,1024,128]"]),
    ]
    few, many, *blocks = tpu.count_bundles("v5e:2x2", {}, calls)
    # The weights of 4 heads of 256 x 256 are 256 registers' worth; each is exponentiated, at least.
    assert 256 < many < 10_000 and 0 < few < many / 2
    assert all(128 < bundles < 20_000 for bundles in blocks)  # half as many weights, at least


def test_a_process_of_kernels_that_ends_without_a_word_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="no schedule of the kernels: it ended with 1$"):
        tpu.count_bundles("v5e:2x2", {}, [("attention_4_heads", ["s32[1]", "bf16[8,64,256]"])])


def test_text_without_a_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.summarise("nothing")


def test_collectives_are_bounded_by_their_links():
    def seconds(kind, group):
        return tpu.collective_seconds(hlo.Collective(kind, 1e9, group, 1, ""), (8, 16, 16), 5e10)

    assert seconds("all-gather", 16) == pytest.approx(1e9 * 15 / 16 / 1e11)
    assert seconds("all-reduce", 16) == pytest.approx(2 * seconds("all-gather", 16))
    assert seconds("all-gather", 256) == pytest.approx(1e9 * 255 / 256 / 2e11)  # two axes
    assert seconds("reduce-scatter", 16) == pytest.approx(1e9 * 15 / 1e11)  # bytes of the result


@pytest.mark.parametrize(
    "name,where",
    [
        (
            "jit(train_step)/jvp(CoCa)/a/while/body/closed_call/mlp/in/dot_general",
            "forward   a/mlp/in",
        ),
        ("jit(train_step)/transpose(jvp(CoCa))/a/checkpoint/mlp/add", "backward  a/mlp"),
        ("jit(f)/transpose(jvp(C))/checkpoint/rematted_computation/mlp/add", "recompute mlp"),
        ("jit(train_step)/mul", "update    mul"),
    ],
)
def test_operations_are_named_by_layer_and_direction(name, where):
    assert hlo.place(name) == where


BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s16_s6 = smov.u32 0 }
   0x1 LB: > { %s17_s7 = sadd.s32 1, %s16_s6 /* iteration index, stage = 1 */ }
   0x2   : > { %p27_p1 = scmp.lt.s32.totalorder %s16_s6, 5 }
   0x3 LB: >> { %v1 = vld [vmem:[%s17_s7] sm:$0xff] }
   0x4   : >> { %p9_p2 = scmp.ge.s32.totalorder %s9_s1, 3 /* loop exit test */ }
   0x5 LE: > { %22 = sbr.rel (!%p9_p2) target = $region3 }
   0x6   : > { %p4_p5 = scmp.ge.s32.totalorder %s7_s6, 6 /* loop exit test */ }
   0x7 LE:  { %23 = vsyncpa [#allocation0], 1 }
"""


def test_bundles_count_as_often_as_their_loops_run():
    """Two outside, 5 = 6 less a stage of pipelining times 4 and an inner loop of 3 times 2."""
    assert tpu.cycles(BUNDLES) == 2 + 5 * (4 + 3 * 2)
    assert tpu.cycles(BUNDLES.replace("%s7_s6, 6 /*", "%s7_s6, %s8_s2 /*")) is None


def test_a_fusion_lasts_as_long_as_its_schedule_or_its_bytes():
    """What was written out for one fusion holds for another like it; a slice of a stack and what
    lies in the core's own memory are not read from the chip's."""
    chip = chips.TPUS["v6e"]
    found = tpu.analyse(TPU_FUSIONS, chip, (1,), 1, 1e9, {"mul.1": 10**9, "far.1": 7})
    moved = 2 * 4 * 2**20 / chip.stream * chip.hertz
    assert found["scheduled_cycles"] == 2 * 10**9 + round(moved) + 40
    assert found["estimated_cycles"] == 2 * 500 + 900 + 40
    assert found["scheduled_share"] == pytest.approx(1900 / 1940)
    alone = tpu.analyse(TPU_FUSIONS, chip, (1,), 1, 1e9)
    assert alone["scheduled_cycles"] == alone["estimated_cycles"] and not alone["scheduled_share"]


TPU_FUSIONS = """HloModule m, is_scheduled=true

%fused.1 (p: f32[1048576]) -> f32[1048576] {
  %p = f32[1048576]{0} parameter(0)
  ROOT %m = f32[1048576]{0} multiply(%p, %p)
}

%fused.2 (p.2: f32[1048576]) -> f32[1048576] {
  %p.2 = f32[1048576]{0} parameter(0)
  ROOT %m.2 = f32[1048576]{0} multiply(%p.2, %p.2)
}

%fused.3 (a: f32[8,1048576], b: f32[1048576], i: s32[]) -> f32[1048576] {
  %a = f32[8,1048576]{1,0} parameter(0)
  %b = f32[1048576]{0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,1048576]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,1048576}
  %flat = f32[1048576]{0} bitcast(%row)
  ROOT %sum = f32[1048576]{0} add(%flat, %b)
}

ENTRY %main (x: f32[1048576], stack: f32[8,1048576], at: s32[]) -> f32[1048576] {
  %x = f32[1048576]{0} parameter(0)
  %stack = f32[8,1048576]{1,0} parameter(1)
  %at = s32[]{:S(1)} parameter(2)
  %mul.1 = f32[1048576]{0:S(1)} fusion(%x), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"500"}
  %mul.2 = f32[1048576]{0:S(1)} fusion(%x), kind=kLoop, calls=%fused.2, backend_config={"estimated_cycles":"500"}
  %far.1 = f32[1048576]{0} fusion(%stack, %mul.1, %at), kind=kLoop, calls=%fused.3, backend_config={"estimated_cycles":"900"}
  ROOT %neg = f32[1048576]{0} negate(%far.1), backend_config={"estimated_cycles":"40"}
}
"""  # noqa: E501


LITTLE_EFFORT = "--xla_backend_optimization_level=0"


def command(*arguments, **env):
    """In an interpreter of its own, as the compilers for TPUs and GPUs need it."""
    return subprocess.run(
        [sys.executable, "-m", "coca_jax.cli.compile", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": LITTLE_EFFORT, **env},
    )


SMALL = [
    "--config=configs/coca_base.py",
    "--config.batch_size=16",
    "--config.model.image_size=36",
    "--config.model.image.depth=1",
    "--config.model.image.width=48",
    "--config.model.image.mlp_dim=64",
    "--config.model.text.unimodal_depth=1",
    "--config.model.text.multimodal_depth=1",
    "--config.model.text.width=48",
    "--config.model.text.mlp_dim=64",
    "--config.model.text.vocab_size=512",
    "--config.model.text.max_len=8",
    "--config.model.pooler.num_queries=8",
    "--config.mesh.fsdp=4",
    "--config.text_parts=1",
]


@pytest.mark.long
def test_the_command_compiles_the_train_step_for_eight_cpu_devices(commands, tmp_path):
    flags = [*SMALL, "--topology=cpu:8", f"--dump_hlo={tmp_path}/step.hlo"]
    flags += ["--config.loss.captioning_weight=0"]  # half as much to compile
    done = commands.run(["compile", *flags], ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 8 and result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert result["bytes_per_device"]["total"] > result["bytes_per_device"]["arguments"] > 0
    assert result["collective_bytes"]["all-gather"] > 0
    assert result["fits"] is True
    assert "ENTRY" in (tmp_path / "step.hlo").read_text()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--topology=v9:2x2"], "unknown chip"),
        (["--topology=v4"], "v4:8x16x16"),
        (["--topology=v4:8x8"], "slices have 3 axes; write AxBxC, 2x2x1 being the smallest"),
        (["--topology=v5e:2x2x2"], "slices have 2 axes; write AxB, 2x2 being the smallest"),
        (["--topology=cpu:2x4", "--hosts=9"], "--hosts=9 is more than the 8 devices of"),
        (["--topology=cpu:1", "--dump_hlo=/proc/x/step.hlo"], "cannot be written"),
        (["--topology=cpu:1", "--dump_hlo=/tmp"], "--dump_hlo=/tmp is a folder; give a file in it"),
        (["--topology=cpu:8", "--config.batch_size=13"], "batch_size=13"),
    ],
)
def test_bad_input_is_one_line_and_status_two(commands, arguments, message):
    done = commands.run(["compile", *SMALL, *arguments], ROOT)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


@pytest.mark.tpu_backend
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.long
def test_a_small_step_compiles_for_a_tpu_slice():
    done = command(*SMALL, "--topology=v5e:2x4")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 8
    assert result["estimated_cycles"] > 0 and 0 < result["estimated_mfu_compute_only"] < 1
    assert result["scheduled_cycles"] > 0 and result["scheduled_share"] > 0.5
    assert result["loops_of_unknown_length"] == 0


def cuda_compiler():
    """Where XLA's compiler for NVIDIA GPUs is, a folder for PYTHONPATH; '' where it is installed
    among the other packages; None where it is not."""
    beside = os.environ.get("COCA_JAX_CUDA_COMPILER", os.path.join(ROOT, ".venv", "cuda-compiler"))
    if os.path.isdir(beside):
        return beside
    for name in ("jax_plugins", "jax_plugins.xla_cuda12"):  # a name below needs the one above
        if importlib.util.find_spec(name) is None:
            return None
    return ""


@pytest.mark.skipif(cuda_compiler() is None, reason="needs jax-cuda12-plugin and jax-cuda12-pjrt")
@pytest.mark.long
def test_a_small_step_compiles_for_a_gpu_with_flash_attention(tmp_path):
    """bfloat16 attention is cuDNN's in both directions and no [N, M] scores are written."""
    flags = [flag for flag in SMALL if "fsdp" not in flag]
    flags += [
        "--config.mesh.fsdp=1",
        "--config.model.image_size=72",
        "--config.model.image.num_heads=2",
    ]
    flags += ["--config.model.text.num_heads=2", "--config.model.pooler.num_heads=2"]
    done = command(
        *(*flags, "--topology=h100:1", f"--dump_hlo={tmp_path}/step.hlo"),
        PYTHONPATH=os.pathsep.join([ROOT, cuda_compiler() or ""]),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fits"] and result["kernels"] > 100 and result["loops_of_unknown_length"] == 0
    assert 0 < result["roofline_mfu"] < 1
    text = (tmp_path / "step.hlo").read_text()
    # Six attentions: of the encoder, both poolers, both halves' own and across.
    assert len(re.findall(r'"__cudnn\$fmha\w*Softmax"', text)) == 6
    assert len(re.findall(r'"__cudnn\$fmha\w*SoftmaxBackward"', text)) == 6
    # GELU and its bias are part of the three MLPs' first product.
    assert text.count('"epilogue":"BIAS_GELU_AUX"') == 3
    assert not re.search(r"(bf16|f32)\[16,2,16,16\]", text)  # [B, H, N, M] of the encoder


def test_a_small_model_is_shown_with_digits_that_say_something(capsys):
    told = dict(devices=1, params=2e4, bytes_per_device=dict(arguments=2**21, peak=80 * 2**30))
    told |= dict(model_flops_per_pair=1.234e7, model_flops_per_device=2.5e15)
    compile_command.show(told | dict(collective_bytes={"all-gather": 2**20}), 0)
    text = capsys.readouterr().out
    assert "GiB per device: arguments 0.00195  peak 80\n" in text
    assert "model TFLOP: 1.23e-05 per pair, 2,500 per device and step" in text
    assert "0.000977 GiB per device and step" in text
