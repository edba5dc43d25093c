"""What becomes of memory that is freed, where the C library is glibc: kept or given back.

XLA takes the memory of a train step anew each time, and glibc returns blocks of that size to the
system at once: the kernel then clears every page again in the next step, a fifth to a third of a
small model's time on a CPU. With one arena, which neither maps blocks on their own nor gives its
end back, a step finds the pages of the one before. In return small things that outlive a step may
lie in the gap that it leaves, and the process holds up to that much more: so memory is kept only
where there is enough of it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

from coca_jax import quiet

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1  # mallopt's names
_begun = False


def begin() -> None:
    """Makes it possible to keep memory: one arena for all threads. To be called before a command
    starts any, for a thread that has an arena shares it with later ones.

    Nothing changes where an accelerator trains, where the C library is another one, and where the
    user has set it up (GLIBC_TUNABLES=glibc.malloc..., MALLOC_ARENA_MAX and the like).
    """
    global _begun
    own = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    own |= any(name.startswith("MALLOC_") for name in os.environ)
    set_option = _function("mallopt")
    if not own and set_option is not None and _on_cpu():
        _begun = bool(set_option(ARENA_MAX, 1))


def keep() -> bool:
    """Has freed memory kept for what comes next, and says whether it is; not without `begin`."""
    set_option = _function("mallopt")
    return bool(
        _begun and set_option and set_option(MMAP_MAX, 0) and set_option(TRIM_THRESHOLD, -1)
    )


def give_back() -> None:
    """Gives free memory back to the system, to be called after a save; about a millisecond."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """glibc's; other C libraries have none."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return found


def _on_cpu() -> bool:
    """Whether JAX will compute on the CPU, told without starting it."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted:
        return wanted.split(",")[0] == "cpu"
    able = importlib.metadata.entry_points(group="jax_plugins")
    return not ((able or importlib.util.find_spec("libtpu")) and quiet.has_accelerator())
