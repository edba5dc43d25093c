"""The folder in which compiled things and copies are kept between starts; nobody else may write it.

What is compiled is run at the next start: whoever can write there runs code as this user.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import pathlib
import shutil
import stat
import tempfile

_CANNOT = "it cannot be written"


def folder() -> pathlib.Path:
    """$XDG_CACHE_HOME/coca_jax, else ~/.cache/coca_jax, made for this user alone (mode 0700).

    Where that cannot be written, or others may write it or own it, a folder of this user's in the
    system's temporary one; where even that is somebody else's, a new one that goes at exit.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _first_private(base, tempfile.gettempdir())


@functools.cache
def _first_private(base: str, temporary: str) -> pathlib.Path:
    user = os.geteuid() if hasattr(os, "geteuid") else os.environ.get("USERNAME", "user")
    places = [pathlib.Path(temporary) / f"coca_jax-{user}"]
    if os.path.isabs(base):  # without a home folder "~" stays as it is
        places.insert(0, pathlib.Path(base) / "coca_jax")
    for place in places:
        reason = _unsafe(place)
        if not reason:
            return place
        if reason != _CANNOT:
            logging.getLogger("coca_jax").warning(
                "%s is not used for compiled programs: %s; `chmod 700` it or remove it",
                *(place, reason),
            )
    made = pathlib.Path(tempfile.mkdtemp(prefix="coca_jax-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _unsafe(place: pathlib.Path) -> str:
    """Why a folder, made now if it is not there, cannot be this user's alone; '' where it is."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        link, found = place.lstat(), place.stat()  # a link of one's own may lead to a larger disk
        reason = others_own(link) or others_may_write(found)
        if not reason and found.st_mode & 0o077:
            place.chmod(0o700)  # nor may others reach what is in it, whatever its rights
    except OSError:
        return _CANNOT
    return reason or ("" if os.access(place, os.W_OK) else _CANNOT)


def others_own(found: os.stat_result) -> str:
    """Whose a file or folder is, by its status, in words; '' where it is this user's."""
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return f"it belongs to the user {found.st_uid}"
    return ""


def others_may_write(found: os.stat_result) -> str:
    """Who else may write a file or folder, by its status, in words; '' where nobody may."""
    others = stat.S_IWGRP | stat.S_IWOTH
    if hasattr(os, "geteuid") and found.st_mode & others:  # Windows keeps rights elsewhere
        return "others may write it"
    return others_own(found)
