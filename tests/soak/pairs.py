"""Kills and stops one of several processes of a run under launch/local.sh; see kills.py."""

from __future__ import annotations

import collections
import os
import pathlib
import random
import signal
import time
from typing import Any

import kills

BOUND = 150.0  # seconds from a kill or a stop to the first new step, by heartbeat, ABORT and start


def together(workdir: pathlib.Path, steps: int, processes: int) -> list[str]:
    """The command of a training of several processes."""
    launcher = str(kills.ROOT / "launch" / "local.sh")
    return ["bash", launcher, str(processes), "--", *kills.train(workdir, steps)]


def processes_of(launcher: int) -> dict[int, int]:
    """{number of the process in the run: its process id} of a launcher's children."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        for word in words if int(parent) == launcher else ():
            if word.startswith(b"--process_id="):
                found[int(word.split(b"=")[1])] = int(folder.name)
    return found


def kill(
    work: pathlib.Path,
    count: int,
    stops: int,
    rng: random.Random,
    steps: int,
    processes: int,
    end: float,
) -> dict[str, Any]:
    """All kills and stops of one training, or those until `end`, and how it ended."""
    env = kills.environment(work) | {"RESTARTS": "1000", "PAUSE": "0", "ABORT": "5"}
    life = kills.Life(together(work / "killed", steps, processes), env)
    kinds = ["SIGKILL"] * count + ["SIGSTOP"] * stops
    rng.shuffle(kinds)
    counts: collections.Counter[str] = collections.Counter()
    seconds: list[float] = []
    restarts: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
    problems: list[str] = []
    for number, name in enumerate(kinds):
        in_start_up = number > 0 and rng.random() < 0.25
        if time.monotonic() > end:
            break
        if in_start_up:  # the launcher has just started both again
            wanted = lambda line: "starting JAX" in line  # noqa: E731
        else:
            wanted = kills.step_of
        for _ in range(1 if in_start_up else rng.randint(1, 2 * kills.EVERY)):
            begun = life.wait_for(wanted)
        if not begun:
            break
        time.sleep(rng.uniform(0, 0.3 if wanted is kills.step_of else 3.0))
        found = processes_of(life.process.pid)
        victim = rng.randrange(processes)
        if victim not in found:
            continue  # it has just ended
        sent, seen = time.monotonic(), len(life.lines)
        os.kill(found[victim], getattr(signal, name))
        life._seen = seen
        if not life.wait_for(lambda line: "starting it again" in line):
            problems.append(f"{name} of process {victim}: not started again: {life.text()}")
            break
        again = time.monotonic() - sent
        counts[f"{name}{' in start-up' if in_start_up else ''}"] += 1
        restarts[name].append(again)
        if not in_start_up:
            before = life._seen
            if not life.wait_for(kills.step_of):
                break
            took = time.monotonic() - sent
            seconds.append(took)
            life._seen = before
            if took > BOUND:
                problems.append(f"{name} of process {victim}: {took:.0f} s to the next step")
        kills.say(f"{number} {name} of process {victim}: both start again after {again:.0f} s")
    status = life.end(limit=3600)
    if status != 0:
        problems.append(f"the launcher ended with {status}: {life.text()}")
    found = dict(kills=sum(counts.values()), by=dict(counts), problems=problems, seconds=seconds)
    return found | dict(restarts=restarts)
