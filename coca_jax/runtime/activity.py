"""What this process waits for at the moment, by name, and whether it gets on: a hang can then be
told from its cause, and from long work.

`with activity.doing("reading data/mine"): ...` stands around reads and writes that may stall, in
any thread. Work of many parts that is no step, as an evaluation, calls `activity.alive()` after
each. Both cost a microsecond. `activity.until` waits for what another process has to do first, and
inside `activity.periodically` a thread says what takes long.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
SAID_EVERY = 10.0  # seconds between lines on work whose parts nobody can count
NOTICE_AFTER = 60.0  # seconds after which a line says what is waited for

_under_way: dict[object, tuple[str, float]] = {}
_parts = 0
_announcing = False  # whether a thread says what goes on


@contextlib.contextmanager
def doing(name: str) -> Iterator[None]:
    """Inside, `under_way` lists `name`; its end is a part of work done."""
    token = object()
    _under_way[token] = (name, time.monotonic())
    try:
        yield
    finally:
        del _under_way[token]
        alive()


def alive() -> None:
    """A part of long work is done."""
    global _parts
    _parts += 1  # several threads may lose one of theirs: it moves all the same


def parts() -> int:
    """A number that moves whenever a part of long work is done."""
    return _parts


def under_way() -> list[tuple[str, float]]:
    """(name, seconds so far) of all that is under way, the longest first."""
    now = time.monotonic()
    return sorted(((n, now - t) for n, t in list(_under_way.values())), key=lambda x: -x[1])


@contextlib.contextmanager
def periodically(report: Callable[[], None], first: float, every: float) -> Iterator[None]:
    """Inside, a thread calls `report` after `first` seconds, and then each `every` seconds."""
    over = threading.Event()

    def run() -> None:
        pause = first
        while not over.wait(pause):
            pause = every
            report()

    teller = threading.Thread(target=run, name="telling", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


@contextlib.contextmanager
def announce(text: str) -> Iterator[None]:
    """Inside, a line on standard error says each ten seconds that `text` goes on, and for how long
    already: a folder of millions of files takes minutes to be listed. Work that is short says
    nothing, and nor does what stands inside another one."""
    global _announcing
    if _announcing:
        yield
        return
    began, _announcing = time.monotonic(), True

    def report() -> None:
        took = time.monotonic() - began
        print(f"{text} ... {took:.0f} s so far", file=sys.stderr, flush=True)

    try:
        with periodically(report, SAID_EVERY, SAID_EVERY):
            yield
    finally:
        _announcing = False


def until(what: str, look: Callable[[], T | None], *, hours: int = 1, pause: float = 1.0) -> T:
    """What `look` finds, which is asked every `pause` seconds until it is no longer None.

    After a minute a line says `what` is waited for. Raises ValueError after so many hours.
    """
    began, announced = time.monotonic(), False
    while (found := look()) is None:
        waited = time.monotonic() - began
        if waited > 3600 * hours:
            raise ValueError(f"waited {hours} h for {what}, in vain")
        if waited > NOTICE_AFTER and not announced:
            announced = True
            print(f"waiting for {what}", file=sys.stderr, flush=True)
        time.sleep(pause)
        alive()  # the hours are the bound
    return found
