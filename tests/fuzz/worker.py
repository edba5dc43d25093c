"""The process that reads the inputs: SEED FOLDER KIND...."""

from __future__ import annotations

import json
import os
import pathlib
import random
import resource
import sys
import time
import traceback
from typing import Any

import kinds

SECONDS = 2.0  # of processor time, of one reading
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


def main() -> None:
    """Answers each line `KIND NUMBER` with one of JSON, on a channel that nothing else writes."""
    seed, top, *names = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    seeds: dict[str, list[bytes]] = {}
    for name in names:
        folder = pathlib.Path(top) / name
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        kinds.surroundings(folder)
        seeds[name] = kinds.load(name).seeds()
        for one in seeds[name]:  # what libraries set up once is neither slow nor large later
            (folder / "input").write_bytes(one)
            outcome(kinds.load(name), folder / "input")
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGESIZE") + (6 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    memory = peak()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        name, number = line.split()
        kind, path = kinds.load(name), pathlib.Path(top) / name / "input"
        os.chdir(path.parent)
        rng = random.Random(f"{name} {seed} {number}")
        path.write_bytes(kind.mutate(rng, rng.choice(seeds[name])))
        print(json.dumps(read(kind, path, memory)), file=answers, flush=True)


if __name__ == "__main__":
    main()
