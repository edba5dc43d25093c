"""Cycles of each instruction of a program by the TPU compiler's own schedule of its bundles.

A core runs one bundle of instructions a cycle, so bundles times the trips of the loops around them
are what the schedule takes, where it waits for nothing. libtpu writes the bundles out when its
environment asks for it before it is loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from coca_jax.estimate import hlo

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
