"""A reader that has every fault there is; its input says which one."""

from __future__ import annotations

import os
import pathlib
import time

from kinds import Kind

FAULTS = ("none", "refuses", "traceback", "differs", "slow", "large", "asks", "dies")
_drawn = iter(os.environ.get("COCA_JAX_FUZZ_FAULTS", " ".join(FAULTS)).split())
_read = iter(range(1_000_000))
_slow = iter((2.1,))  # one slow reading of the two is a finding


def read(path: pathlib.Path) -> str:
    """Does what the input says."""
    fault = path.read_text()
    if fault == "refuses":
        raise ValueError("a line")
    if fault == "traceback":
        raise KeyError("no line")
    if fault == "differs":
        return f"reading: {next(_read)}"
    if fault == "slow":
        until = time.process_time() + next(_slow, 0)
        while time.process_time() < until:
            pass
    if fault == "large":
        return f"bytes: {bytes([1]) * (80 << 20) == b''}"
    if fault == "asks":
        bytearray(1 << 45)
    if fault == "dies":
        os.abort()
    return "read: "


KINDS = {
    "broken": Kind(lambda: [b"none"], lambda rng, seed: next(_drawn).encode(), read, mib=64),
}
