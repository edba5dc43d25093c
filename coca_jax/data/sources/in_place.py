"""Images read where they lie: ranges of tars, parquet files and image files, here or in a bucket.

An index says which (references.py). Ranges of a bucket that lie near each other come in one
request, are tried again where the bucket does not answer, and are kept on the disk within the
bound of shard_cache.py.
"""

from __future__ import annotations

import collections
import io
import os
import posixpath
import stat
import threading
import zlib
from collections.abc import Callable, Sequence

from coca_jax.data.sources import files, formats, range_cache, references, tars
from coca_jax.data.sources.items import Item, Options, Unit
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.references import Reference
from coca_jax.data.sources.source import Indices, Reader
from coca_jax.runtime import extras, storage

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
        check_unchanged(one, data)
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
    path = storage.plain_path(one.path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = io.FileIO(os.open(path, flags))
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_size != one.file_bytes:
        raise range_cache.changed(one, found.st_size)
    return file


def check_unchanged(one: Reference, data: bytes) -> None:
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


# An index in place of a copy: what may be read where it lies, and the references to it.
#
# An index is made as a copy is, by the same reading, checks and quarantine, so that it holds the
# records that a copy would hold; only the bytes of the images stay where they are.


FORMATS = (
    *("webdataset", "imagefolder", "sidecars", "csv", "jsonl", "json", "parquet", "tfrecord"),
)


def obstacle(format: str, units: list[Unit], options: Options) -> str:
    """Why data cannot be read in place; '' where they can be, as far as that is seen at once."""
    if format == "prepared":
        return "the data are prepared already, and taken as they are"
    if format not in FORMATS:
        return f"--format={format} cannot be read in place"
    if units and not references.is_place(units[0].path):
        return f"{units[0].path} is neither a local file nor in a bucket, to be read in place"
    if options.max_side:
        return f"--max_side={options.max_side} encodes images again, which lie nowhere then"
    if format != "webdataset" or not units:
        return ""
    named = [unit.path for unit in units if not unit.path.lower().endswith(".tar")]
    if named:
        return f"{named[0]} is compressed and cannot be read in place"
    with files.open_binary(units[0].path) as file:
        packed = tars.is_packed(file.read(6))
    return f"{units[0].path} is compressed and cannot be read in place" if packed else ""


def check(format: str, units: list[Unit], options: Options) -> None:
    """Raises ValueError where the options ask for an index and data cannot be read in place."""
    if options.in_place and (why := obstacle(format, units, options)):
        raise ValueError(f"{why}; `coca-jax prepare` without --in_place makes a copy")


def root_of(input: str) -> str:
    """The folder or URL below which an index names files: absolute where it is here."""
    found = formats.root_of(input)
    return found if files.is_remote(found) else os.path.realpath(storage.plain_path(found))


def told_root(root: str, out: str) -> str:
    """The root as the manifest in `out` says it: relative to `out` where that lies in the data's
    folder, so that both may move together."""
    if files.is_remote(root) or files.is_remote(out):
        start = root.rstrip("/") + "/"
        if not out.startswith(start):
            return root
        return posixpath.join(*[".."] * len(out[len(start) :].strip("/").split("/")))
    inside = os.path.realpath(out).startswith(root.rstrip(os.sep) + os.sep)
    return os.path.relpath(root, os.path.realpath(out)) if inside else root


def referring(record: Record, item: Item, root: str) -> Record | None:
    """The record with references in the place of its images; None where one lies nowhere by
    itself, as in a compressed archive."""
    if item.span is None or (record.second and item.second_span is None):
        return None
    image = references.dump(item.span, record.image, root)
    if not record.second or item.second_span is None:
        return record._replace(image=image)
    second = references.dump(item.second_span, record.second, root)
    return record._replace(image=image, second=second)
