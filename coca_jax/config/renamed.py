"""Names of version 0.1 that still work: who uses one is told the new name, in one line."""

from __future__ import annotations

import functools
import sys
from typing import TypeVar

T = TypeVar("T")


@functools.cache
def say(old: str, new: str) -> None:
    """Says on standard error what `old` is called now, once in a process."""
    print(f"{old} is now {new}; the old name works until 0.3", file=sys.stderr, flush=True)


def one_of(value: T, new: str, old_value: T, old: str) -> T:
    """What is given by its new or its old name; an empty value is none.

    Raises ValueError where both are given.
    """
    if not old_value:
        return value
    if value:
        raise ValueError(f"{old} is the old name of {new}, which is given too; leave {old} out")
    say(old, new)
    return old_value
