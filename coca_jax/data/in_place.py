"""Images read where they lie: ranges of tars, parquet files and image files, here or in a bucket.

An index says which (references.py). Ranges of a bucket that lie near each other come in one
request, are tried again where the bucket does not answer, and are kept on the disk within the
bound of shard_cache.py.
"""

from __future__ import annotations

import collections
import io
import os
import stat
import threading
import zlib
from collections.abc import Callable, Sequence

from coca_jax import extras
from coca_jax.data import files, range_cache, references
from coca_jax.data.random_access import Indices, Reader
from coca_jax.data.records import Record
from coca_jax.data.references import Reference
from coca_jax.files import local_files

_OPEN_FILES = 128  # that are kept open
_UNPACKED_BYTES = 64 << 20  # of pages that are kept unpacked


class InPlace:
    """Reads the records of an index with the images that it refers to. Thread-safe.

    Args:
        read: gives the records of the index.
        root: the folder or URL below which their files lie.
    """

    def __init__(self, read: Reader, root: str):
        self._index, self._root = read, root
        self._local, self._remote = _LocalFiles(), range_cache.RemoteFiles()
        self._pages = _Pages()

    def __call__(self, indices: Indices) -> list[Record]:
        """The records at `indices`, in their order.

        Raises:
            OSError, ValueError: a file is gone, is not the one that was indexed, or is damaged.
        """
        records = self._index(indices)
        wanted = [references.load(record.image, self._root) for record in records]
        pairs = [n for n, record in enumerate(records) if record.second]
        wanted += [references.load(records[n].second, self._root) for n in pairs]
        found = self._images(wanted)
        seconds = dict(zip(pairs, found[len(records) :]))
        return [
            record._replace(image=image, second=seconds.get(n, b""))
            for n, (record, image) in enumerate(zip(records, found))
        ]

    def without_images(self, indices: Indices) -> list[Record]:
        """The same records, read from the index alone."""
        return [r._replace(image=b"", second=b"") for r in self._index(indices)]

    def _images(self, wanted: Sequence[Reference]) -> list[bytes]:
        order = sorted(range(len(wanted)), key=lambda n: (wanted[n].path, wanted[n].start))
        ordered = [wanted[n] for n in order]
        remote = [one for one in ordered if files.is_remote(one.path)]
        fetched = iter(self._remote.read(remote))
        found: list[bytes] = [b""] * len(wanted)
        for number, one in zip(order, ordered):
            if files.is_remote(one.path):
                data = next(fetched)
                found[number] = self._pages.unpack(one, lambda: data) if one.page else data  # noqa: B023
            elif one.page:
                found[number] = self._pages.unpack(one, lambda: self._local.read(one))  # noqa: B023
            else:
                found[number] = self._local.read(one)
        return found


class _LocalFiles:
    """Reads ranges of local files, of which the last ones stay open."""

    def __init__(self) -> None:
        self._open: collections.OrderedDict[str, io.FileIO] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, one: Reference) -> bytes:
        """Raises OSError, ValueError as `InPlace` does."""
        if not one.start and one.size == one.file_bytes:  # a file of its own
            file = _opened(one)
        else:
            with self._lock:
                file = self._kept(one)
        data = os.pread(file.fileno(), one.size, one.start)
        check(one, data)
        return data

    def _kept(self, one: Reference) -> io.FileIO:
        if one.path in self._open:
            self._open.move_to_end(one.path)
        else:
            while len(self._open) >= _OPEN_FILES:  # it is closed once no thread reads it
                self._open.popitem(last=False)
            self._open[one.path] = _opened(one)
        return self._open[one.path]


def _opened(one: Reference) -> io.FileIO:
    """Opens the file, which must be regular and of the size that was indexed."""
    path = local_files.plain(one.path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = io.FileIO(os.open(path, flags))
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_size != one.file_bytes:
        raise range_cache.changed(one, found.st_size)
    return file


def check(one: Reference, data: bytes) -> None:
    """Raises ValueError where bytes are not those that were indexed."""
    if len(data) != one.size or zlib.crc32(data) != one.crc:
        raise ValueError(
            f"{one.path}: the bytes from {one.start} on are not those that were indexed; index "
            "the data again where they were changed"
        )


class _Pages:
    """Unpacks pages of parquet columns; the last ones stay unpacked."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[tuple[str, int], bytes] = collections.OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def unpack(self, one: Reference, read: Callable[[], bytes]) -> bytes:
        """The image of a reference in its page, which `read` gives. Raises what that raises, and
        ValueError: it does not unpack."""
        page, key = one.page, (one.path, one.start)
        assert page is not None
        with self._lock:
            whole = self._kept.get(key)
        if whole is None:
            whole = _unpacked(one, read())
            with self._lock:
                if key not in self._kept:
                    self._bytes += len(whole)
                self._kept[key] = whole
                while self._bytes > _UNPACKED_BYTES and len(self._kept) > 1:
                    self._bytes -= len(self._kept.popitem(last=False)[1])
        return whole[page.start : page.start + page.size]


def _unpacked(one: Reference, data: bytes) -> bytes:
    page = one.page
    assert page is not None
    if not page.codec:
        return data
    extras.check("pyarrow", "parquet", f"{one.path}: reading parquet")
    import pyarrow as pa

    try:
        packed = pa.py_buffer(data)[page.plain :]
        rest = pa.decompress(packed, page.unpacked - page.plain, page.codec, asbytes=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{one.path}: a page at {one.start} does not unpack: {error}") from None
    return data[: page.plain] + rest
