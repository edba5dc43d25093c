"""Which file a name means, whether that file is still the same, and how many may be open."""

from __future__ import annotations

import os
import resource
import urllib.parse


def plain(name: str) -> str:
    """The path of a file:// URL, as file managers give them; any other name as it is."""
    if not name.startswith("file://"):
        return name
    path = name.removeprefix("file://").removeprefix("localhost")
    return path if os.path.exists(path) else urllib.parse.unquote(path)


def whole_path(name: str, folder: str = "") -> str:
    """The one spelling of a name: './a', 'a' and '/here/a' are one file, and a URL is itself.

    folder: where relative names begin; '': the current folder.
    """
    name = plain(name)
    if "://" in name:
        return name
    return os.path.normpath(os.path.join(folder or os.getcwd(), name))


def stamp(name: str) -> tuple[int, int] | None:
    """The size of a local file in bytes and when it was changed, in nanoseconds; None for what is
    no local file."""
    try:
        found = os.stat(whole_path(name))
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def most_open(share: float, most: int) -> int:
    """That share of the files, sockets too, that this process may have open; `most` at most, and
    one at least."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, int(share * limit)))
