"""Goodput: what share of the time since a run's first start went to steps that count.

The rest went to compilation, waits for data, saves, evaluation, start-up, steps that were lost and
trained again, and to nothing at all while the run was down. `goodput.json` in the workdir carries
the sums over restarts. Gaps between two starts on one machine are taken from its clock since boot,
so a wall clock that jumps does not count; elsewhere from the wall clock.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import random
import time
from collections.abc import Mapping
from typing import Any

from coca_jax.runtime import storage
from coca_jax.runtime.metric_log import BUCKETS, TimeBuckets

FILE = "goodput.json"
PARTS = (*BUCKETS, "lost", "down", "other")  # 'step' being what counts
WRITE_EVERY, BUCKET_EVERY = 5.0, 60.0  # seconds between two writes, on a disk and in a bucket


def clocks() -> dict[str, Any]:
    """This moment by the wall clock and, where there is one, by the clock since this boot."""
    found: dict[str, Any] = {"wall": time.time(), "boot": "", "since_boot": 0.0}
    with contextlib.suppress(OSError, AttributeError):
        found["boot"] = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["since_boot"] = time.clock_gettime(time.CLOCK_BOOTTIME)
    return found


def between(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Seconds between two results of `clocks`, never below 0."""
    same = before["boot"] and before["boot"] == after["boot"]
    clock = "since_boot" if same else "wall"
    return max(0.0, after[clock] - before[clock])


def process_age() -> float:
    """Seconds since this process started; 0 where the machine does not say."""
    try:
        ticks = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return 0.0


_counted_imports = False  # of several runs of a process, the first one has its imports


def age_before(buckets: TimeBuckets) -> float:
    """Seconds of this process before `buckets` was made: imports. 0 but for its first run."""
    global _counted_imports
    first, _counted_imports = not _counted_imports, True
    return max(0.0, process_age() - (time.perf_counter() - buckets.born)) if first else 0.0


def fold(former: Mapping[str, Any] | None, start: int, down: float) -> dict[str, float]:
    """{part: seconds} of all earlier starts of a run.

    Args:
        former: goodput.json as the last of them left it, None for a new run.
        start: the step that the run goes on from. Steps after it are lost.
        down: seconds in which nothing ran.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    if former is None:
        return parts
    for name in PARTS:
        parts[name] = former["parts"].get(name, 0.0) + former["life"]["seconds"].get(name, 0.0)
    parts["down"] += down
    first, last = former["life"]["first_step"], former["life"]["step"]
    if last > start:
        own, earlier = former["life"]["seconds"].get("step", 0.0), former["parts"].get("step", 0.0)
        lost = own * (last - max(first, start)) / (last - first) if last > first else 0.0
        if start < first:
            lost += _behind(earlier, first, start)
        parts["step"] -= lost
        parts["lost"] += lost
    return parts


def _behind(seconds: float, first: int, start: int) -> float:
    """Of the seconds that earlier starts took up to step `first`, those after `start`."""
    return seconds * (first - start) / first


class Goodput:
    """The sums of a run, kept by process 0.

    Args:
        workdir: of the run.
        buckets: where the time of this start goes.
        start: the step that it goes on from.
        before: seconds of this process before `buckets` was made, which count as start-up.
        write: whether to keep goodput.json: False on all processes but one.
    """

    def __init__(
        self,
        workdir: str,
        buckets: TimeBuckets,
        start: int,
        *,
        before: float = 0.0,
        write: bool = True,
    ):
        self._path = storage.place(workdir) / FILE
        self._buckets, self._start, self._step, self._before = buckets, start, start, before
        self._every = BUCKET_EVERY if storage.is_remote(self._path) else WRITE_EVERY
        self._written, self._write = float("-inf"), write
        self.seconds_to_first_step: float | None = None
        self._lost = 0.0
        self._former = former = self._read() if write else None
        down = max(0.0, between(former["at"], clocks()) - self._elapsed()) if former else 0.0
        self._parts = fold(former, start, down)
        self._starts = former["starts"] + 1 if former else 1

    def _read(self) -> dict[str, Any] | None:
        """What the last start left; a file that is not whole counts as none."""
        try:
            found = json.loads(self._path.read_text())
            fold(found, 0, 0.0), found["starts"], found["at"]["boot"], found["at"]["wall"]
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _elapsed(self) -> float:
        return self._before + time.perf_counter() - self._buckets.born

    def _seconds(self) -> dict[str, float]:
        """Of this start, by part."""
        found = {name: self._buckets.seconds(name) for name in BUCKETS}
        found["init"] += self._before
        found["step"] -= self._lost
        found["other"] = max(0.0, self._elapsed() - self._lost - sum(found.values()))
        found["lost"] = self._lost
        return found

    def go_back(self, step: int) -> None:
        """The run goes back to `step`: what was trained after it is lost."""
        done = self._step - self._start
        if done > 0:
            share = (self._step - max(step, self._start)) / done
            self._lost += share * (self._buckets.seconds("step") - self._lost)
        if step < self._start:  # and of what earlier starts trained
            lost = _behind(self._parts["step"], self._start, step)
            self._parts["step"] -= lost
            self._parts["lost"] += lost
        self._start = min(self._start, step)
        self._step = step

    def first_step(self) -> None:
        """To be called when a step is done: notes how long the first one of this start took."""
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = self._elapsed()

    def shares(self) -> dict[str, float]:
        """{'goodput': share of the time since the first start that went to steps that count,
        'time/compile': ..., and so on for PARTS}; they add up to 1. Of a start that has trained
        nothing, those of the starts before."""
        here = self._seconds()
        sums = {name: self._parts[name] + here.get(name, 0.0) for name in PARTS}
        if self._former is not None and self.seconds_to_first_step is None:
            sums = fold(self._former, self._start, 0.0)  # a finished run, started again
        total = max(sum(sums.values()), 1e-9)
        shares = {f"time/{name}": sums[name] / total for name in PARTS if name != "step"}
        return {"goodput": sums["step"] / total} | shares

    def note(self, step: int, *, now: bool = False) -> None:
        """Notes that `step` is done; writes the file where the last time is long ago, or `now`."""
        self._step = step
        if not self._write or self.seconds_to_first_step is None:  # nothing was trained
            return
        if not now and time.monotonic() - self._written < self._every:
            return
        self._written = time.monotonic()
        life = dict(seconds=self._seconds(), first_step=self._start, step=step)
        data = dict(starts=self._starts, parts=self._parts, life=life, at=clocks())
        with contextlib.suppress(OSError):  # a full disk: the next one writes all of it
            storage.write_text(self._path, json.dumps(data, indent=1) + "\n")

    def close(self) -> None:
        """Writes the file."""
        self.note(self._step, now=True)

    def summary(self) -> dict[str, Any]:
        """What the last line of a run says: goodput, restarts, seconds to the first step."""
        found: dict[str, Any] = {"goodput": round(self.shares()["goodput"], 4)}
        trained = self.seconds_to_first_step is not None
        found["restarts"] = self._starts - 1 - (self._former is not None and not trained)
        if self.seconds_to_first_step is not None:
            found["seconds_to_first_step"] = round(self.seconds_to_first_step, 1)
        return found


# How often to save, and what share of its time a run that fails now and then has left for steps.
#
# Failures come independently of each other (exponential times between them, memoryless). The formulas
# are Daly's, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006);
# `simulate` plays the same run out, and the tests compare the two.


# Llama 3 405B: 419 unexpected interruptions of 2,048 hosts of 8 GPUs in 54 days (Grattafiori et al.
# 2024, section 3.3.4): a host fails every 6,335 hours.
HOST_HOURS = 2048 * 54 * 24 / 419


def best_interval(save: float, between: float) -> float:
    """Seconds of training between two saves that waste the least time (Daly, equation 37); Young's
    sqrt(2 save between) is its first term.

    save: seconds that a save holds the steps up, above 0. between: mean seconds between failures.
    """
    if save >= 2 * between:
        return between
    ratio = save / (2 * between)
    return math.sqrt(2 * save * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def expected(interval: float, save: float, restart: float, between: float) -> float:
    """The share of time that steps have which are not lost (Daly, equation 20).

    interval: seconds of training between two saves. restart: seconds from a failure to the first
    step after it, which may fail as well. All else as in `best_interval`.
    """
    exponent = (interval + save) / between
    if exponent + restart / between > 700:
        return 0.0
    return interval / (between * math.exp(restart / between) * math.expm1(exponent))


def simulate(
    interval: float, save: float, restart: float, between: float, *, saves: int, seed: int = 0
) -> float:
    """`expected` as it came out in one run of so many saves, failure by failure."""
    draw = random.Random(seed)
    total, next_failure = 0.0, draw.expovariate(1 / between)
    for _ in range(saves):
        while next_failure < interval + save:
            total += next_failure
            while (next_failure := draw.expovariate(1 / between)) < restart:
                total += next_failure
            total += restart
            next_failure -= restart
        total += interval + save
        next_failure -= interval + save
    return saves * interval / total


def estimate(hosts: int, host_hours: float, save: float, restart: float) -> dict[str, Any]:
    """What to expect of a run on so many hosts: {'hours_between_failures', 'checkpoint_seconds',
    'expected_goodput', 'simulated_goodput'}.

    host_hours: mean hours between failures of one host. save, restart: seconds.
    """
    between = host_hours * 3600 / hosts
    interval = best_interval(save, between)
    goodput = expected(interval, save, restart, between)
    result = dict(
        hosts=hosts,
        hours_between_failures=between / 3600,
        checkpoint_seconds=interval,
        expected_goodput=goodput,
    )
    if goodput > 0.01:  # else the simulation does not come to an end
        result["simulated_goodput"] = simulate(interval, save, restart, between, saves=20_000)
    return result
