"""Bytes that an instruction of a program reads from the device's memory and writes to it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from coca_jax.estimate import hlo

PASSED_ON = ("bitcast", "reshape", "get-tuple-element")
SLICES = ("slice", "dynamic-slice", "gather")
_PLACED = re.compile(r"\b([a-z]+\d+\[[\d,]*\])(\{[^{}]*\})?")


def arrays(type_: str) -> list[float]:
    """Bytes of each array of a type; 0 of one that its layout puts elsewhere, as on a TPU in the
    core's own memory (`S(1)`)."""
    found = _PLACED.findall(type_)
    return [0.0 if "S(" in layout else hlo.type_bytes(array) for array, layout in found]


def operands(found: hlo.Instruction, body: dict[str, hlo.Instruction]) -> float:
    """Of all operands, whole."""
    return sum(sum(arrays(body[name].type)) for name in found.operands if name in body)


def of_fusion(
    module: hlo.Module, found: hlo.Instruction, body: dict[str, hlo.Instruction]
) -> float:
    """What a fusion reads and writes: of an operand that it slices, or a result that it updates in
    place, the slice alone."""
    name = hlo.called(found)["calls"]
    inner = module.computations[name]
    read = 0.0
    for index, operand in enumerate(found.operands):
        here = sum(arrays(body[operand].type)) if operand in body else 1.0
        parameter = _parameter(inner, index)
        if parameter is not None and here:
            read += min(_read(module, name, parameter), hlo.type_bytes(inner[parameter].type))
    written = list(_written(module, name, module.roots[name].name))
    placed = arrays(found.type)
    if len(placed) == len(written):
        written = [n for n, place in zip(written, placed) if place]
    return read + sum(written)


def _parameter(inner: dict[str, hlo.Instruction], index: int) -> str | None:
    text = f"parameter({index})"
    return next(
        (x.name for x in inner.values() if x.opcode == "parameter" and text in x.line), None
    )


def _read(module: hlo.Module, computation: str, source: str) -> float:
    """Of an array inside a computation: its slices where all of its users slice it."""
    inner = module.computations[computation]
    total = 0.0
    for user in inner.values():
        if source not in user.operands:
            continue
        place = user.operands.index(source)
        if user.opcode in PASSED_ON:
            total += _read(module, computation, user.name)
        elif user.opcode in SLICES and place == 0:
            total += hlo.type_bytes(user.type)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue
        elif user.opcode == "fusion":
            below = hlo.called(user)["calls"]
            parameter = _parameter(module.computations[below], place)
            total += _read(module, below, parameter) if parameter else 0.0
        else:
            return hlo.type_bytes(inner[source].type)
    return total


def _written(module: hlo.Module, computation: str, name: str) -> Iterator[float]:
    """Of each array of a result inside a computation."""
    inner = module.computations[computation]
    result = inner[name]
    if result.opcode == "tuple":
        for operand in result.operands:
            yield from _written(module, computation, operand)
    elif result.opcode == "bitcast":
        yield from _written(module, computation, result.operands[0])
    elif result.opcode == "dynamic-update-slice":
        yield hlo.type_bytes(inner[result.operands[1]].type)
    elif result.opcode == "fusion":
        below = hlo.called(result)["calls"]
        yield from _written(module, below, module.roots[below].name)
    else:
        yield hlo.type_bytes(result.type)
