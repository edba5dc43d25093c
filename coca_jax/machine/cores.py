"""How many processor cores there are for this process."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

from coca_jax.machine import cgroups


def count() -> int:
    """Those that this process may keep busy: `schedulable`, and no more than its container's share
    of their time, which a limit of Docker's or Kubernetes' is."""
    return max(1, math.ceil(min([schedulable(), *_shares()])))


def schedulable() -> int:
    """Those that this process may run on, where the system tells (Linux), else all of the
    machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shares() -> Iterator[float]:
    """The limits of the groups that this process is in, in cores; none where there are none."""
    for folder in cgroups.folders():
        with contextlib.suppress(OSError, ValueError):  # 'max' is no number, and no limit
            time, period = (folder / "cpu.max").read_text().split()
            yield int(time) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1, in which -1 is no limit
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        time, period = ((cgroups.GROUPS / "cpu" / name).read_text() for name in names)
        if int(time) > 0:
            yield int(time) / int(period)
