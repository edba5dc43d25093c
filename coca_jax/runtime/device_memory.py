"""Free memory of the devices of this process."""

from __future__ import annotations

import os
import pathlib

import jax

from coca_jax.runtime import machine

MACHINE = pathlib.Path("/proc/meminfo")


def available() -> int:
    """Free bytes of one device. A CPU device has an equal share of the free memory of the machine,
    or of its container or job where that has a limit."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    free = min([_free_of_machine(), *map(_free_of_group, machine.folders())])
    return free // jax.local_device_count()


def _free_of_machine() -> int:
    """Free bytes of the machine; all of its memory where the system (macOS) does not report it."""
    try:
        lines = dict(line.split(":", 1) for line in MACHINE.read_text().splitlines())
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1024 * int(lines["MemAvailable"].split()[0])


def _free_of_group(folder: pathlib.Path) -> int:
    """Bytes that the limit of a process group leaves; a huge number without a limit. The page cache
    counts as free, as in MemAvailable."""
    try:
        most, now, about = (
            (folder / f"memory.{name}").read_text() for name in ("max", "current", "stat")
        )
        files = dict(line.split() for line in about.splitlines()).get("inactive_file", 0)
        return max(0, int(most) - int(now) + int(files))
    except (OSError, ValueError):
        return 1 << 62  # no group, or one without a limit
