"""What this process waits for at the moment, by name: a hang can then be told from its cause.

`with activity.doing("reading data/mine"): ...` stands around reads and writes that may stall, in
any thread. It costs a microsecond.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

_under_way: dict[object, tuple[str, float]] = {}


@contextlib.contextmanager
def doing(name: str) -> Iterator[None]:
    """Inside, `under_way` lists `name`."""
    token = object()
    _under_way[token] = (name, time.monotonic())
    try:
        yield
    finally:
        del _under_way[token]


def under_way() -> list[tuple[str, float]]:
    """(name, seconds so far) of all that is under way, the longest first."""
    now = time.monotonic()
    return sorted(((n, now - t) for n, t in list(_under_way.values())), key=lambda x: -x[1])
