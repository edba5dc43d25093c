"""Compiles a config's train step for chips that are not here, and says what it would cost.

`python -m coca_jax.compile --config=coca_2b --topology=v4:8x16x16` runs the real TPU
compiler (the package `libtpu`) on this machine's CPU for the very step that `train` runs, and
`--topology=h100:8` XLA's compiler for NVIDIA GPUs (jax-cuda12-plugin). All times are estimates: of
a TPU the compiler's own `estimated_cycles`, summed over the optimised program, of a GPU a roofline
of its kernels, and a bound for collectives from link bandwidth. `--topology=cpu:8` compiles for
simulated CPU devices, which have no estimates.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from coca_jax import cli, partitioning, recipes, run_config
from coca_jax.estimate import flops, gpu, hlo, tpu
from coca_jax.estimate.chips import GIB, Gpu, Slice, get_slice
from coca_jax.estimate.step import build_step


def analyse(
    config: ConfigDict, slice_: Slice, compiled: Any, text: str, params: int
) -> dict[str, Any]:
    """The numbers of the report from a compiled step and its optimised HLO."""
    devices = len(slice_.devices)
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    total = arguments + temporaries + outputs + code
    forward = flops.model_flops(config.model)
    per_device = 3 * forward * config.batch_size / devices
    cost = hlo.summarise(text, devices)
    collective_bytes: dict[str, float] = {}
    for c in cost.collectives:
        collective_bytes[c.kind] = collective_bytes.get(c.kind, 0) + c.bytes * c.runs
    result: dict[str, Any] = {
        "devices": devices,
        "params": params,
        "batch_size": config.batch_size,
        "bytes_per_device": {
            "arguments": arguments,
            "temporaries": temporaries,
            "outputs": outputs,
            "code": code,
            "total": total,
        },
        "model_flops_per_pair": 3 * forward,
        "model_flops_per_device": per_device,
        "compiled_flops_loops_once": (compiled.cost_analysis() or {}).get("flops"),
        "collective_bytes": collective_bytes,
        "loops_of_unknown_length": len(cost.unknown_loops),
        "fits": True,
    }
    chip = slice_.chip
    if chip is None:
        return result
    result |= {"hbm_bytes": chip.hbm, "hbm_share": total / chip.hbm, "fits": total <= chip.hbm}
    if isinstance(chip, Gpu):
        return result | gpu.analyse(text, chip, devices, per_device)
    return result | tpu.analyse(text, chip, slice_.shape, devices, per_device)


def show(result: dict[str, Any], rows: int) -> None:
    """Prints the table for people, with so many rows of costliest places."""
    memory = result["bytes_per_device"]
    line = "  ".join(f"{k} {v / GIB:.2f}" for k, v in memory.items())
    print(f"devices {result['devices']}, parameters {result['params'] / 1e6:.1f}M")
    print(f"GiB per device: {line}")
    print(
        f"model TFLOP: {result['model_flops_per_pair'] / 1e12:.4f} per pair, "
        f"{result['model_flops_per_device'] / 1e12:.2f} per device and step"
    )
    for kind, size in sorted(result["collective_bytes"].items()):
        print(f"  {kind:20s} {size / GIB:8.3f} GiB per device and step")
    if "hbm_share" not in result:
        return
    print(f"share of HBM {result['hbm_share']:.1%}; {'fits' if result['fits'] else 'DOES NOT FIT'}")
    if "roofline_mfu" in result:
        show_gpu(result)
    else:
        show_tpu(result)
    for where, share in result["costliest"][:rows]:
        print(f"  {share:6.1%}  {where}")


def show_tpu(result: dict[str, Any]) -> None:
    """The compiler's cycles."""
    print("The compiler's estimate, not a measurement:")
    print(
        f"  {result['estimated_cycles'] / 1e6:.1f}M cycles, and "
        f"{result['kernel_cycles'] / 1e6:.1f}M of scheduled instructions of kernels = "
        f"{result['estimated_compute_seconds']:.4f} s compute, "
        f"MFU {result['estimated_mfu_compute_only']:.1%} compute only"
    )
    print(
        f"  collectives at least {result['collective_bound_seconds']:.4f} s at full link speed; "
        f"step {result['estimated_step_seconds']:.4f} s if they overlap, "
        f"MFU {result['estimated_mfu']:.1%} ({result['estimated_mfu_no_overlap']:.1%} if not)"
    )
    for kernel, cycles in sorted(result["cycles_by_kernel"].items(), key=lambda x: -x[1]):
        print(f"    {cycles / 1e6:6.2f}M  {kernel}")
    print("costliest places outside kernels:")


def show_gpu(result: dict[str, Any]) -> None:
    """The roofline."""
    print("A roofline of the compiled kernels, a bound and not a measurement:")
    print(
        f"  {result['kernels']} kernels move {result['memory_traffic_bytes'] / 1e9:.1f} GB: "
        f"{result['roofline_compute_seconds']:.4f} s, "
        f"MFU at most {result['roofline_mfu_compute_only']:.1%}"
    )
    if result["collectives"]:
        print(
            f"  {result['collectives']} collectives ({result['asynchronous_collectives']} "
            f"asynchronous) at least {result['collective_bound_seconds']:.4f} s; step "
            f"{result['roofline_step_seconds']:.4f} s if they overlap, MFU at most "
            f"{result['roofline_mfu']:.1%} ({result['roofline_mfu_no_overlap']:.1%} if not)"
        )
    print("costliest places:")


def optimised_text(compiled: Any, folder: str) -> str:
    """The optimised HLO with the compiler's estimates.

    folder: what the compiler has dumped there is read where jaxlib cannot parse the program that
    it gets back: on chips with a SparseCore, gathers that are moved to it.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        files = list(pathlib.Path(folder).glob("*jit_train_step*after_codegen.txt"))
        if len(files) != 1:
            raise
        return files[0].read_text()


def compile_step(config: ConfigDict, topology: str, dump_hlo: str = "") -> dict[str, Any]:
    """Compiles and analyses; see the module's docstring. Raises ValueError for bad input."""
    config = config.copy_and_resolve_references()
    run_config.check(config)
    with tpu.quiet_plugin(), tempfile.TemporaryDirectory() as folder:
        slice_ = get_slice(topology)
        mesh = partitioning.make_mesh(**config.mesh, devices=slice_.devices)
        run_config.check_batch(config, partitioning.batch_parts(mesh), 1)
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        answers: Any = contextlib.nullcontext()
        if slice_.chip is None:
            options = {}
        elif isinstance(slice_.chip, Gpu):
            options, answers = gpu.OPTIONS, gpu.answering_for(slice_.chip)
        with jax.set_mesh(mesh), answers:
            step, (state, batch) = build_step(config, mesh)
            params = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.params))
            start = time.perf_counter()
            lowered = step.lower(state, batch)
            try:
                compiled = lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                needs = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", str(error))
                print(f"does not fit: {needs[0] if needs else str(error).splitlines()[0]}")
                return {"topology": topology, "devices": mesh.size, "params": params, "fits": False}
        seconds = time.perf_counter() - start
        text = optimised_text(compiled, folder)
    if dump_hlo:
        pathlib.Path(dump_hlo).write_text(text)
    mesh_shape = dict(mesh.shape)
    return {
        "topology": topology,
        "mesh": mesh_shape,
        "compile_seconds": round(seconds, 1),
    } | analyse(config, slice_, compiled, text, params)


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    recipes.define_flag()
    flags.DEFINE_string(
        "topology",
        None,
        "Chips, as v4:8x16x16, v5e:16x16, v5p:8x8x8, v6e:16x16, h100:8, h200:8, a100:8 or cpu:8.",
    )
    flags.DEFINE_string("dump_hlo", "", "File for the optimised HLO text.")
    flags.DEFINE_integer("top", 25, "Rows of the table of costliest operations.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry: exit status 1 when the step does not fit."""
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; options are --config and --topology")
    if flags.FLAGS.config is None or flags.FLAGS.topology is None:
        raise ValueError("give --config=NAME and --topology=v4:8x16x16 (or cpu:8)")
    prepare_platform(flags.FLAGS.topology)
    result = compile_step(flags.FLAGS.config, flags.FLAGS.topology, flags.FLAGS.dump_hlo)
    if "bytes_per_device" in result:
        show(result, flags.FLAGS.top)
    if not result["fits"]:
        print(json.dumps(result), flush=True)
        sys.exit(1)
    return result


def prepare_platform(topology: str) -> None:
    """Compiling needs no accelerator: keeps jax on the CPU, with enough devices for cpu:N.

    jax reads both settings when it looks for devices, which is later than this.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    match = re.fullmatch(r"cpu:(\d+(?:x\d+)*)", topology)
    if match:
        count = int(np.prod([int(n) for n in match[1].split("x")]))
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    cli.command("compile")
