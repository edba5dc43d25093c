"""The groups of processes, Linux's cgroups, whose limits this process has: those of containers
(Docker, Kubernetes), of SLURM's jobs and of services."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import math
import os
import pathlib
import platform
import sys
from collections.abc import Iterator

from coca_jax.runtime import cache_folder

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


# How many processor cores there are for this process.


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
    for folder in folders():
        with contextlib.suppress(OSError, ValueError):  # 'max' is no number, and no limit
            time, period = (folder / "cpu.max").read_text().split()
            yield int(time) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1, in which -1 is no limit
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        time, period = ((GROUPS / "cpu" / name).read_text() for name in names)
        if int(time) > 0:
            yield int(time) / int(period)


ACCELERATORS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/accel*")
GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus


def has_accelerator() -> bool:
    """Whether this machine seems to have a TPU or a GPU, by its devices."""
    if "JAX_FORCE_TPU_INIT" in os.environ or any(glob.glob(name) for name in ACCELERATORS):
        return True
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return any(pathlib.Path(path).read_text().strip() == GOOGLE for path in vendors)


def skip_absent_tpu() -> None:
    """Has JAX use the CPU where libtpu, which `compile` needs, is installed on a machine without an
    accelerator. JAX would start it, wait ten seconds for a TPU and print errors."""
    if importlib.util.find_spec("libtpu") and not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


# Where compiled programs are kept between starts.


MOST_BYTES = 4 << 30  # kept; beyond it the programs used least recently go


def processor() -> str:
    """What the processor can do: a home folder may be shared by machines that differ."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def use() -> None:
    """Has JAX keep its compiled programs, before or after it is imported.

    They go to JAX_COMPILATION_CACHE_DIR, or else below `cache_folder.folder`. Off where the user
    has set jax_enable_compilation_cache to false; what else the user has set in the environment
    stays.
    """
    # A program for a CPU is split for the cores that there were, which JAX's own key leaves out.
    kind = hashlib.sha256(f"{processor()} {schedulable()}".encode()).hexdigest()[:8]
    settings = dict(
        jax_compilation_cache_dir=str(cache_folder.folder() / f"compiled-{kind}"),
        jax_compilation_cache_max_size=MOST_BYTES,
        jax_persistent_cache_min_compile_time_secs=0.2,
    )
    if sys.modules.get("jax") is None:
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            for name, value in settings.items():
                os.environ[name.upper()] = os.environ.get(name.upper()) or str(value)
        return
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        for name, value in settings.items():
            if not os.environ.get(name.upper()):
                jax.config.update(name, value)
