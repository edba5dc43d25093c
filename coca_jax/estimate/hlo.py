"""Sums the TPU compiler's own cost estimates over an optimised HLO module's call tree.

The scheduled text of a module compiled for TPU holds `estimated_cycles` in the backend_config of
the instructions that run on the core. A loop body stands there once and runs `trip count` times;
a fusion carries the estimate of all that is fused into it. Collectives carry no useful estimate:
they are listed with their bytes, so that a caller can bound them by link bandwidth.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"\b(calls|body|condition|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTRAINTS = re.compile(r"operand_layout_constraints=\{(.*?\})\}, ")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = (
    re.compile(r"replica_groups=\{\{([\d,]*)\}"),  # {{0,1},{2,3}}: the first group's members
    re.compile(r"replica_groups=\[\d+,(\d+)\]"),  # [groups,size]<=[...]
)
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass
class Instruction:
    """One line of HLO: `type` is its result's, `cycles` its own estimate (0 when it has none);
    `scheduled`: by the schedule of its bundles, `cycles` where there is none."""

    name: str
    type: str
    opcode: str
    line: str
    operands: list[str]
    cycles: int
    op_name: str
    scheduled: int = 0


@dataclasses.dataclass
class Collective:
    """One collective: bytes of its result on one device, members of a group, runs per step;
    asynchronous: whether other work may run between its start and its end; hidden_cycles: of the
    work that the program has there, a run; hidden_kernels: calls of kernels of our own there, as
    in Cost.kernels."""

    kind: str
    bytes: float
    group: int
    runs: int
    op_name: str
    asynchronous: bool = False
    hidden_cycles: int = 0
    hidden_kernels: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclasses.dataclass
class Cost:
    """What a module costs: cycles in all by the compiler's estimates, by its schedule (see
    Instruction), by operation name (scheduled), its collectives, loops found.

    covered: estimated cycles of what has a schedule.
    unknown_loops: loops whose trip count is not in the text; their bodies count once.
    kernels: (name, types of its operands, runs) of each call of a kernel of our own, whose cycles
    are not in the text.
    """

    cycles: int
    by_op: dict[str, int]
    by_instruction: list[tuple[int, int, Instruction]]
    collectives: list[Collective]
    loops: dict[str, int]
    unknown_loops: list[str]
    kernels: list[tuple[str, tuple[str, ...], int]] = dataclasses.field(default_factory=list)
    scheduled: int = 0
    covered: int = 0


class Module:
    """The computations of an HLO text. Raises ValueError when it holds no ENTRY."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        name = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header and " = " not in line.split("(")[0]:
                name = header[2]
                current = self.computations.setdefault(name, {})
                if header[1]:
                    self.entry = name
                continue
            match = _INSTRUCTION.match(line)
            if match:
                instruction = _parse(match[2], match[3])
                if instruction is not None:
                    current[instruction.name] = instruction
                    if match[1]:
                        self.roots[name] = instruction
        if not self.entry:
            raise ValueError("the text holds no ENTRY computation; dump the optimised HLO module")

    def trip_count(self, loop: Instruction, body_of: dict[str, Instruction]) -> int | None:
        """How often a while loop runs; None when neither annotation nor condition tell.

        Read from known_trip_count, else from a condition `counter < constant` with the counter's
        start in the loop's initial tuple (0 when it is not a plain constant there).
        """
        known = _TRIPS.search(loop.line)
        if known:
            return int(known[1])
        called = dict(_CALLED.findall(loop.line))
        condition = self.computations.get(called.get("condition", ""), {})
        root = self.roots.get(called.get("condition", ""))
        if root is None:
            return None
        if root.opcode == "fusion":
            inner = self.computations[dict(_CALLED.findall(root.line))["calls"]]
            inner_root = self.roots[dict(_CALLED.findall(root.line))["calls"]]
            return self._bound(inner_root, inner, loop, body_of, root, condition)
        return self._bound(root, condition, loop, body_of, None, {})

    def _bound(self, root, scope, loop, body_of, caller, outer) -> int | None:
        if root.opcode != "compare" or len(root.operands) != 2:
            return None

        def resolve(name: str) -> Instruction | None:
            found = scope.get(name)
            if found is not None and found.opcode == "parameter" and caller is not None:
                index = int(found.line.split("parameter(")[1].split(")")[0])
                found = outer.get(caller.operands[index])
            return found

        left, right = (resolve(x) for x in root.operands)
        less = "direction=LT" in root.line
        if "direction=GT" in root.line:
            left, right, less = right, left, True
        if not less or right is None or left is None or right.opcode != "constant":
            return None
        limit = int(right.line.split("constant(")[1].split(")")[0])
        return max(0, limit - self._start(left, loop, body_of))

    def _start(self, counter, loop, body_of) -> int:
        index = re.search(r"index=(\d+)", counter.line)
        tuple_ = body_of.get(loop.operands[0]) if loop.operands else None
        if index is None or tuple_ is None or tuple_.opcode != "tuple":
            return 0
        first = body_of.get(tuple_.operands[int(index[1])])
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = body_of.get(first.operands[0])
        if first is None or first.opcode != "constant":
            return 0
        return int(first.line.split("constant(")[1].split(")")[0])


def _parse(name: str, rest: str) -> Instruction | None:
    head = rest.split(", metadata=")[0].split(", backend_config=")[0]
    # The result type may hold parentheses of its own (tuples, tilings): the opcode is the first
    # lower-case word followed by '(' that stands after a space.
    match = re.search(r"(?<=[\s])([a-z][a-z0-9\-]*)\(", " " + head)
    if match is None:
        return None
    start = match.start() - 1
    type_, after = head[: max(0, start)], head[match.end() - 1 :]
    depth, end = 1, len(after)
    for i, c in enumerate(after):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            end = i
            break
    operands = re.findall(r"%([\w.\-]+)", after[:end])
    cycles, op = _CYCLES.search(rest), _OP_NAME.search(rest)
    return Instruction(
        name, type_, match[1], rest, operands, int(cycles[1]) if cycles else 0, op[1] if op else ""
    )


def type_bytes(type_: str) -> float:
    """Bytes of a result type, tuples summed, without the padding of layouts."""
    total = 0.0
    for kind, shape in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", type_)):
        if kind in BYTES:
            size = 1
            for n in shape.split(","):
                size *= int(n) if n else 1
            total += size * BYTES[kind]
    return total


def group_size(line: str, devices: int) -> int:
    """Members of a collective's groups; all devices when none are named."""
    mesh = _MESH_GROUPS.search(line)
    if mesh:
        sizes = {k.strip("' "): int(v) for k, v in (x.split("=") for x in mesh[1].split(","))}
        size = 1
        for axis in mesh[2].split(","):
            size *= sizes[axis.strip("' ").split(":")[0]]
        return size
    listed, counted = (pattern.search(line) for pattern in _GROUPS)
    if listed:
        return len(listed[1].split(",")) if listed[1] else devices
    return int(counted[1]) if counted else devices


Schedule = Callable[[Module, Instruction, dict[str, Instruction]], int | None]


def _schedule(module: Module, schedule: Schedule | None) -> set[int]:
    """Sets `scheduled` of all instructions; the ids of those that have a schedule."""
    known = set()
    for body in module.computations.values():
        for each in body.values():
            cycles = schedule(module, each, body) if schedule else None
            each.scheduled = each.cycles if cycles is None else cycles
            if cycles is not None:
                known.add(id(each))
    return known


def summarise(
    text: str,
    devices: int = 1,
    schedule: Schedule | None = None,
) -> Cost:
    """Walks the call tree from ENTRY and sums cycles and collectives, loops multiplied out.

    schedule: gives the cycles of an instruction of a computation by its schedule, or None.
    """
    module = Module(text)
    known = _schedule(module, schedule)
    cost = Cost(0, defaultdict(int), [], [], {}, [])
    spread: dict[tuple[str, str, int], Collective] = {}
    for instruction, runs, fused, fusion in _walk(module, module.entry, 1, cost, False):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = _CHANNEL.search(instruction.line)
            key = (kind, channel[1] if channel else instruction.name, runs)
            if fused and channel and key in spread:  # its steps are in several fusions of products
                spread[key].asynchronous = True
                spread[key].hidden_cycles += fusion.scheduled if fusion is not None else 0
                continue
            size = type_bytes(instruction.type)
            if instruction.opcode.endswith("-start") and kind != "all-reduce":
                size = _start_bytes(instruction, kind)
            if fused == "all-reduce-scatter" and kind == "all-reduce":
                kind = "reduce-scatter"
                size /= group_size(instruction.line, devices)
            group = 2 if kind == "collective-permute" else group_size(instruction.line, devices)
            if group > 1:
                found = Collective(kind, size, group, runs, instruction.op_name)
                if instruction.opcode.endswith("-start"):
                    found.asynchronous = True
                    found.hidden_cycles, found.hidden_kernels = _between(module, instruction)
                elif fusion is not None:
                    found.hidden_cycles = fusion.scheduled
                cost.collectives.append(found)
                spread[key] = found
        elif 'custom_call_target="tpu_custom_call"' in instruction.line:
            cost.kernels.append((*_kernel(instruction), runs))
        elif not fused and (instruction.cycles or instruction.scheduled):
            total = instruction.scheduled * runs
            cost.cycles += instruction.cycles * runs
            cost.scheduled += total
            cost.covered += instruction.cycles * runs if id(instruction) in known else 0
            cost.by_op[instruction.op_name] += total
            cost.by_instruction.append((total, runs, instruction))
    cost.by_instruction.sort(key=lambda x: -x[0])
    return cost


def _kernel(instruction: Instruction) -> tuple[str, tuple[str, ...]]:
    """(name, types of its operands) of a call of a kernel of our own."""
    types = _CONSTRAINTS.search(instruction.line)
    operands = tuple(f"{k}[{n}]" for k, n in _ARRAY.findall(types[1])) if types else ()
    return instruction.name.split(".")[0], operands


def _between(
    module: Module, start: Instruction
) -> tuple[int, tuple[tuple[str, tuple[str, ...]], ...]]:
    """(estimated cycles, kernels of our own) that the schedule has between a collective's start and
    its end; the text of a compiled module lists instructions in their order."""
    body = next(b for b in module.computations.values() if b.get(start.name) is start)
    cycles, kernels, inside = 0, [], False
    for instruction in body.values():
        if inside and instruction.opcode.endswith("-done") and start.name in instruction.operands:
            break
        if inside and 'custom_call_target="tpu_custom_call"' in instruction.line:
            kernels.append(_kernel(instruction))
        elif inside:
            cycles += instruction.scheduled
        inside = inside or instruction is start
    return cycles, tuple(kernels)


def called(instruction: Instruction) -> dict[str, str]:
    """{'calls' | 'body' | 'condition' | 'to_apply': computation} of an instruction."""
    return dict(_CALLED.findall(instruction.line))


def branches(instruction: Instruction) -> list[str]:
    """The computations that a conditional chooses from."""
    names = _TRUE_FALSE.findall(instruction.line)
    for group in _BRANCHES.findall(instruction.line):
        names += [x.strip().lstrip("%") for x in group.split(",")]
    return names


def _start_bytes(instruction: Instruction, kind: str) -> float:
    """Bytes of an asynchronous collective's result: its type is (operands, results, ...)."""
    arrays = [
        type_bytes(f"{k}[{s}]")
        for k, s in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", instruction.type))
    ]
    count = max(1, len(instruction.operands))
    return sum(arrays[count : 2 * count])


def _walk(
    module: Module,
    name: str,
    runs: int,
    cost: Cost,
    fused: str | bool,
    fusion: Instruction | None = None,
) -> Iterator[tuple[Instruction, int, str | bool, Instruction | None]]:
    """(instruction, runs, whether it is fused, the fusion it is in) from a computation down."""
    body = module.computations.get(name, {})
    for instruction in body.values():
        yield instruction, runs, fused, fusion
        called = dict(_CALLED.findall(instruction.line))
        if instruction.opcode == "while":
            trips = module.trip_count(instruction, body)
            if trips is None:
                cost.unknown_loops.append(instruction.name)
                trips = 1
            cost.loops[instruction.name] = trips
            yield from _walk(module, called["body"], runs * trips, cost, fused, fusion)
        elif instruction.opcode == "fusion" and "calls" in called:
            inside = "all-reduce-scatter" if "all-reduce-scatter" in called["calls"] else True
            yield from _walk(module, called["calls"], runs, cost, inside, instruction)
        elif instruction.opcode in ("call", "async-start") and called:
            target = called.get("to_apply") or called.get("calls")
            if target:
                yield from _walk(module, target, runs, cost, fused, fusion)
        elif instruction.opcode == "conditional":
            names = branches(instruction)
            # One branch runs: the costliest stands for it.
            costliest = max(names, key=lambda n: _cycles(module, n))
            yield from _walk(module, costliest, runs, cost, fused, fusion)


def _cycles(module: Module, name: str) -> int:
    return sum(x.cycles for x in module.computations.get(name, {}).values())


def place(op_name: str) -> str:
    """'jit(train_step)/transpose(jvp(CoCa))/.../mlp/in/dot_general' -> 'backward  ...mlp/in'."""
    if "rematted_computation" in op_name:
        kind = "recompute"
    elif "transpose(" in op_name:
        kind = "backward"
    elif "jvp(" in op_name:
        kind = "forward"
    else:
        kind = "update"
    parts = [
        p
        for p in op_name.split("/")
        if p
        not in ("while", "body", "closed_call", "checkpoint", "rematted_computation", "shard_map")
        and not p.startswith(("jit(", "jvp(", "transpose("))
        and "." not in p  # a method of a module
    ]
    return f"{kind:9s} {'/'.join(parts[:-1]) or (parts[-1] if parts else 'other')}"


# Bytes that an instruction of a program reads from the device's memory and writes to it.


PASSED_ON = ("bitcast", "reshape", "get-tuple-element")
SLICES = ("slice", "dynamic-slice", "gather")
_PLACED = re.compile(r"\b([a-z]+\d+\[[\d,]*\])(\{[^{}]*\})?")


def arrays(type_: str) -> list[float]:
    """Bytes of each array of a type; 0 of one that its layout puts elsewhere, as on a TPU in the
    core's own memory (`S(1)`)."""
    found = _PLACED.findall(type_)
    return [0.0 if "S(" in layout else type_bytes(array) for array, layout in found]


def operands(found: Instruction, body: dict[str, Instruction]) -> float:
    """Of all operands, whole."""
    return sum(sum(arrays(body[name].type)) for name in found.operands if name in body)


def of_fusion(module: Module, found: Instruction, body: dict[str, Instruction]) -> float:
    """What a fusion reads and writes: of an operand that it slices, or a result that it updates in
    place, the slice alone."""
    name = called(found)["calls"]
    inner = module.computations[name]
    read = 0.0
    for index, operand in enumerate(found.operands):
        here = sum(arrays(body[operand].type)) if operand in body else 1.0
        parameter = _parameter(inner, index)
        if parameter is not None and here:
            read += min(_read(module, name, parameter), type_bytes(inner[parameter].type))
    written = list(_written(module, name, module.roots[name].name))
    placed = arrays(found.type)
    if len(placed) == len(written):
        written = [n for n, place in zip(written, placed) if place]
    return read + sum(written)


def _parameter(inner: dict[str, Instruction], index: int) -> str | None:
    text = f"parameter({index})"
    return next(
        (x.name for x in inner.values() if x.opcode == "parameter" and text in x.line), None
    )


def _read(module: Module, computation: str, source: str) -> float:
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
            total += type_bytes(user.type)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue
        elif user.opcode == "fusion":
            below = called(user)["calls"]
            parameter = _parameter(module.computations[below], place)
            total += _read(module, below, parameter) if parameter else 0.0
        else:
            return type_bytes(inner[source].type)
    return total


def _written(module: Module, computation: str, name: str) -> Iterator[float]:
    """Of each array of a result inside a computation."""
    inner = module.computations[computation]
    result = inner[name]
    if result.opcode == "tuple":
        for operand in result.operands:
            yield from _written(module, computation, operand)
    elif result.opcode == "bitcast":
        yield from _written(module, computation, result.operands[0])
    elif result.opcode == "dynamic-update-slice":
        yield type_bytes(inner[result.operands[1]].type)
    elif result.opcode == "fusion":
        below = called(result)["calls"]
        yield from _written(module, below, module.roots[below].name)
    else:
        yield type_bytes(result.type)
