"""What a compiled step costs on a TPU: the compiler's cycles, our kernels' schedules, the links."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from coca_jax.estimate import hlo
from coca_jax.estimate.chips import Tpu
from coca_jax.ops import tpu_attention_long, tpu_attention_short, tpu_norm

# Cycles of each instruction of a program by the TPU compiler's own schedule of its bundles.
#
# A core runs one bundle of instructions a cycle, so bundles times the trips of the loops around them
# are what the schedule takes, where it waits for nothing. libtpu writes the bundles out when its
# environment asks for it before it is loaded.


_LINE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+([A-Z]{2})?\s*:\s*([> ]*)")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\S+) /\* loop exit test \*/")
_FILE = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")


@functools.cache
def folder() -> pathlib.Path:
    """Where libtpu writes bundles to in this process; it reads the place once."""
    path = tempfile.mkdtemp(prefix="coca_jax_bundles")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return pathlib.Path(path)


@contextlib.contextmanager
def asked() -> Iterator[None]:
    """Within it libtpu, if it is loaded now for the first time, is asked to write bundles out."""
    old = os.environ.get("LIBTPU_INIT_ARGS")
    flags = f"--xla_jf_dump_to={folder()} --xla_jf_dump_llo_text=true"
    flags += " --xla_jf_dump_llo_pass_label_regex=^final_bundles$"
    os.environ["LIBTPU_INIT_ARGS"] = f"{old or ''} {flags}".strip()
    try:
        yield
    finally:
        if old is None:
            del os.environ["LIBTPU_INIT_ARGS"]
        else:
            os.environ["LIBTPU_INIT_ARGS"] = old


def take() -> dict[str, int]:
    """{instruction: cycles of a run} of what was written since the last call, which is removed."""
    found = {}
    for path in sorted(folder().iterdir()):
        name = _FILE.match(path.name)
        counted = cycles(path.read_text()) if name else None
        if name and counted:
            found[name[1]] = counted
        path.unlink()
    return found


def of_all(module: hlo.Module, written: dict[str, int]) -> dict[str, int]:
    """Cycles of every fusion that libtpu has written out itself or one like it, which it compiles
    once and writes out once."""
    signatures = {
        found.name: _signature(module, found, body)
        for body in module.computations.values()
        for found in body.values()
        if found.opcode == "fusion"
    }
    known = {signatures[name]: n for name, n in written.items() if name in signatures}
    return {name: known[s] for name, s in signatures.items() if s in known}


def _signature(
    module: hlo.Module, found: hlo.Instruction, body: dict[str, hlo.Instruction]
) -> tuple[str, ...]:
    """Types in and out, and what is computed in which order."""
    inside = module.computations[hlo.called(found)["calls"]]
    operands = [body[name].type for name in found.operands if name in body]
    return (found.type, *operands, *(f"{x.opcode} {x.type}" for x in inside.values()))


def cycles(text: str) -> int | None:
    """Bundles of a listing, those in loops as often as these run; None where a loop's length is not
    in it. In a loop of s stages, each of which works on the result of the one before, a stage runs
    s - 1 times less than the loop."""
    bundles, stages, limits = [0], [0], [1]  # of the loops around a line, outermost first
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        depth = match[2].count(">")
        starts = match[1] == "LB" and depth > 0
        while len(bundles) > depth + 1 or (starts and len(bundles) == depth + 1):
            limit = limits.pop()
            if limit == 0:
                return None
            inner = bundles.pop() * max(1, limit - stages.pop())
            bundles[-1] += inner
        while len(bundles) <= depth:
            for numbers, first in ((bundles, 0), (stages, 0), (limits, 1)):
                numbers.append(first)
        bundles[-1] += 1
        stages[-1] = max([stages[-1], *(int(n) for n in _STAGE.findall(line))])
        leaves = _EXIT.search(line)
        if leaves:
            limits[-1] = int(leaves[1]) if leaves[1].isdigit() else 0
    if 0 in limits:
        return None
    total = 0
    for count, stage, limit in zip(bundles[::-1], stages[::-1], limits[::-1]):
        total = (total + count) * max(1, limit - stage)
    return total


# What our own kernels cost on a TPU, from the compiler's own schedule of their instructions.
#
# A kernel is a custom call to XLA, which gives it no `estimated_cycles`. But its code is scheduled
# statically: libtpu can write out the instruction bundles, and without a branch each takes a cycle.
# This runs as a process of its own (`python -m coca_jax.estimate.tpu`, requests and answers in
# JSON), since libtpu reads the option that makes it write them only once, when it is loaded.


SCHEDULE = "pre-delay_hlo-static-per-bundle-utilization"  # a line a bundle, idle ones included


def count_bundles(topology: str, options: dict, calls: list[tuple[str, list[str]]]) -> list[int]:
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
            [sys.executable, "-m", "coca_jax.estimate.tpu"],
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
            errors = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise ValueError(f"no schedule of the kernels: {errors[-1]}")
        return json.loads(done.stdout.splitlines()[-1])


def work(name: str, types: list[str]) -> tuple[int, int]:
    """(steps, bytes of operands and results that are moved) of one call."""
    arrays = [shape for dtype, shape in map(parse, types) if dtype == "bfloat16"]
    batch, n, width = arrays[0][-3:]
    if name.startswith("norm_gradient"):
        part = tpu_norm.at_once(n)
        steps = batch // tpu_norm.rows_per_step(batch, part) * (n // part)
        return steps, 4 * 2 * batch * n * width
    if name.startswith("long_attention"):
        return tpu_attention_long.work(name, arrays)
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
        return lambda index, x, scale, gradient, beside: tpu_norm.backward(
            x, scale[0], gradient, beside, epsilon=1e-5, index=index
        )
    if name.startswith("long_attention"):
        return tpu_attention_long.replay(name)
    return tpu_attention_short.replay(name)


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))


def collective_seconds(collective: hlo.Collective, shape: tuple[int, ...], link: float) -> float:
    """A lower bound for one run of a collective: a ring both ways along as many axes of the torus
    as its group needs, each link at full speed."""
    axes, reach = 1, max(shape)
    for size in sorted(shape, reverse=True)[1:]:
        if reach >= collective.group:
            break
        axes, reach = axes + 1, reach * size
    share = (collective.group - 1) / collective.group
    speed = 2 * axes * link
    if collective.kind == "all-reduce":
        return 2 * collective.bytes * share / speed
    if collective.kind == "reduce-scatter":
        return collective.bytes * (collective.group - 1) / speed
    if collective.kind == "collective-permute":
        return collective.bytes / link
    return collective.bytes * share / speed


def analyse(
    text: str,
    chip: Tpu,
    shape: tuple[int, ...],
    devices: int,
    flops_per_device: float,
    bundles: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The report's numbers of an optimised module; flops_per_device are the model's, of a step.

    bundles: cycles of instructions by the compiler's schedule, see schedule.py.
    """
    known = of_all(hlo.Module(text), bundles or {})
    cost = hlo.summarise(text, devices, functools.partial(_scheduled, chip, known))
    each = kernel_cycles(cost, chip)
    by_kernel: dict[str, int] = {}
    for name, types, runs in cost.kernels:
        label = kernel_label(name, types)
        by_kernel[label] = by_kernel.get(label, 0) + each[name, types] * runs
    compute = (cost.scheduled + sum(by_kernel.values())) / chip.hertz
    by_estimates = (cost.cycles + sum(by_kernel.values())) / chip.hertz
    links, exposed = 0.0, 0.0
    for c in cost.collectives:
        seconds = collective_seconds(c, shape, chip.link)
        beside = c.hidden_cycles + sum(each.get(kernel, 0) for kernel in c.hidden_kernels)
        hidden = min(seconds, beside / chip.hertz) if c.asynchronous else 0.0
        links += seconds * c.runs
        exposed += (seconds - hidden) * c.runs
    ideal = flops_per_device / chip.peak
    return {
        "estimated_cycles": cost.cycles,
        "scheduled_cycles": cost.scheduled,
        "scheduled_share": cost.covered / max(1, cost.cycles),
        "kernel_cycles": sum(by_kernel.values()),
        "cycles_by_kernel": by_kernel,
        "estimated_compute_seconds": compute,
        "collective_bound_seconds": links,
        "collectives": len(cost.collectives),
        "asynchronous_collectives": sum(c.asynchronous for c in cost.collectives),
        "exposed_collective_seconds": exposed,
        "estimated_step_seconds": max(compute, links),
        "estimated_mfu_compute_only": ideal / compute if compute else 0.0,
        "mfu_compute_only_by_estimated_cycles": ideal / by_estimates if by_estimates else 0.0,
        "estimated_mfu": ideal / max(compute, links) if compute else 0.0,
        "estimated_mfu_by_schedule": ideal / (compute + exposed) if compute else 0.0,
        "estimated_mfu_no_overlap": ideal / (compute + links) if compute else 0.0,
        "loops_of_unknown_length": len(cost.unknown_loops),
        "costliest": costliest(cost),
    }


def _scheduled(
    chip: Tpu,
    bundles: dict[str, int],
    module: hlo.Module,
    found: hlo.Instruction,
    body: dict[str, hlo.Instruction],
) -> int | None:
    """Of a fusion with a schedule: its bundles, or the time to move its bytes at the memory's full
    rate, which bundles do not show, whichever is more. None where the bundles would be faster than
    the chip's peak: of some loops of products they do not say how often they run."""
    if found.opcode != "fusion" or found.name not in bundles:
        return None
    products = _products(module, hlo.called(found)["calls"]) / chip.peak * chip.hertz
    if bundles[found.name] < 0.99 * products:
        return None
    moved = hlo.of_fusion(module, found, body)
    return max(bundles[found.name], round(moved / chip.stream * chip.hertz))


def _numbers(type_: str) -> int:
    """Of an array of this type."""
    found = re.search(r"\[([\d,]*)\]", type_)
    return math.prod(int(n) for n in found[1].split(",") if n) if found else 0


def _products(module: hlo.Module, computation: str) -> float:
    """FLOPs of the products in a fusion; those over a batch count more than they are."""
    body, total = module.computations[computation], 0.0
    for found in body.values():
        if found.opcode in ("dot", "convolution"):
            left, right, out = (
                _numbers(x) for x in (*(body[o].type for o in found.operands[:2]), found.type)
            )
            total += 2 * out * math.sqrt(left * right / max(1, out))  # out times what is summed
        elif found.opcode == "fusion":
            total += _products(module, hlo.called(found)["calls"])
    return total


def kernel_cycles(cost: hlo.Cost, chip: Tpu) -> dict[tuple[str, tuple[str, ...]], int]:
    """Cycles of a call of each kernel, by its name and operands: its scheduled instructions for
    every row of the batch, shared by the cores, or the time to stream its operands and results,
    whichever is more."""
    distinct = sorted({(name, types) for name, types, _ in cost.kernels})
    counts = count_bundles(
        f"{chip.name}:{chip.smallest}", dict(chip.options), [(n, list(t)) for n, t in distinct]
    )
    found = {}
    for (name, types), bundles in zip(distinct, counts):
        steps, moved = work(name, list(types))
        cycles = bundles * -(-steps // chip.cores)
        found[name, types] = max(cycles, round(moved / chip.stream * chip.hertz))
    return found


def kernel_label(name: str, types: tuple[str, ...]) -> str:
    """A kernel for people: its name and the lengths that it works on."""
    sizes = [parse(t)[1][-2] for t in types if t.startswith("bf16")]
    return f"{name} {sizes[0]} x {sizes[1]}"


def costliest(cost: hlo.Cost) -> list[tuple[str, float]]:
    """(where, share of all cycles), the costliest first, the same places added up."""
    places: dict[str, int] = {}
    for name, cycles in cost.by_op.items():
        where = hlo.place(name)
        places[where] = places.get(where, 0) + cycles
    ranked = sorted(places.items(), key=lambda x: -x[1])
    return [(where, cycles / max(1, cost.scheduled)) for where, cycles in ranked]


@contextlib.contextmanager
def quiet_plugin() -> Iterator[None]:
    """Settings for libtpu on a machine without a TPU; they must stand before it is loaded."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    old = {k: os.environ.get(k) for k in settings}
    os.environ.update({k: v for k, v in settings.items() if k not in os.environ})
    try:
        yield
    finally:
        for key, value in old.items():
            if value is None:
                os.environ.pop(key, None)
