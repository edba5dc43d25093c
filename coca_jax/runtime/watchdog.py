"""A run that hangs is ended with the status that starts it again, and says what it hung in.

A thread looks whether the run changes what it does: a step, a wait for data, a save (TimeBuckets
counts the changes, so nothing is added to a step); in work that has no steps, whether it gets on
with its parts (`activity.alive`). Where Python itself is stuck, in C code that does not release it,
faulthandler's own thread writes the stacks to standard error and ends the process with status 1,
the only one that it has: launchers count that as a failure.
"""

from __future__ import annotations

import faulthandler
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from coca_jax.runtime import activity, signals, storage
from coca_jax.runtime.metric_log import TimeBuckets

LONG = ("init", "compile", "eval")  # one change of these may take minutes or hours by itself
LONGER = 10  # times the bound of a step
WARN = 60.0  # seconds after which a step, a wait or a save is said to be slow
WRITE = 20.0  # seconds that writing the stacks may take
STUCK = 30.0  # seconds more after which Python itself counts as stuck

DOING = {
    "init": "starting up",
    "compile": "compiling",
    "data_wait": "waiting for data",
    "step": "in a step",
    "eval": "evaluating",
    "save": "saving",
    "": "between two steps",
}


class Watchdog:
    """From `start` to `close`, ends the process when the run stands still for `seconds`.

    Ten times as long in start-up, compilation and evaluation, which have no steps; there a part of
    the work that is done, as a batch of images, is a change too.

    Args:
        workdir: where the stacks of all threads go, as hang_TIME_PROCESS.txt.
        buckets: by which the run says what it does.
        seconds: without a change; 0: no bound.
        process: its number in the run.
        say: takes a line for people.
        end: ends the process with a line and a status.
        warn: seconds after which a line says what the run waits for.
    """

    def __init__(
        self,
        workdir: str,
        buckets: TimeBuckets,
        seconds: float,
        *,
        process: int = 0,
        say: Callable[[str], Any] = signals.say,
        end: Callable[[str, int], Any] = signals.leave,
        warn: float = WARN,
    ):
        self._workdir, self._buckets, self._seconds = workdir, buckets, seconds
        self._process, self._say, self._end, self._warn = process, say, end, warn
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        if self._seconds:
            self._thread.start()

    def close(self) -> None:
        """Looks no more."""
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause = min(2.0, self._seconds / 10, self._warn / 4)
        before, since, warned = self._seen(), time.monotonic(), False
        while not self._closed.wait(pause):
            now, doing = time.monotonic(), self._buckets.now
            bound = self._seconds * (LONGER if doing in LONG else 1)
            # Says it without Python's help where this thread gets no turn for so long.
            faulthandler.dump_traceback_later(bound + STUCK, exit=True, file=2)
            if (seen := self._seen()) != before:
                if warned:
                    self._say(f"going on after {now - since:.0f} s")
                before, since, warned = seen, now, False
            elif now - since >= bound:
                self._leave(doing, now - since)
                return
            elif now - since >= self._warn and not warned and doing not in LONG:
                warned = True
                self._say(f"warning: no step for {self._what(doing, now - since)}")

    def _seen(self) -> tuple[int, int]:
        """What moves while the run does. In steps, saves and waits threads may read on that no
        longer serve them: parts of work do not count there."""
        long = self._buckets.now in LONG
        return self._buckets.changes, activity.parts() if long else 0

    def _what(self, doing: str, seconds: float) -> str:
        text = f"{seconds:.0f} s, {DOING[doing]}"
        named = [f"{name} for {took:.0f} s" for name, took in activity.under_way()]
        return f"{text}: {', '.join(named[:4])}" if named else text

    def _leave(self, doing: str, seconds: float) -> None:
        what = self._what(doing, seconds)
        name = f"hang_{time.strftime('%Y%m%d_%H%M%S')}_{self._process}.txt"
        path = storage.place(self._workdir) / name
        head = f"nothing happened for {what}\n\n"
        with tempfile.NamedTemporaryFile("w+") as file:
            file.write(head)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            stacks = pathlib.Path(file.name).read_text()
        written = threading.Event()

        def write() -> None:
            storage.write_text(path, stacks)
            written.set()

        threading.Thread(target=write, daemon=True).start()  # what hangs may be this very disk
        if not written.wait(WRITE):
            self._say(stacks)
        where = f"in {path}" if written.is_set() else "above"
        self._end(
            f"nothing happened for {what}; the stacks of all threads are {where}; {signals.AGAIN}",
            signals.EXIT_AGAIN,
        )
