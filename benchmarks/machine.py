"""What a figure was measured on: the program, the processor, versions of packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import coca_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ("coca_jax", "configs")  # what a figure depends on
PACKAGES = ("jax", "torch", "open_clip_torch", "numpy")


def commit() -> str | None:
    """The newest commit of the program; None without git. Where files differ from it, a + and a
    hash of what differs: '7012098+1f0c9a3e'."""

    def git(*words: str) -> bytes:
        done = subprocess.run(["git", *words, "--", *PROGRAM], cwd=ROOT, capture_output=True)
        return done.stdout.strip() if done.returncode == 0 else b""

    found = git("log", "-1", "--format=%h").decode()
    if not found or not git("status", "--porcelain"):
        return found or None
    differs = hashlib.sha256(git("diff", "--binary", "HEAD"))
    for name in git("ls-files", "--others", "--exclude-standard", "-z").split(b"\0"):
        differs.update(name + b"\0" + (ROOT / os.fsdecode(name)).read_bytes() if name else b"")
    return f"{found}+{differs.hexdigest()[:8]}"


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
    found = {"coca_jax": coca_jax.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
