"""Rows that compilers estimate: whole steps and kernels for TPUs, steps for GPUs and CPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from measuring import GIB, HERE, MIB, Given, Measurement, Rows, Values

TPU = {
    "2b/v4": "--config=coca_2b --topology=v4:8x16x16",
    "2b/v5e": "--config=coca_2b --topology=v5e:16x16 --config.accumulate_steps=16",
    "2b/v5p": "--config=coca_2b --topology=v5p:8x8x8",
    "2b/v6e": "--config=coca_2b --topology=v6e:16x16 --config.accumulate_steps=8",
    "2b_576/v4": "--config=coca_2b --topology=v4:8x16x16 --config.model.image_size=576 "
    "--config.batch_size=16384",
    "2b_576_accumulated/v4": "--config=coca_2b --topology=v4:8x16x16 "
    "--config.model.image_size=576 --config.accumulate_steps=4",
    "large/v4": "--config=coca_large --topology=v4:8x8x8",
    "large/v4_32": "--config=coca_large --topology=v4:2x4x4 --config.accumulate_steps=16",
    "large/v5p": "--config=coca_large --topology=v5p:8x8x8",
    "large/v6e": "--config=coca_large --topology=v6e:16x16 --config.accumulate_steps=2",
    "large/v5e": "--config=coca_large --topology=v5e:16x16 --config.batch_size=16384",
    "base/v4": "--config=coca_base --topology=v4:8x8x8",
    "base/v5e": "--config=coca_base --topology=v5e:16x16 --config.batch_size=32768",
    "base/v5p": "--config=coca_base --topology=v5p:8x8x8",
    "base/v6e": "--config=coca_base --topology=v6e:16x16",
    "coca_2026_base/v4": "--config=coca_2026_base --topology=v4:8x8x8",
}
ONE = "--topology=h100:1 --config.batch_size=256 --config.remat=none --config.mesh.fsdp=1"
H100 = {
    "h100_base/padded": f"--config=coca_base {ONE}",
    "h100_vit_l_14/padded": "--config=benchmarks/released_recipe.py:coca_ViT-L-14 "
    "--topology=h100:1 --config.batch_size=192 --config.remat=none --config.mesh.fsdp=1",
    "h100_others/2b": "--config=coca_2b --topology=h100:8 --config.batch_size=512 "
    "--config.mesh.fsdp=8 --config.remat=named",
    "h100_others/coca_2026_base": f"--config=coca_2026_base {ONE}",
}
SHARE = "--config=coca_224 --topology=cpu:1 --config.batch_size=64 --config.remat"
MEMORY = {
    "none": f"{SHARE}=none",
    "named": f"{SHARE}=named",
    "full": f"{SHARE}=full",
    "full_accumulated": f"{SHARE}=full --config.accumulate_steps=4",
    "full_eight": "--config=coca_224 --topology=cpu:8 --config.batch_size=512 "
    "--config.mesh.fsdp=8 --config.remat=full",
}


def compiled(
    row: str, values: Callable[[dict[str, Any]], Values], flags: str, minutes: float
) -> Measurement:
    """A row by `coca-jax compile` with these flags."""

    def run(given: Given) -> Rows:
        return {row: values(given.coca("compile", *flags.replace("benchmarks", str(HERE)).split()))}

    return Measurement(
        (row,), run, minutes, f"coca-jax compile {flags}", "estimated",
        higher=("mfu", "mfu_at_most"), lower=("gib",),
    )  # fmt: skip


def kernels(given: Given) -> Rows:
    """Bundles of our own kernels for TPUs."""
    return {f"tpu_kernels/{row}": values for row, values in given.script("tpu_kernels.py").items()}


KERNELS = ("forward_64", "backward_64", "forward_88", "backward_88", "long_64", "long_88")


def of_tpu(told: dict[str, Any]) -> Values:
    """The columns of performance.md's table, by `estimated_cycles`; MFU by the schedule too."""
    share = told["mfu_compute_only_by_estimated_cycles"]
    seconds = told["estimated_compute_seconds"] * told["estimated_mfu_compute_only"] / share
    links = told["collective_bound_seconds"]
    return dict(
        gib=told["bytes_per_device"]["total"] / GIB,
        gib_chip=told["hbm_bytes"] / GIB,
        cycles=told["estimated_cycles"] / 1e6,
        cycles_kernels=told["kernel_cycles"] / 1e6,
        seconds=seconds,
        mfu=100 * share,
        collectives_seconds=links,
        mfu_nothing_overlaps=100 * share * seconds / (seconds + links),
        schedule_mfu=100 * told["estimated_mfu_compute_only"],
    )


def of_gpu(told: dict[str, Any]) -> Values:
    """The columns of performance.md's tables of a roofline."""
    return dict(
        memory_traffic=told["memory_traffic_bytes"] / 1e9,
        kernels=told["kernels"],
        gib=told["bytes_per_device"]["total"] / GIB,
        mfu_at_most=100 * told["roofline_mfu_compute_only"],
    )


def of_cpu(told: dict[str, Any]) -> Values:
    return dict(gib=told["bytes_per_device"]["total"] / GIB)


TEMPORARIES = """
import json
import jax
from coca_jax import ops; from coca_jax.parallel import sharding as partitioning; from coca_jax.training import recipes
from coca_jax.config import typed
from coca_jax.training.programs import build_step
from coca_jax.ops import cpu
recipe = recipes.load("finetune_open_clip")
recipe.batch_size = 16
def counted(options, most_logits):
    jax.clear_caches()
    cpu.MOST_LOGITS = most_logits
    mesh = partitioning.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        step, arguments = build_step(typed(recipe), mesh)
        program = step.lower(*arguments).compile(compiler_options=options)
    return program.memory_analysis().temp_size_in_bytes
own = ops.compiler_options("cpu")
usual = {key: value for key, value in own.items() if key != "xla_cpu_scheduler_type"}
most = cpu.MOST_LOGITS
print(json.dumps([counted(usual, 2**40), counted(own, 2**40), counted(own, most)]))
"""


def temporaries(given: Given) -> Rows:
    """Of a step of coca_ViT-B-32's sizes on a CPU: in XLA's usual order, in ours, with chunks of
    logits too."""
    found = json.loads(given.python("-c", TEMPORARIES).splitlines()[-1])
    return {"step_b32/temporaries": dict(zip(("usual", "order", "both"), (b / MIB for b in found)))}


MEASUREMENTS = (
    Measurement(
        ("step_b32/temporaries",),
        temporaries,
        1,
        "the step of finetune_open_clip, 16 pairs, compiled with ops.compiler_options or without",
        "estimated",
        more=dict(unit="MiB"),
        lower=("both",),
    ),
    *(compiled(f"memory_224/{row}", of_cpu, flags, 2) for row, flags in MEMORY.items()),
    Measurement(
        tuple(f"tpu_kernels/{row}" for row in KERNELS),
        kernels,
        3,
        "python benchmarks/tpu_kernels.py",
        "estimated",
        more=dict(unit="bundles a head, v4"),
        lower=("*",),
    ),
    *(compiled(row, of_gpu, flags, 15) for row, flags in H100.items()),
    *(compiled(f"tpu_steps/{row}", of_tpu, flags, 15) for row, flags in TPU.items()),
)
