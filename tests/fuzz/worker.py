"""The process that reads the inputs: SEED FOLDER."""

from __future__ import annotations

import json
import os
import pathlib
import random
import resource
import shutil
import sys
import time
import traceback
from typing import Any

import kinds

GOOD = 40  # files of a kind, at most, that are read before the first input
SECONDS = 2.0  # of processor time, of one reading
ADDRESSES = 6 << 30  # bytes that may be reserved beside those of the start
ALLOWED = (ValueError, OSError)  # what a command turns into one line
MEMORY = ("MemoryError", "llocate", "bad_alloc")  # an error that says so asked for too much


def outcome(kind: kinds.Kind, path: pathlib.Path) -> tuple[str, str, str]:
    """(what the reader gives or refuses, its first word, a finding or '')."""
    try:
        found = kind.run(path)
        return found, found.split(":")[0][:40], ""
    except ALLOWED as error:
        text = f"{type(error).__name__}: {error}"
        wrong = "memory: " + text[:200] if any(word in text for word in MEMORY) else ""
        return text, "refused", wrong
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [one for one in frames if f"{os.sep}coca_jax{os.sep}" in one.filename] or frames
        where = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}"
        text = f"{type(error).__name__}: {error}"[:300]
        if isinstance(error, MemoryError):
            return text, "memory", f"memory: at {where}: {text}"
        return text, "traceback", f"traceback at {where}: {text}"


def read(kind: kinds.Kind, path: pathlib.Path, memory: float) -> dict[str, Any]:
    """Reads an input twice and says how it went."""
    seconds, finding, word = 0.0, "", ""
    texts = []
    for _ in range(2):
        began = time.process_time()
        text, word, wrong = outcome(kind, path)
        seconds = max(seconds, time.process_time() - began)
        finding = finding or wrong
        texts.append(text)
    mib = peak() - memory
    if seconds > SECONDS:
        finding = finding or f"took {seconds:.1f} s of processor time"
    if mib > kind.mib:
        finding = finding or f"memory: {mib:.0f} MiB, bound {kind.mib}"
    if texts[0] != texts[1]:
        finding = finding or f"differs: {texts[0][:150]!r}, then {texts[1][:150]!r}"
    return dict(finding=finding, outcome=word, seconds=seconds, mib=mib)


def peak() -> float:
    """The most memory that this process has had, in MiB; getrusage tells its parent's too."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def prepare(name: str, folder: pathlib.Path) -> tuple[list[bytes], float]:
    """The good files of a kind, each read once, for what libraries set up once is neither slow nor
    large later, or where there are hundreds, some of them; and the memory after that, in MiB."""
    folder.mkdir()
    os.chdir(folder)
    kinds.surroundings(folder)
    kind = kinds.load(name)
    seeds = kind.seeds()
    for one in seeds[:: 1 + len(seeds) // GOOD]:
        (folder / "input").write_bytes(one)
        outcome(kind, folder / "input")
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + ADDRESSES, hard))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # what `peak` tells begins anew
    return seeds, peak()


def main() -> None:
    """Answers each line `KIND NUMBER` with one of JSON, on a channel that nothing else writes."""
    seed, top = sys.argv[1], pathlib.Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepared: dict[str, tuple[list[bytes], float]] = {}
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        name, number = line.split()
        kind, path = kinds.load(name), top / name / "input"
        if name not in prepared:
            prepared[name] = prepare(name, path.parent)
        seeds, memory = prepared[name]
        os.chdir(path.parent)
        rng = random.Random(f"{name} {seed} {number}")
        path.write_bytes(kind.mutate(rng, rng.choice(seeds)))
        found = read(kind, path, memory)
        if found["finding"]:
            shutil.copy(path, top / f"kept-{name}-{number}")
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
