"""A train step compiled for devices that are not here, and the numbers of the compiled program."""

from __future__ import annotations

import contextlib
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import numpy as np

from coca_jax import ops as operations
from coca_jax.checkpoints import config_file
from coca_jax.config import Config, Recipe, typed
from coca_jax.estimate import flops, gpu, hlo, tpu
from coca_jax.estimate.chips import Gpu, Slice, get_slice
from coca_jax.parallel import sharding
from coca_jax.runtime import storage
from coca_jax.training import auto_mesh
from coca_jax.training.programs import build_step


def analyse(
    config: Config, slice_: Slice, compiled: Any, text: str, params: int, bundles: dict[str, int]
) -> dict[str, Any]:
    """The numbers of the report from a compiled step, its optimised HLO and, of a TPU, schedule."""
    devices = len(slice_.devices)
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    total = arguments + temporaries + outputs + code
    per_pair = flops.step_flops(config)
    per_device = per_pair * config.batch_size / devices
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
        "model_flops_per_pair": per_pair,
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
    return result | tpu.analyse(text, chip, slice_.shape, devices, per_device, bundles)


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


def compile_step(config: Recipe, topology: str, dump_hlo: str = "") -> dict[str, Any]:
    """Compiles the step of `config` for a topology and analyses it; dump_hlo: a file for its HLO.

    Raises ValueError for bad input. `fits` is False where the compiler runs out of memory.
    """
    config = typed(config)
    config.check()
    with tpu.quiet_plugin(), tpu.asked(), tempfile.TemporaryDirectory() as folder:
        slice_ = get_slice(topology)
        memory = slice_.chip.hbm if slice_.chip else 0
        mesh = auto_mesh.make(config, slice_.devices, memory).mesh
        config_file.check_batch(config, sharding.batch_parts(mesh))
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        answers: Any = contextlib.nullcontext()
        if slice_.chip is None:
            options = operations.compiler_options("cpu", mesh.size)
        elif isinstance(slice_.chip, Gpu):
            options, answers = gpu.OPTIONS, gpu.answering_for(slice_.chip)
        with jax.set_mesh(mesh), answers:
            step, arguments = build_step(config, mesh)
            params = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(arguments[0].params))
            start = time.perf_counter()
            lowered = step.lower(*arguments)
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
        storage.write_text(dump_hlo, text)
    mesh_shape = dict(mesh.shape)
    return {
        "topology": topology,
        "mesh": mesh_shape,
        "compile_seconds": round(seconds, 1),
    } | analyse(config, slice_, compiled, text, params, tpu.take())
