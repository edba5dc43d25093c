"""Where the values of a parquet column lie in the file: in its pages, each packed by itself.

A value is found by its bytes, not by the encoding of its page, so that a place is right whatever
wrote the file. The headers are Thrift's compact protocol:
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from coca_jax.data import files
from coca_jax.data.references import Page, Span

_CODECS = {0: "", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_MAX_FOOTER, _MAX_HEADER = 100 << 20, 16 << 20  # bytes
_MAX_PAGE = 128 << 20  # bytes of a page, packed or not; writers make them of about one MiB
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of pages
_BYTE_ARRAY = 6
_OF_LISTS = ("list", "element", "item")  # of pyarrow's, by version
_NEEDLE = 64  # bytes that are looked for before a whole value is compared
_MAX_DEPTH, _MAX_ITEMS = 16, 10_000_000


class _Thrift:
    """Reads structs as {number of a field: value}; lists of structs too."""

    def __init__(self, data: bytes):
        self._data, self.position = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Raises IndexError where the data end early, ValueError: no such struct."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deep")
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            number = number + step if step else self._signed()
            found[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # in a list
            return self._byte() == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            if count > _MAX_ITEMS:
                raise ValueError(f"a list of {count}")
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"a field of type {kind}")

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _bytes(self, count: int) -> bytes:
        self.position += count
        if self.position > len(self._data):
            raise IndexError(count)
        return self._data[self.position - count : self.position]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


class _Part(NamedTuple):
    """A page: its place in the file, and its bytes unpacked. codec '': as they lie there."""

    start: int
    size: int
    crc: int
    codec: str
    plain: int
    data: bytes
    dictionary: bool


class Columns:
    """The columns of a parquet file, which is opened once one is asked for. What of it cannot be
    read has no values."""

    def __init__(self, path: str):
        self._path = path
        self._handle: Any = None
        self._groups: list[Any] = []
        self._bytes = 0  # of the file

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            self._handle.close()

    def _open(self) -> None:
        self._handle = handle = files.open_binary(self._path)
        try:
            self._bytes = end = handle.seek(0, 2)
            handle.seek(end - 8)
            size = struct.unpack("<I4s", handle.read(8))[0]
            if size > min(_MAX_FOOTER, end - 8):
                return
            handle.seek(end - 8 - size)
            self._groups = _Thrift(handle.read(size)).struct()[4]
        except (ValueError, IndexError, KeyError, struct.error):
            return

    def values(self, group: int, name: str) -> Values:
        """The values of a column that the group has as bytes; a struct's field `bytes` counts as
        the struct, what is in a list as the list."""
        if self._handle is None:
            self._open()
        try:
            chunks = [chunk[3] for chunk in self._groups[group][1]]
            for chunk in chunks:
                told, *within = [part.decode() for part in chunk[3]]
                field = [part for part in within if part not in _OF_LISTS]
                if told == name and field in ([], ["bytes"]) and chunk[1] == _BYTE_ARRAY:
                    return Values(_pages(self._handle, chunk), self._path, self._bytes)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            pass  # damaged, which the reader of the rows says
        return Values(iter(()), self._path, self._bytes)


def _pages(handle: BinaryIO, chunk: dict[int, Any]) -> Iterator[_Part]:
    """The pages of a column chunk, one after the other; ends where it cannot go on."""
    codec, position = _CODECS.get(chunk[4]), min(chunk[9], chunk.get(11) or chunk[9])
    end = position + chunk[7]
    while codec is not None and 0 <= position < end:
        try:
            head, length = _header(handle, position, end)
            unpacked, size = head[2], head[3]
        except (ValueError, IndexError, KeyError, OSError):
            return
        position += length
        if not (0 <= size <= min(_MAX_PAGE, end - position) and 0 <= unpacked <= _MAX_PAGE):
            return
        if head[1] in (_DATA, _DICTIONARY, _DATA_2):
            handle.seek(position)
            part = _part(position, handle.read(size), unpacked, codec, head)
            if part is None:
                return
            yield part
        position += size


def _header(handle: BinaryIO, position: int, end: int) -> tuple[dict[int, Any], int]:
    """A page's header, and its bytes: few, or more where it holds the extremes of the values."""
    room = 1 << 12
    while True:
        handle.seek(position)
        reader = _Thrift(handle.read(min(room, end - position)))
        try:
            return reader.struct(), reader.position
        except IndexError:
            if room > min(_MAX_HEADER, end - position):
                raise
            room <<= 4


def _part(start: int, data: bytes, unpacked: int, codec: str, head: dict[int, Any]) -> _Part | None:
    plain = 0
    if head[1] == _DATA_2:
        told = head.get(8, {})
        plain = told.get(5, 0) + told.get(6, 0)
        codec = codec if told.get(7, True) else ""
    if not isinstance(plain, int) or not 0 <= plain <= min(len(data), unpacked):
        return None
    crc, whole = zlib.crc32(data), data
    if codec:
        try:
            packed = pa.py_buffer(data)[plain:]
            whole = data[:plain] + pa.decompress(packed, unpacked - plain, codec, asbytes=True)
        except (pa.ArrowException, OSError, ValueError):
            return None
    return _Part(start, len(data), crc, codec, plain, whole, head[1] == _DICTIONARY)


class Values:
    """Finds the values of a column chunk in its pages; to be asked for in their order."""

    def __init__(self, pages: Iterator[_Part], path: str, file_bytes: int):
        self._pages, self._path, self._bytes = pages, path, file_bytes
        self._page: _Part | None = None
        self._dictionary: _Part | None = None
        self._from = 0

    def find(self, value: bytes) -> Span | None:
        """Where a value lies; None where it stands nowhere as it is."""
        while True:
            if self._page is not None:
                at = _found(self._page.data, value, self._from)
                if at >= 0:
                    self._from = at + len(value)
                    return self._span(self._page, at, len(value))
            if self._dictionary is not None:
                at = _found(self._dictionary.data, value, 0)
                if at >= 0:
                    return self._span(self._dictionary, at, len(value))
            following = next(self._pages, None)
            if following is None:
                return None
            if following.dictionary:
                self._dictionary = following
            else:
                self._page, self._from = following, 0

    def _span(self, part: _Part, at: int, size: int) -> Span:
        if not part.codec:
            return Span(self._path, self._bytes, part.start + at, size)
        page = Page(part.codec, part.plain, len(part.data), at, size)
        return Span(self._path, self._bytes, part.start, part.size, page, part.crc)


def _found(data: bytes, value: bytes, start: int) -> int:
    """The first place from `start` on where a value stands; -1: none."""
    at = data.find(value[:_NEEDLE], start)
    while at >= 0 and data[at : at + len(value)] != value:
        at = data.find(value[:_NEEDLE], at + 1)
    return at
