"""Fuzzing: damaged and hostile inputs by the thousand, each read in a worker that is watched.

    python tests/fuzz/run.py images --count=2000        # one kind of input, or several
    python tests/fuzz/run.py all --count=500 --seed=7   # so many of each kind
    python tests/fuzz/run.py tars --only=812 --seed=7 --save=found   # one input again, kept

Every input is a function of kind, seed and number. It is read twice, and it must end in what the
reader gives, or in one of the errors that a command turns into a line. A finding is anything else:
another exception, more than 2 s of processor time or 30 s of any, memory above the kind's bound, a
worker that dies, or two readings that differ. Findings are listed with their numbers, and the exit
status is 1; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
WAIT_SECONDS, START_SECONDS = 30.0, 600.0
AHEAD = 32  # inputs that a worker is asked for at a time: on a busy machine it waits for nobody


class Worker:
    """A process that reads inputs, and that is started again when it has died."""

    def __init__(self, seed: int):
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self._scratch.name)
        self._said = tempfile.TemporaryFile()
        command = [sys.executable, str(HERE / "worker.py"), str(seed), str(self.folder)]
        paths = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._said, env=env
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._known: set[str] = set()
        self._gone = False
        self._kept = b""  # answers that were not asked for yet
        if self.answer() is None:  # else it has imported what all need
            self._said.seek(0)
            text = self._said.read()[-2000:].decode(errors="replace")
            self.end()
            raise RuntimeError(f"the worker did not start: {text}")

    def answer(self, kind: str = "") -> dict[str, Any] | None:
        """What the worker says next; None where it says nothing in time or has died. At its start
        and before the first input of a kind it has more time: it imports and makes the good files.
        """
        seconds = WAIT_SECONDS if kind in self._known else START_SECONDS
        self._known.add(kind)
        begin, waited = time.monotonic(), self._waited()
        while b"\n" not in self._kept:
            left = begin + seconds + self._waited() - waited - time.monotonic()
            if left <= 0:
                return None
            if not self._selector.select(left):
                continue  # a busy machine may have kept it from running: that does not count
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                self._gone = True
                return None
            self._kept += data
        line, _, self._kept = self._kept.partition(b"\n")
        return json.loads(line)

    def _waited(self) -> float:
        """Seconds that the worker was ready to run and had no processor."""
        with contextlib.suppress(OSError):  # it has died
            known = pathlib.Path(f"/proc/{self._process.pid}/schedstat").read_text().split()
            return int(known[1]) / 1e9
        return 0.0

    def ask(self, kind: str, number: int) -> None:
        """Asks for an input to be read; `answer` tells of one after the other."""
        with contextlib.suppress(BrokenPipeError):  # it has died: the next answer is None
            self._process.stdin.write(f"{kind} {number}\n".encode())
            self._process.stdin.flush()

    def input_of(self, kind: str, number: int) -> bytes:
        """An input that gave a finding, or the last one."""
        kept = self.folder / f"kept-{kind}-{number}"
        return (kept if kept.exists() else self.folder / kind / "input").read_bytes()

    def end(self) -> str:
        """Kills the worker; how it had ended before, '' where it ran."""
        try:
            status = self._process.wait(10 if self._gone else 0.2)
        except subprocess.TimeoutExpired:
            status = None
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").splitlines() or [""]
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        self._said.close()
        self._scratch.cleanup()
        if status is None:
            return ""
        return signal.Signals(-status).name if status < 0 else f"status {status}: {said[-1][:200]}"


@dataclasses.dataclass
class Account:
    """What was found of a kind: see `--help`; the worst of one reading, memory above the start."""

    kind: str
    inputs: int = 0
    findings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    worst_seconds: float = 0.0
    worst_mib: float = 0.0

    def note(self, found: dict[str, Any] | None) -> str:
        """Counts an answer of the worker; the finding, '' for none or where there is no answer."""
        self.inputs += 1
        if found is None:
            return ""
        self.outcomes[found["outcome"]] += 1
        self.worst_seconds = max(self.worst_seconds, found["seconds"])
        self.worst_mib = max(self.worst_mib, found["mib"])
        return found["finding"]


def fuzz(
    kinds: Sequence[str], numbers: range, seed: int, save: str = "", seconds: float = float("inf")
) -> Iterator[Account]:
    """Reads inputs of some kinds, one kind after the other, and tells of each; of a kind as many as
    are read in so many seconds."""
    worker = Worker(seed)
    for kind in kinds:
        account, end = Account(kind), time.monotonic() + seconds
        asked: collections.deque[int] = collections.deque()  # the worker need not wait for us
        rest = iter(numbers)
        while True:
            while len(asked) < AHEAD and time.monotonic() <= end:
                number = next(rest, None)
                if number is None:
                    break
                worker.ask(kind, number)
                asked.append(number)
            if not asked:
                break
            number = asked.popleft()
            found = worker.answer(kind)
            what = account.note(found)
            if save and (found is None or what or len(numbers) == 1):
                os.makedirs(save, exist_ok=True)
                place = pathlib.Path(save) / f"{kind}-{seed}-{number}"
                place.write_bytes(worker.input_of(kind, number))
            if found is None or what.startswith("memory"):
                ended = worker.end()
                if found is None:
                    what = f"died: {ended}" if ended else f"no answer in {WAIT_SECONDS:.0f} s"
                worker = Worker(seed)
                for later in asked:
                    worker.ask(kind, later)
            if what:
                account.findings.append(dict(number=number, what=what))
        yield account
    worker.end()


def main() -> int:
    """The command."""
    sys.path.insert(0, str(HERE))
    from kinds import NAMES

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=[*NAMES, "all"], metavar="KIND")
    parser.add_argument("--count", type=int, default=200, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first input's number")
    parser.add_argument("--only", type=int, help="this one input")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each kind")
    parser.add_argument("--save", default="", help="folder for the inputs of findings")
    given = parser.parse_args()
    numbers = range(given.start, given.start + given.count)
    if given.only is not None:
        numbers = range(given.only, given.only + 1)
    results, began = [], time.monotonic()
    usual = [name for name in NAMES if name != "broken"]
    kinds = usual if "all" in given.kinds else given.kinds
    for found in fuzz(kinds, numbers, given.seed, given.save, given.seconds):
        for finding in found.findings:
            print(f"{found.kind} {finding['number']}: {finding['what']}", file=sys.stderr)
        results.append(vars(found))
        print(
            f"{found.kind:12s} {found.inputs:7d} inputs {len(found.findings):4d} findings "
            f"{found.worst_seconds:7.2f} s {found.worst_mib:7.0f} MiB "
            f"after {time.monotonic() - began:.0f} s",
            flush=True,
        )
    print(json.dumps(results))
    return int(any(found["findings"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
