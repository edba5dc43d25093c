"""What a compiled step costs on an NVIDIA GPU that is not here: a roofline of its kernels.

XLA compiles for a GPU from a description of it (`chips.Gpu`), without one. Of the compiled module
every kernel that would be launched is taken: it lasts as long as its bytes at a share of the
memory's rate, or its products at a share of the peak, whichever is more, and a launch. That is a
bound from above on speed, not a measurement: caches, tails of waves and waits are not in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from coca_jax.estimate import hlo
from coca_jax.estimate.chips import Gpu
from coca_jax.ops.gpu import AT_MOST_ONCE, COMPILER_OPTIONS

# What good kernels reach of the rates on the data sheet, and the cost of a launch.
MEMORY_SHARE, PRODUCT_SHARE, LAUNCH = 0.85, 0.75, 2e-6
OPTIONS = {**COMPILER_OPTIONS, "xla_gpu_autotune_level": 0}  # autotuning needs the device
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "async-start", "async-done", "async-update"),
}
_SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\["?([\d",]*)"?\]')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launched kernel: floating-point operations and bytes of a run, runs a step."""

    name: str
    op_name: str
    flops: float
    bytes: float
    runs: int

    def seconds(self, gpu: Gpu) -> float:
        """Of one run, at least."""
        memory = self.bytes / (MEMORY_SHARE * gpu.stream)
        return max(memory, self.flops / (PRODUCT_SHARE * gpu.peak)) + LAUNCH


def kernels(text: str) -> tuple[list[Kernel], list[str]]:
    """(kernels that an optimised GPU module launches, loops of unknown length: these run once).

    Collectives are not among them; `hlo.summarise` lists those.
    """
    module = hlo.Module(text)
    unknown: list[str] = []
    return list(_walk(module, module.entry, 1, unknown)), unknown


def _walk(module: hlo.Module, name: str, runs: int, unknown: list[str]) -> Iterator[Kernel]:
    body = module.computations.get(name, {})
    for found in body.values():
        called = hlo.called(found)
        kind = found.opcode
        if kind == "while":
            trips = module.trip_count(found, body)
            if trips is None and AT_MOST_ONCE not in found.op_name:
                unknown.append(found.name)
            yield from _walk(module, called["body"], runs * (trips or 1), unknown)
        elif kind == "call":
            yield from _walk(module, called["to_apply"], runs, unknown)
        elif kind == "conditional":
            branches = [list(_walk(module, b, runs, unknown)) for b in hlo.branches(found)]
            yield from max(branches, key=lambda b: sum(k.bytes * k.runs for k in b))
        elif kind in FREE or kind.removesuffix("-start").removesuffix("-done") in hlo.COLLECTIVES:
            continue
        elif kind == "fusion":
            moved = hlo.of_fusion(module, found, body)
            flops = _dot_flops(module.computations[called["calls"]])
            yield Kernel(found.name, found.op_name, flops, moved, runs)
        else:
            moved = hlo.operands(found, body) + _result_bytes(found)
            flops = _library_flops(found, body) if kind == "custom-call" else 0.0
            flops += _dot_flops({found.name: found}, body) if kind == "dot" else 0.0
            yield Kernel(found.name, found.op_name, flops, moved, runs)


def _result_bytes(found: hlo.Instruction) -> float:
    """Of what is written; the scratch memory of a library's call is not."""
    if found.opcode != "custom-call" or not found.type.lstrip().startswith("("):
        return hlo.type_bytes(found.type)
    arrays = re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", found.type)
    return sum(hlo.type_bytes(f"{k}[{n}]") for k, n in arrays if k not in ("s8", "u8"))


def _dims(type_: str) -> list[int]:
    match = _SHAPE.search(type_)
    return [int(n) for n in match[1].split(",") if n] if match else []


def _product(numbers: list[int]) -> float:
    total = 1.0
    for n in numbers:
        total *= n
    return total


def _dot_flops(
    inner: dict[str, hlo.Instruction], scope: dict[str, hlo.Instruction] | None = None
) -> float:
    """Of the products that XLA compiles itself."""
    total = 0.0
    for found in inner.values():
        if found.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", found.line)
            left = _dims((scope or inner)[found.operands[0]].type)
            axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
            total += 2 * _product(_dims(found.type)) * _product([left[i] for i in axes])
    return total


def _library_flops(found: hlo.Instruction, body: dict[str, hlo.Instruction]) -> float:
    """Of a call to cuBLAS or cuDNN's attention; 0 of any other."""
    match = re.search(r'custom_call_target="([^"]*)"', found.line)
    target = match[1] if match else ""
    operands = [_dims(body[name].type) for name in found.operands if name in body]
    if "cublas" in target:
        listed = _CONTRACTED.search(found.line)
        axes = [int(n) for n in re.findall(r"\d+", listed[1])] if listed else []
        return 2 * _product(_dims(found.type)) * _product([operands[0][i] for i in axes])
    if "fmha" in target:
        (batch, n, heads, width), m = operands[0], operands[1][1]
        products = 5 if "Backward" in target else 2
        causal = 0.5 if "CAUSAL" in found.line else 1.0  # what the order hides is not computed
        return products * 2 * batch * heads * n * m * width * causal
    return 0.0


def analyse(text: str, gpu: Gpu, devices: int, flops_per_device: float) -> dict[str, Any]:
    """The report's numbers: flops_per_device are the model's, of a step."""
    launched, unknown = kernels(text)
    collectives = hlo.summarise(text, devices).collectives
    compute = sum(k.seconds(gpu) * k.runs for k in launched)
    links = sum(collective_seconds(c, gpu.link) * c.runs for c in collectives)
    ideal = flops_per_device / gpu.peak
    places: dict[str, float] = {}
    for k in launched:
        where = hlo.place(k.op_name)
        places[where] = places.get(where, 0.0) + k.seconds(gpu) * k.runs
    ranked = sorted(places.items(), key=lambda x: -x[1])
    return {
        "kernels": sum(k.runs for k in launched),
        "memory_traffic_bytes": sum(k.bytes * k.runs for k in launched),
        "roofline_compute_seconds": compute,
        "collective_bound_seconds": links,
        "roofline_step_seconds": max(compute, links),
        "roofline_mfu_compute_only": ideal / compute if compute else 0.0,
        "roofline_mfu": ideal / max(compute, links) if compute else 0.0,
        "roofline_mfu_no_overlap": ideal / (compute + links) if compute else 0.0,
        "asynchronous_collectives": sum(c.asynchronous for c in collectives),
        "collectives": len(collectives),
        "loops_of_unknown_length": len(unknown),
        "costliest": [(where, seconds / compute) for where, seconds in ranked],
    }


def collective_seconds(collective: hlo.Collective, link: float) -> float:
    """A lower bound for one run over a switch to which each GPU has `link` bytes/s each way."""
    share = (collective.group - 1) / collective.group
    if collective.kind == "all-reduce":
        return 2 * collective.bytes * share / link
    if collective.kind == "reduce-scatter":
        return collective.bytes * (collective.group - 1) / link
    return collective.bytes * share / link


@contextlib.contextmanager
def answering_for(gpu: Gpu) -> Iterator[None]:
    """jax asks a live GPU for its capability and cuDNN's version before it uses cuDNN's attention.
    Here these questions are answered for the GPU that is compiled for."""
    from jax._src.cudnn import fused_attention_stablehlo as questions

    def at_least(capability: str) -> bool:
        return gpu.capability >= tuple(int(n) for n in capability.split("."))

    def equals(capability: str) -> bool:
        return gpu.capability == tuple(int(n) for n in capability.split("."))

    answers = {
        "check_compute_capability": at_least,
        "check_cudnn_version": lambda: 91000,
        "is_cuda_compute_capability_equal": equals,
    }
    old = {name: getattr(questions, name) for name in answers}
    for name, answer in answers.items():
        setattr(questions, name, answer)
    try:
        yield
    finally:
        for name, answer in old.items():
            setattr(questions, name, answer)
