"""What a run says about itself: metrics.jsonl, trackers, the progress bar, where time went.

Only the process that owns the workdir (process 0) makes a `MetricWriter` or a `Progress`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO

import tqdm

from coca_jax.runtime import growing_file, storage

BUCKETS = ("init", "compile", "data_wait", "step", "eval", "save")
TRAINING = ("data_wait", "step")  # what a step is made of, once it is compiled


class Tracker(Protocol):
    """A place for metrics. Its package is imported when it is made."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step; values may be NaN or infinite."""

    def flush(self) -> None:
        """Returns when what was written is where it belongs, as far as that can be waited for."""

    def close(self) -> None:
        """Nothing is written afterwards."""


class TimeBuckets:
    """Wall-clock seconds by what the program was doing.

    `with buckets("data_wait"): ...` adds to a bucket. Buckets exclude each other: time in an inner
    one is not counted in the outer one, so their sum never exceeds the time that passed.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(BUCKETS, 0.0)
        self._taken = dict.fromkeys(BUCKETS, 0.0)
        self._processor = self._processor_taken = self._processor_since = 0.0
        self._open: list[str] = []
        self._since = 0.0
        self.born = time.perf_counter()
        self.changes = 0  # how often a bucket began or ended: a run that goes on changes

    @property
    def now(self) -> str:
        """The bucket that time goes to, '' outside of all. Any thread may ask."""
        return (self._open[-1:] or [""])[0]

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time inside the block to `name`; ValueError unless it is one of BUCKETS."""
        if name not in self._seconds:
            raise ValueError(f"time bucket is {name!r}; use one of {', '.join(BUCKETS)}")
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        now, processor = time.perf_counter(), time.process_time()
        self.changes += 1
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
            if self._open[-1] in TRAINING:
                self._processor += processor - self._processor_since
        self._since, self._processor_since = now, processor

    def seconds(self, name: str) -> float:
        """Seconds of one bucket since the start."""
        self._settle()
        return self._seconds[name]

    def total(self) -> dict[str, float]:
        """Returns {'data_wait_seconds': ..., ...} since the start."""
        self._settle()
        return {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}

    def take(self) -> dict[str, float]:
        """Returns the seconds since the last `take`: what one line of metrics.jsonl holds."""
        self._settle()
        new = {f"{name}_seconds": s - self._taken[name] for name, s in self._seconds.items()}
        self._taken = dict(self._seconds)
        return new

    def take_processor(self) -> float:
        """Returns the seconds of processor time, of all threads of this process, that passed in
        steps and in waiting for data since the last `take_processor`."""
        self._settle()
        new = self._processor - self._processor_taken
        self._processor_taken = self._processor
        return new


class MetricWriter:
    """Appends one JSON object a logged step to `workdir`/metrics.jsonl, and tells the trackers.

    Args:
      workdir: made when missing.
      start_step: the step that the run starts or resumes from. Lines of later steps, left by a run
        that was stopped after its last checkpoint, are dropped: each step occurs once.
      trackers: see training/trackers.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        start_step: int = 0,
        trackers: Sequence[Tracker] = (),
    ):
        folder = storage.place(workdir)
        path = folder / "metrics.jsonl"
        self._file = growing_file.Growing(path, keep=_bytes_until(path, start_step))
        self._trackers = list(trackers)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; values are numbers. NaN and infinity, which JSON lacks, become null."""
        numbers = {name: float(value) for name, value in values.items()}
        row = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._file.write((json.dumps({"step": int(step), **row}) + "\n").encode())
        for tracker in self._trackers:
            tracker.write(int(step), numbers)

    def flush(self) -> None:
        """Returns when all lines are in the files: in a bucket, `write` alone may hold some back
        for minutes. Call it before a checkpoint of the same step."""
        self._file.flush()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, or []; skips a line cut off in writing."""
    return list(rows(workdir))


def rows(workdir: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """As `read_metrics`, one line after the other: of a million all take gigabytes."""
    path = storage.place(workdir) / "metrics.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    yield row


def _bytes_until(path: Any, step: int) -> int:
    """Length of the file up to the first line of a later step, or that was cut off in writing."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        length += len(line)
    return length


class Progress:
    """The progress of training on standard error: a bar on a terminal, else a line an update.

    Args:
      total_steps: where the run ends.
      start_step: where it starts or resumes.
      pairs: how many the batches before a step hold, by the step; None: one each.
      enabled: False on all processes but one.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        pairs: Callable[[int], int] | None = None,
        enabled: bool = True,
        file: TextIO | None = None,
    ):
        self._file = sys.stderr if file is None else file
        self._total, self._enabled = total_steps, enabled
        self._pairs = pairs or (lambda step: step)
        self._step, self._time = start_step, time.perf_counter()
        self._pace = 0.0  # seconds a step at the last update
        self._compiled: set[int] = set()  # steps that are not shown yet
        self._compiling = 0.0  # seconds since the last update
        self._bar = None
        if enabled and self._file.isatty():
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                file=self._file,
                dynamic_ncols=True,
            )

    def update(
        self,
        step: int,
        losses: Mapping[str, float],
        data_wait_seconds: float,
        *,
        at_once: bool = False,
    ) -> float:
        """Shows a step; returns pairs per second since the last update.

        `losses` are shown by name; `data_wait_seconds` is the time since the last update that the
        device had nothing to do because the input was late. at_once: the last update is of the
        step before and came a step late, with the time of this one; its steps took no less.
        """
        now = time.perf_counter()
        seconds, steps = max(now - self._time, 1e-9), step - self._step
        pairs = self._pairs(step) - self._pairs(self._step)
        own = [n for n in self._compiled if n <= step]
        if known := len(own) < steps:  # else nothing but the compiled steps could tell a rate
            seconds = max(seconds - self._compiling, 1e-9)
            steps -= len(own)
            pairs -= sum(self._pairs(n) - self._pairs(n - 1) for n in own)
        if at_once:
            seconds = max(seconds, self._pace * steps)
        self._pace = seconds / max(steps, 1)
        rate = pairs / seconds
        self._step, self._time, self._compiling = step, now, 0.0
        self._compiled = {n for n in self._compiled if n > step}
        if not self._enabled:
            return rate
        shown = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
        shown += f" | {rate:,.0f} pairs/s | waiting for data {data_wait_seconds / seconds:.0%}"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            left = (self._total - step) * seconds / max(steps, 1)
            share = step / max(self._total, 1)
            eta = tqdm.tqdm.format_interval(left)
            line = f"step {step}/{self._total} ({share:.0%}) {shown}"
            line += f" | {eta} left" if known else ""
            print(line, file=self._file, flush=True)
        return rate

    def compiled(self, step: int, seconds: float) -> None:
        """The program of `step`, which is not shown yet, was compiled in that time: neither is of
        the rate, where other steps tell one."""
        self._compiled.add(step)
        self._compiling += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside, of an evaluation that trains nothing, is none of the rate's."""
        begin = time.perf_counter()
        yield
        self._time += time.perf_counter() - begin

    def write(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            tqdm.tqdm.write(text, file=self._file)
        elif self._enabled:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
