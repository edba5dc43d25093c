"""What a compiled step costs on a TPU: the compiler's cycles, our kernels' schedules, the links."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from coca_jax.estimate import hlo, kernels, schedule, traffic
from coca_jax.estimate.chips import Tpu


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
    known = schedule.of_all(hlo.Module(text), bundles or {})
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
    moved = traffic.of_fusion(module, found, body)
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
    counts = kernels.bundles(
        f"{chip.name}:{chip.smallest}", dict(chip.options), [(n, list(t)) for n, t in distinct]
    )
    found = {}
    for (name, types), bundles in zip(distinct, counts):
        steps, moved = kernels.work(name, list(types))
        cycles = bundles * -(-steps // chip.cores)
        found[name, types] = max(cycles, round(moved / chip.stream * chip.hertz))
    return found


def kernel_label(name: str, types: tuple[str, ...]) -> str:
    """A kernel for people: its name and the lengths that it works on."""
    sizes = [kernels.parse(t)[1][-2] for t in types if t.startswith("bf16")]
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
