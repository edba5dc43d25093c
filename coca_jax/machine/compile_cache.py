"""Where compiled programs are kept between starts."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import sys

from coca_jax.files import cache_folder
from coca_jax.machine import cores

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
    kind = hashlib.sha256(f"{processor()} {cores.schedulable()}".encode()).hexdigest()[:8]
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
