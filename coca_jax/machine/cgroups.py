"""The groups of processes, Linux's cgroups, whose limits this process has: those of containers
(Docker, Kubernetes), of SLURM's jobs and of services."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

GROUPS, OWN = pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/proc/self/cgroup")


def folders() -> Iterator[pathlib.Path]:
    """Those of the group that this process is in and of those around it, of version 2; they need
    not be there. A container sees its own group as the outermost."""
    own = ""
    with contextlib.suppress(OSError):
        lines = OWN.read_text().splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), "")
    inner = GROUPS / own.strip("/")
    for folder in (inner, *inner.parents):
        yield folder
        if folder == GROUPS:
            return
