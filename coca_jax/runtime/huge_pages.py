"""Huge pages for the memory of a train step, where a CPU trains under Linux with glibc.

XLA takes the memory of a step anew each time, and glibc gives large blocks back to the system at
once, so that the kernel clears the same pages in every step: a fifth to a third of a small model's
time in pages of 4 KiB, next to nothing in pages of 2 MiB. glibc asks for those by a setting that
it reads when a program starts (glibc.malloc.hugetlb), so the program starts once more with it.

Keeping the memory in the process (mallopt) was slower: the pieces that compiling leaves are
searched at every allocation, and small things in the gap of a step made a third more be held.
"""

from __future__ import annotations

import os
import pathlib
import sys

from coca_jax.runtime import quiet

SETTINGS, OPTION = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"  # 2.35 and newer
OF_THE_SYSTEM = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def begin_again() -> None:
    """Puts in this process's place the same program with the setting, where it helps and is not
    there yet: before the program has done anything. It costs a start of Python."""
    if helps():
        before = [os.environ[SETTINGS]] if os.environ.get(SETTINGS) else []
        os.environ[SETTINGS] = ":".join([*before, f"{OPTION}=1"])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def helps() -> bool:
    """Whether JAX will compute on the CPU, the system gives huge pages to those who ask (where it
    gives them to all nothing is to be done), and a user has not set the option."""
    if OPTION in os.environ.get(SETTINGS, "") or not sys.executable:
        return False
    try:
        asked = "[madvise]" in OF_THE_SYSTEM.read_text()
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "other 0").split()
    except (OSError, ValueError):
        return False
    new = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    return asked and new and _on_cpu()


def _on_cpu() -> bool:
    """Whether JAX will compute on the CPU, told without starting it."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted:
        return wanted.split(",")[0] == "cpu"
    return not (quiet.has_accelerator() and _has_plugin())


def _has_plugin() -> bool:
    """Whether JAX's package for some accelerator is here."""
    import importlib.metadata  # of ten milliseconds, in which a signal would not be answered
    import importlib.util

    able = importlib.metadata.entry_points(group="jax_plugins")
    return bool(able) or importlib.util.find_spec("libtpu") is not None
