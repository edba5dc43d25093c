"""What a figure was measured on: the processor, its load, the versions of the packages."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform

PACKAGES = ("coca_jax", "jax", "torch", "open_clip_torch", "numpy")


def machine() -> str:
    """The processor's name and how many cores the run may use."""
    names = []
    if os.path.exists("/proc/cpuinfo"):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else platform.processor()}, {cores} core{'s' * (cores != 1)}"


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
