"""Local copies of shards that lie in a bucket, kept between runs, the longest unused ones leaving.

array_record reads local files only. Several processes and threads may share the folder: a copy
appears whole, and one that somebody has opened stays readable when it leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

from coca_jax.data.sources import files
from coca_jax.runtime import cache_folder, storage, unreachable

LIMIT = "COCA_JAX_SHARD_CACHE_GIB"  # a variable of the environment
DEFAULT_GIB = 100.0
_LOCK = "lock.file"
_UNFINISHED_SECONDS = 86_400.0  # after which a copy that nobody finished is what a kill left


def limit() -> int:
    """Bytes that copies may take together. Raises ValueError for a variable that is no number."""
    text = os.environ.get(LIMIT, "")
    try:
        gib = float(text) if text else DEFAULT_GIB
    except ValueError:
        gib = -1.0
    if not 0 < gib < 1e9:
        raise ValueError(f"{LIMIT}={text}: give the GiB that copies of shards may take, above 0")
    return int(gib * (1 << 30))


def check_limit(largest: int) -> None:
    """Raises ValueError for a limit that is no number, or less than the largest shard's bytes."""
    if largest > limit():
        enough = math.ceil(1000 * largest / (1 << 30)) / 1000
        raise ValueError(
            f"{LIMIT}={os.environ.get(LIMIT) or DEFAULT_GIB}: copies of shards have less room than "
            f"one of {largest} bytes takes; set {enough} or more"
        )


def folder() -> pathlib.Path:
    """Where copies are kept."""
    place = cache_folder.folder() / "shards"
    place.mkdir(mode=0o700, exist_ok=True)
    return place


@contextlib.contextmanager
def opened(path: str) -> Iterator[str]:
    """The file itself, or a copy of a remote one, which is there until the block ends; what the
    block has opened stays readable. For data larger than the disk, mount the bucket.

    Raises ValueError: see `limit`; OSError: no room on the disk, or the bucket does not answer.
    """
    if not files.is_remote(path):
        yield path
        return
    place = folder()
    system, plain = files.filesystem(path)
    with unreachable.asking(path):
        size = system.size(plain)
        mark = f"{path} {size} {system.checksum(plain)}"
    copy = place / hashlib.blake2b(mark.encode(), digest_size=16).hexdigest()
    with _locked(place, fcntl.LOCK_SH):
        if copy.exists():
            os.utime(copy)
            yield str(copy)
            return
    make_room(place, size)
    unfinished = place / storage.unnamed(copy.name)
    try:
        with unreachable.asking(path):
            system.get_file(plain, str(unfinished))
            if unfinished.stat().st_size != size:
                raise OSError(f"{path}: {unfinished.stat().st_size} of {size} bytes were copied")
        with _locked(place, fcntl.LOCK_SH):
            os.replace(unfinished, copy)
            yield str(copy)
    finally:
        unfinished.unlink(missing_ok=True)


def make_room(folder: pathlib.Path, size: int) -> None:
    """Removes the copies that are unused the longest until `size` more bytes are within the limit
    and on the disk, and what killed processes left."""
    most = limit()
    with _locked(folder, fcntl.LOCK_EX):
        found = []
        for file in folder.iterdir():
            try:
                about = file.stat()
            except FileNotFoundError:  # a copy that another has just finished, or given up
                continue
            if "." not in file.name:
                found.append((about.st_mtime, _taken(about), file))
            elif file.name != _LOCK and time.time() - about.st_mtime > _UNFINISHED_SECONDS:
                file.unlink(missing_ok=True)
        total = sum(bytes for _, bytes, _ in found)
        for _, bytes, file in sorted(found):
            if total + size <= most and shutil.disk_usage(folder).free > size:
                return
            file.unlink(missing_ok=True)
            total -= bytes


def _taken(about: os.stat_result) -> int:
    """Bytes that a file takes on the disk: less than its size where it has holes."""
    return min(about.st_size, about.st_blocks * 512)


@contextlib.contextmanager
def _locked(folder: pathlib.Path, how: int) -> Iterator[None]:
    """Holds the folder's lock: shared by readers, alone for one that removes. A process that dies
    lets go of it."""
    with open(folder / _LOCK, "ab") as file:
        fcntl.flock(file, how)
        yield
