"""Names of version 0.1 that still work: who uses one is told the new name, in one line."""

from __future__ import annotations

import sys


def say(old: str, new: str) -> None:
    """Says on standard error what `old` is called now."""
    print(f"{old} is now {new}; the old name works until 0.3", file=sys.stderr, flush=True)
