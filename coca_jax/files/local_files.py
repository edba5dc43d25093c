"""Which file a name means, whether that file is still the same, how many may be open, and a folder
to be alone in."""

from __future__ import annotations

import contextlib
import os
import resource
import urllib.parse
from collections.abc import Iterator


def plain(name: str) -> str:
    """The path of a file:// URL, as file managers give them, or of file:/path; any other name as it
    is."""
    if not name.startswith("file:/"):
        return name
    path = name.removeprefix("file:")
    if path.startswith("//"):
        path = path.removeprefix("//").removeprefix("localhost")
    return path if os.path.exists(path) else urllib.parse.unquote(path)


def from_home(name: str) -> str:
    """The path of '~/a', in the home folder, as shells have it where it stands alone: they leave
    `--out=~/a` as it is. A file or folder that is there by that very name stays."""
    if not name.startswith("~/") or os.path.lexists(name):
        return name
    return os.path.expanduser(name)


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


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process or thread is inside for the same folder, which is there and local,
    or on a disk that machines share. Some network disks know no locks: there others may be."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            opened = os.open(plain(os.fspath(folder)), os.O_RDONLY)
            stack.callback(os.close, opened)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
