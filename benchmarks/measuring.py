"""What a measurement of rows of docs/results.json is, and what it is given.

figure_rows.py says which there are. How: measuring_parts.py (counts, memory, times of parts beside
other programs), measuring_runs.py (trained models), measuring_faults.py (kills, damage, servers),
measuring_compiled.py (compilers' estimates). Nearly all call commands of this package in processes
of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
MIB, GIB = 2**20, 2**30
SEEDS = (0, 1, 2)
Values = dict[str, float]
Rows = dict[str, Values]


@dataclasses.dataclass(frozen=True)
class Given:
    """folder: the recipes find their `data/` there; runs: where runs of this commit stay, so that
    they go on. Beside it lies what is the same for all commits."""

    folder: pathlib.Path
    runs: pathlib.Path

    def python(self, *words: str, one_core: bool = False, **more: str) -> str:
        """What this Python prints with these arguments; more: environment. Raises RuntimeError with
        the last line of each of its outputs if it fails: a script may print what it found."""
        command = [sys.executable, *words]
        if one_core:
            command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
        done = subprocess.run(
            command, env=environment(**more), cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            outputs = filter(None, (done.stderr.strip(), done.stdout.strip()))
            said = " | ".join(text.splitlines()[-1] for text in outputs)
            raise RuntimeError(f"{' '.join(words[:4])}: status {done.returncode}: {said}")
        return done.stdout

    def script(self, name: str, *words: str, one_core: bool = False) -> Any:
        """What a script of this folder, or of tests/, prints at last, read as JSON."""
        path = HERE / name if (HERE / name).exists() else ROOT / name
        return json.loads(self.python(str(path), *words, one_core=one_core).splitlines()[-1])

    def coca(self, *words: str, one_core: bool = False, **more: str) -> dict[str, Any]:
        """What a command prints at last: its result."""
        told = self.python("-m", "coca_jax", *words, one_core=one_core, **more)
        return json.loads(told.splitlines()[-1])

    @property
    def drawn(self) -> pathlib.Path:
        """Where drawn pictures stay."""
        return self.runs.parent / "pictures"

    def demo(self) -> pathlib.Path:
        """A run of the demo, of whichever commit, to serve or to search with; trained unless it is
        there."""
        run = self.runs.parent / "demo"
        if not (run / "eval.json").exists():
            self.coca("train", "--config=demo", f"--workdir={run}")
        return run


def environment(**more: str) -> dict[str, str]:
    """That of a process which finds this package."""
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    return {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def children() -> float:
    """Seconds of cores that all processes took which this one started and which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What `run` gives: these rows. minutes of two cores, about; how: measured, or estimated by a
    compiler; more: what else stands in each row (unit, seeds, peer); clock: whether other work on
    the machine would be measured with it. higher, lower: patterns of keys, or of row:key, of which
    more is better, and less; slack: the share by which a value without an interval may be worse."""

    rows: tuple[str, ...]
    run: Callable[[Given], Rows]
    minutes: float
    command: str
    how: str = "measured"
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    clock: bool = False
    higher: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()
    slack: float = 0.03

    @property
    def quick(self) -> bool:
        return self.minutes <= 3
