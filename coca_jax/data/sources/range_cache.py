"""Ranges of files in a bucket: coalesced, tried again, and kept on the disk within a bound.

What was read of a remote file is kept in a sparse local file, at the same place as there, beside
the copies of shard_cache.py and under the same bound. Whether a range is there its checksum tells,
so that processes may share the files and be killed at any moment. An index without checks has no
checksums: those of what was read are then kept in a second sparse file, at the places of the ranges.
"""

from __future__ import annotations

import collections
import hashlib
import io
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from coca_jax.data.sources import files, references, shard_cache
from coca_jax.data.sources.references import Reference
from coca_jax.runtime import unreachable

GAP_BYTES = 64 << 10  # between ranges that come in one request
MOST_BYTES = 8 << 20  # of a request for several ranges
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before another try
_OPEN_FILES = 128  # that are kept open
_ROOM_BYTES = 64 << 20  # that are written before the bound is looked at again
_SUM = struct.Struct("<II")  # size and checksum of a range


class Request(list[Reference]):
    """References that follow one another in a file and come in one request."""

    @property
    def start(self) -> int:
        """The first byte."""
        return self[0].start

    @property
    def stop(self) -> int:
        """Behind the last byte."""
        return max(one.start + one.size for one in self)

    def takes(self, one: Reference) -> bool:
        """Whether a reference that begins no earlier belongs to it."""
        end = one.start + one.size
        near = one.path == self[0].path and one.start <= self.stop + GAP_BYTES
        return near and end - self.start <= max(MOST_BYTES, self.stop - self.start)


def coalesced(wanted: Sequence[Reference]) -> list[Request]:
    """The requests for references that are sorted by path and start."""
    found: list[Request] = []
    for one in wanted:
        if found and found[-1].takes(one):
            found[-1].append(one)
        else:
            found.append(Request([one]))
    return found


class RemoteFiles:
    """Reads ranges of remote files. Thread-safe."""

    def __init__(self) -> None:
        self._cache = _Kept()

    def read(self, wanted: Sequence[Reference]) -> list[bytes]:
        """The bytes of references that are sorted by path and start, in their order.

        Raises:
            OSError: a file is gone, or the bucket does not answer, however often it is asked.
            ValueError: the bytes are not those that were indexed.
        """
        found = {one: data for one in wanted if (data := self._cache.get(one)) is not None}
        requests = coalesced([one for one in wanted if one not in found])
        for request, data in zip(requests, fetched(requests)):
            for one in request:
                here = data[one.start - request.start : one.start - request.start + one.size]
                known = one.crc != references.UNKNOWN
                if len(here) != one.size or (known and zlib.crc32(here) != one.crc):
                    raise changed(one, 0)
                found[one] = here
                self._cache.put(one, here)
        return [found[one] for one in wanted]


def changed(one: Reference, there: int) -> references.Changed:
    """The error of a file that is not the one that was indexed. there: its bytes; 0: not known."""
    sizes = f" of {one.file_bytes} bytes (it has {there})" if there else ""
    return references.Changed(
        f"{one.path} is not the file{sizes} that was indexed; index the data again"
    )


def fetched(requests: Sequence[Request]) -> Iterator[bytes]:
    """The bytes of each request. Raises OSError as `RemoteFiles.read` does."""
    results: dict[int, bytes] = {}
    for pause in (*PAUSES, None):
        todo = [number for number in range(len(requests)) if number not in results]
        if not todo:
            break
        error = _fetch(requests, todo, results)
        final = isinstance(error, (FileNotFoundError, PermissionError))
        if error is not None and (pause is None or final):
            path = requests[next(n for n in todo if n not in results)][0].path
            if not isinstance(error, unreachable.ANSWERS):
                unreachable.note(path, error)
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if error is not None:
            logging.warning("%s: tried again (%s)", requests[todo[0]][0].path, error)
            time.sleep(pause or 0.0)
    for number in range(len(requests)):
        yield results[number]


def _fetch(
    requests: Sequence[Request], todo: Sequence[int], results: dict[int, bytes]
) -> Exception | None:
    """Puts what a try gave into `results`; the first error of the others."""
    stores: dict[Any, list[tuple[int, str]]] = {}  # of an index may be several
    for number in todo:
        system, plain = files.filesystem(requests[number][0].path)
        stores.setdefault(system, []).append((number, plain))
    errors: list[Exception] = []
    for system, there in stores.items():
        starts = [requests[number].start for number, _ in there]
        stops = [requests[number].stop for number, _ in there]
        try:
            found = system.cat_ranges([p for _, p in there], starts, stops, on_error="return")
        except Exception as error:  # the bucket's libraries have types of their own
            errors.append(error)
            continue
        results.update({n: data for (n, _), data in zip(there, found) if isinstance(data, bytes)})
        errors += [one for one in found if isinstance(one, Exception)]
    return errors[0] if errors else None


class _Kept:
    """The sparse local files. Thread-safe."""

    def __init__(self) -> None:
        self._open: collections.OrderedDict[tuple[str, ...], io.FileIO] = collections.OrderedDict()
        self._versions: dict[str, str] = {}
        self._lock = threading.Lock()
        self._room = 0
        self._off = False

    def get(self, one: Reference) -> bytes | None:
        """The bytes of a reference, where they are there."""
        with self._lock:
            if self._off:
                return None
            try:
                crc = one.crc
                if crc == references.UNKNOWN:
                    checksum = os.pread(self._file(one, sums=True).fileno(), _SUM.size, one.start)
                    size, crc = _SUM.unpack(checksum) if len(checksum) == _SUM.size else (0, 0)
                    if size != one.size:
                        return None
                data = os.pread(self._file(one).fileno(), one.size, one.start)
            except OSError as error:
                self._give_up(error)
                return None
        return data if len(data) == one.size and zlib.crc32(data) == crc else None

    def put(self, one: Reference, data: bytes) -> None:
        """Keeps the bytes of a reference."""
        with self._lock:
            if self._off:
                return
            try:
                if self._room < one.size:
                    self._make_room(one.size)
                os.pwrite(self._file(one).fileno(), data, one.start)
                if one.crc == references.UNKNOWN:
                    checksum = _SUM.pack(one.size, zlib.crc32(data))
                    os.pwrite(self._file(one, sums=True).fileno(), checksum, one.start)
            except OSError as error:
                self._give_up(error)
            self._room -= one.size

    def _make_room(self, size: int) -> None:
        self._room = max(size, min(_ROOM_BYTES, shard_cache.limit() // 8))
        shard_cache.make_room(shard_cache.folder(), self._room)
        for key, file in list(self._open.items()):
            if not os.fstat(file.fileno()).st_nlink:  # it has left, and takes room while open
                del self._open[key]

    def _file(self, one: Reference, *, sums: bool = False) -> io.FileIO:
        key = one.path, str(one.file_bytes), *(["sums"] if sums else [])
        if one.crc == references.UNKNOWN:  # nothing else tells that the file was replaced
            key = *key, self._version(one.path)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        while len(self._open) >= _OPEN_FILES:
            self._open.popitem(last=False)
        mark = f"ranges of {' '.join(key)}".encode("utf-8", "surrogateescape")
        path = shard_cache.folder() / hashlib.blake2b(mark, digest_size=16).hexdigest()
        self._open[key] = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        os.utime(path)
        return self._open[key]

    def _version(self, path: str) -> str:
        if path not in self._versions:
            system, plain = files.filesystem(path)
            try:
                self._versions[path] = str(system.checksum(plain))
            except Exception as error:  # the bucket's libraries have types of their own
                raise OSError(f"{path} cannot be reached: {error}") from error
        return self._versions[path]

    def _give_up(self, error: OSError) -> None:
        logging.warning("ranges that were read are not kept: %s", error)
        self._off = True
