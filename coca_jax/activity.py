"""What this process waits for at the moment, by name, and whether it gets on: a hang can then be
told from its cause, and from long work.

`with activity.doing("reading data/mine"): ...` stands around reads and writes that may stall, in
any thread. Work of many parts that is no step, as an evaluation, calls `activity.alive()` after
each. Both cost a microsecond.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

_under_way: dict[object, tuple[str, float]] = {}
_parts = 0


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
