"""Images read where they lie: ranges of tars, parquet files and image files, here or in a bucket.

An index says which (references.py). Ranges of a bucket that lie near each other come in one
request (remote.py).
"""

from __future__ import annotations

import collections
import io
import os
import posixpath
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from coca_jax.data.sources import files, formats, references, registry, remote
from coca_jax.data.sources.items import Item, Options, Unit
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.references import PLAIN, UNKNOWN, Cell, Page, Reference
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
        self._local = _LocalFiles()
        self._pages = _Pages(self._read)

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
        fetched = iter(remote.read_ranges([one for one in ordered if files.is_remote(one.path)]))
        found: list[bytes] = [b""] * len(wanted)
        for number, one in zip(order, ordered):
            data = next(fetched) if files.is_remote(one.path) else None
            if one.page:
                found[number] = self._pages.image(one, data)
            else:
                found[number] = self._local.read(one) if data is None else data
        return found

    def _read(self, one: Reference) -> bytes:
        return remote.read_ranges([one])[0] if files.is_remote(one.path) else self._local.read(one)


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
                file = self._opened(one)
        data = os.pread(file.fileno(), one.size, one.start)
        check_unchanged(one, data)
        return data

    def _opened(self, one: Reference) -> io.FileIO:
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
        raise remote.changed(one, found.st_size)
    return file


def check_unchanged(one: Reference, data: bytes) -> None:
    """Raises ValueError where bytes are not those that were indexed, as far as those are known."""
    known = one.crc != references.UNKNOWN
    if len(data) != one.size or (known and zlib.crc32(data) != one.crc):
        raise references.Changed(
            f"{one.path}: the bytes from {one.start} on are not those that were indexed; index "
            "the data again where they were changed"
        )


class _Pages:
    """The images in pages of parquet columns; the last pages stay unpacked. Thread-safe.

    read: gives the bytes of a reference.
    """

    def __init__(self, read: Callable[[Reference], bytes]):
        self._read = read
        self._cache: collections.OrderedDict[tuple[str, int], tuple[bytes, _Places]] = (
            collections.OrderedDict()
        )
        self._bytes, self._lock = 0, threading.Lock()

    def image(self, one: Reference, data: bytes | None = None) -> bytes:
        """The image of a reference. data: the bytes of its page, where they are there.

        Raises what `read` raises, and ValueError: the page does not unpack, or has no such image.
        """
        page = one.page
        if isinstance(page, Page):
            return self._page(one, data)[0][page.start : page.start + page.size]
        assert page is not None
        unpacked, places = self._page(one, data)
        if places is None:
            raise ValueError(f"{one.path}: the page at {one.start} is not one of images")
        place = places[page.row]
        if isinstance(place, int) and page.dictionary:
            start, size, plain, codec = page.dictionary
            values = Cell(codec, 0, plain, 0, 1, PLAIN, 0, False)  # read to the last one
            reference = Reference(one.path, one.file_bytes, start, size, UNKNOWN, values)
            unpacked, places = self._page(reference, None, all_values=True)
            place = places[place] if places and place < len(places) else None
        if not isinstance(place, tuple):
            raise ValueError(f"{one.path}: row {page.row} of the page at {one.start} has no image")
        return unpacked[place[0] : place[0] + place[1]]

    def _page(
        self, one: Reference, data: bytes | None, all_values: bool = False
    ) -> tuple[bytes, _Places]:
        key = one.path, one.start
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        unpacked = _unpacked(one, self._read(one) if data is None else data)
        places: _Places = None
        if isinstance(one.page, Cell):
            try:
                places = _values(unpacked, 0) if all_values else _rows(unpacked, one.page)
            except (IndexError, ValueError, struct.error) as error:
                raise ValueError(
                    f"{one.path}: the page at {one.start} is damaged: {error}"
                ) from None
        with self._lock:
            if key not in self._cache:
                self._bytes += len(unpacked)
            self._cache[key] = unpacked, places
            while self._bytes > _UNPACKED_BYTES and len(self._cache) > 1:
                self._bytes -= len(self._cache.popitem(last=False)[1][0])
        return unpacked, places


# Where the images of a page's rows are: (start, size), or the number of a value of the dictionary;
# None of a row without one.
_Places = Sequence[tuple[int, int] | int | None] | None


def _rows(data: bytes, cell: Cell) -> list[tuple[int, int] | int | None]:
    """Where the images of an unpacked page's rows are. Raises IndexError, ValueError, struct.error
    for a damaged page."""
    start, there = cell.plain, np.ones(cell.rows, bool)
    if cell.levels:
        first, end = 0, cell.plain
        if cell.prefixed:
            first, end = 4, 4 + struct.unpack_from("<I", data)[0]
            start = end
        levels = _runs(data, first, end, cell.levels.bit_length(), cell.rows)
        there = levels == cell.levels
    count = int(there.sum())
    values: Sequence[tuple[int, int] | int]
    if cell.encoding == PLAIN:
        values = _values(data, start, count)
    else:
        values = _runs(data, start + 1, len(data), data[start], count).tolist()
    if count == cell.rows:
        return list(values)
    found: list[tuple[int, int] | int | None] = [None] * cell.rows
    for row, value in zip(np.flatnonzero(there).tolist(), values):
        found[row] = value
    return found


def _values(data: bytes, start: int, count: int = -1) -> list[tuple[int, int]]:
    """(start, size) of values that follow one another, each behind its size; -1: to the end."""
    found: list[tuple[int, int]] = []
    while count < 0 and start < len(data) or len(found) < count:
        size = struct.unpack_from("<I", data, start)[0]
        if start + 4 + size > len(data):
            raise ValueError("a value beyond its end")
        found.append((start + 4, size))
        start += 4 + size
    return found


def _runs(data: bytes, start: int, end: int, width: int, count: int) -> np.ndarray:
    """Numbers of `width` bits as parquet packs them: runs of one, and runs of eight each."""
    if not 0 <= width <= 32 or end > len(data):
        raise ValueError("numbers of no possible width")
    if not width:
        return np.zeros(count, np.int64)
    found: list[np.ndarray] = []
    left = count
    while left > 0:
        head = shift = 0
        while True:
            byte = data[start]
            start += 1
            head |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                break
        if head & 1:
            size = min((head >> 1) * width, end - start)
            bits = np.frombuffer(data, np.uint8, size, start)
            bits = np.unpackbits(bits, bitorder="little")
            bits = bits[: len(bits) // width * width].reshape(-1, width)
            numbers = bits[:left] @ (1 << np.arange(width, dtype=np.int64))
        else:
            size = -(-width // 8)
            number = int.from_bytes(data[start : start + size], "little")
            numbers = np.full(min(head >> 1, left), number, np.int64)
        if not len(numbers):
            raise ValueError("fewer numbers than rows")
        start += size
        left -= len(numbers)
        found.append(numbers)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


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


def obstacle(format: str, units: list[Unit], options: Options) -> str:
    """Why data cannot be read in place; '' where they can be, as far as that is seen at once."""
    if format == "prepared":
        return "the data are prepared already, and taken as they are"
    found = registry.find(format)
    if not found.in_place:
        return f"--format={format} cannot be read in place"
    if units and not references.is_place(units[0].path):
        return f"{units[0].path} is neither a local file nor in a bucket, to be read in place"
    if options.max_side:
        return f"--max_side={options.max_side} encodes images again, which lie nowhere then"
    return found.obstacle(units)


def check(format: str, units: list[Unit], options: Options) -> None:
    """Raises ValueError where the options ask for an index and data cannot be read in place."""
    if options.in_place and (why := obstacle(format, units, options)):
        raise ValueError(f"{why}; `coca-jax prepare` without --in_place makes a copy")


def root_of(input: str) -> str:
    """The folder or URL below which an index names files: absolute where it is here."""
    found = formats.root_of(input)
    return found if files.is_remote(found) else os.path.realpath(storage.plain_path(found))


def relative_root(root: str, out: str) -> str:
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
    if item.second_span is None:
        return record._replace(image=image)
    return record._replace(
        image=image, second=references.dump(item.second_span, record.second, root)
    )
