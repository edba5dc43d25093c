"""Saves that leave no memory behind, and that compile nothing for small arrays.

TensorStore (0.1.86, its newest version when this was written) never frees the strings of the JSON
that it gives to Python, and Orbax asks it for some at every array of every save: 280 KiB in a save
of 320 arrays, for as long as the run lives. What Orbax asks for is the same for all arrays of a
folder, and what it counts is only logged: now it asks once for a folder, and does not count.

An array that several devices hold whole is cut by Orbax into a slice for each of them to write,
each by a program of its own: a hundred programs at the first save of a small model. Arrays with
less than a MiB for each are written by one.

What the threads of a save have freed, the C library keeps in pieces: it is given back.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

MODULE = "orbax.checkpoint._src.serialization.tensorstore_utils"
SPEC, COUNT = "_build_ocdbt_kvstore_tspec", "get_tensorstore_raw_bytes"
SMALLEST, SLICE_BYTES = "_min_slice_bytes_for_replica_parallel", 1 << 20
FOLDERS = 64  # of which the answer is kept: those of the items of a few saves


@functools.cache
def enable() -> None:
    """From now on Orbax asks TensorStore less and cuts no small arrays. Versions of it that lack a
    function are left alone: they do not ask."""
    import orbax.checkpoint as ocp

    arrays = ocp.type_handlers.get_type_handler(jax.Array)
    if hasattr(arrays, SMALLEST):
        setattr(arrays, SMALLEST, SLICE_BYTES)
    try:
        utils = importlib.import_module(MODULE)
    except ImportError:
        return
    if hasattr(utils, SPEC):
        setattr(utils, SPEC, by_folder(getattr(utils, SPEC)))
    if hasattr(utils, COUNT):
        setattr(utils, COUNT, lambda *_, **__: 0)  # as of a storage that does not count


def by_folder(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Orbax's function from a folder, an array's name and options to a specification, which is the
    same for every name but for the name itself."""
    of_folder = functools.lru_cache(maxsize=FOLDERS)(build)

    @functools.wraps(build)
    def of_array(directory: str, name: str | None = None, **options: Any) -> dict[str, Any]:
        spec = copy.deepcopy(of_folder(directory, **options))
        return spec if name is None else spec | {"path": name}

    return of_array


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's function; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> None:
    """Gives free memory back to the system, to be called after a save; about a millisecond."""
    trim = _trim()
    if trim is not None:
        trim(0)
