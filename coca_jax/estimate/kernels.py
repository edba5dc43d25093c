"""What our own kernels cost on a TPU, from the compiler's own schedule of their instructions.

A kernel is a custom call to XLA, which gives it no `estimated_cycles`. But its code is scheduled
statically: libtpu can write out the instruction bundles, and without a branch each takes a cycle.
This runs as a process of its own (`python -m coca_jax.estimate.kernels`, requests and answers in
JSON), since libtpu reads the option that makes it write them only once, when it is loaded.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from coca_jax.ops.tpu import attention_kernel, long_attention_kernel, norm_kernel

SCHEDULE = "pre-delay_hlo-static-per-bundle-utilization"  # a line a bundle, idle ones included


def bundles(topology: str, options: dict, calls: list[tuple[str, list[str]]]) -> list[int]:
    """Instruction bundles of one step of each call on one core (see `work` for the steps).

    topology: libtpu's name and shape of a slice, with its options. calls: (kernel's name, types of
    its operands in HLO, 'bf16[32,256,1408]').
    Raises ValueError when libtpu does not write its schedule.
    """
    if not calls:
        return []
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        request = json.dumps(dict(topology=topology, options=options, calls=calls, folder=folder))
        done = subprocess.run(
            [sys.executable, "-m", "coca_jax.estimate.kernels"],
            input=request,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # the process that asks has one too
                "TPU_SKIP_MDS_QUERY": "1",
                "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}",
            },
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise ValueError(f"no schedule of the kernels: {said[-1]}")
        return json.loads(done.stdout.splitlines()[-1])


def work(name: str, types: list[str]) -> tuple[int, int]:
    """(steps, bytes of operands and results that are moved) of one call."""
    arrays = [shape for dtype, shape in map(parse, types) if dtype == "bfloat16"]
    batch, n, width = arrays[0][-3:]
    if name.startswith("norm_gradient"):
        part = norm_kernel.at_once(n)
        steps = batch // norm_kernel.rows_per_step(batch, part) * (n // part)
        return steps, 4 * 2 * batch * n * width
    if name.startswith("long_attention"):
        return long_attention_kernel.work(name, arrays)
    m = arrays[1][-2]
    each = 4 if "gradient" in name else 2  # arrays by queries, and as many by keys
    return batch, each * 2 * batch * (n + m) * width


def parse(type_: str) -> tuple[str, tuple[int, ...]]:
    """'bf16[32,256,1408]' -> ('bfloat16', (32, 256, 1408))."""
    match = re.fullmatch(r"(\w+)\[([\d,]*)\]", type_)
    if match is None:
        raise ValueError(f"not an array type: {type_!r}")
    dtype = {"bf16": "bfloat16", "f32": "float32", "s32": "int32"}[match[1]]
    return dtype, tuple(int(n) for n in match[2].split(",") if n)


def measure(request: dict) -> list[int]:
    """The answer of one process: compiles each kernel alone and counts its bundles."""
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    folder = pathlib.Path(request["folder"])
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=request["topology"], **request["options"]
    )
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    found = []
    for name, types in request["calls"]:
        arrays = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=device)
            for dtype, shape in (parse(type_) for type_ in types)
        ]
        jax.jit(_call(name)).lower(*arrays).compile()
        file = max(folder.glob(f"*-{name}*{SCHEDULE}.txt"), key=lambda f: f.stat().st_mtime)
        rows = [
            line for line in file.read_text().splitlines() if re.fullmatch(r"(\d+ )+\d+ ?", line)
        ]
        found.append(len(rows) - 1)  # the first row is the capacity of each unit
        for other in folder.iterdir():
            other.unlink()
    return found


def _call(name: str) -> Callable[..., Any]:
    """A function of a kernel's operands, in their order in HLO, that makes the same call."""
    if name.startswith("norm_gradient"):
        return lambda index, x, scale, gradient, beside: norm_kernel.backward(
            x, scale[0], gradient, beside, epsilon=1e-5, index=index
        )
    if name.startswith("long_attention"):
        return long_attention_kernel.replay(name)
    return attention_kernel.replay(name)


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
