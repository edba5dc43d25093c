"""Where the bytes of an image lie in a file that is read in place.

An index folder (`prepare --in_place`) is a prepared folder whose records hold, in the place of an
image, a reference to its bytes as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import posixpath
import zlib
from typing import Any, NamedTuple

from coca_jax.data.sources import files
from coca_jax.runtime import bounded_json, storage

_SCHEMES = ("s3", "s3a", "gs", "gcs", "memory")


class Changed(ValueError):
    """Bytes that are not those that were indexed."""


class Page(NamedTuple):
    """How an image lies in a packed part of a file, as a page of a parquet column is.

    Attributes:
        codec: that pyarrow.decompress knows; '' for none.
        plain: leading bytes of the part that are not packed.
        unpacked: bytes of the whole part once unpacked.
        start: of the image in the unpacked part.
        size: bytes of the image.
    """

    codec: str
    plain: int
    unpacked: int
    start: int
    size: int


class Cell(NamedTuple):
    """How an image lies in a page of a parquet column whose values nobody has read yet.

    Attributes:
        codec, plain, unpacked: as of `Page`.
        row: which row of the page it is.
        rows: of the page.
        encoding: of its values: PLAIN, or DICTIONARY.
        levels: the definition level of a value that is there; 0: each is, and none is stored.
        prefixed: whether the length of the definition levels stands before them, as in pages of
            version 1.
        dictionary: start, size and unpacked size of the dictionary's page, and its codec; () for
            none.
    """

    codec: str
    plain: int
    unpacked: int
    row: int
    rows: int
    encoding: int
    levels: int
    prefixed: bool
    dictionary: tuple[int, int, int, str] | tuple[()] = ()


PLAIN, DICTIONARY = 0, 8  # of parquet's encodings


class Span(NamedTuple):
    """`size` bytes from `start` on of a file of `file_bytes`: an image, or the page that it is in.
    `crc`: of these bytes; -1: to be made of the image, which they are; UNKNOWN: nobody has read
    them."""

    path: str
    file_bytes: int
    start: int
    size: int
    page: Page | Cell | None = None
    crc: int = -1


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
UNKNOWN = -2  # the checksum of bytes that an index without checks has not read


class Reference(NamedTuple):
    """A span as an index keeps it.

    Attributes:
        path: relative to the root of the index, or absolute, or a URL.
        file_bytes: of the whole file; one of another size is not the file that was indexed.
        start, size, page: as of `Span`.
        crc: zlib.crc32 of the bytes of the span, or UNKNOWN.
    """

    path: str
    file_bytes: int
    start: int
    size: int
    crc: int
    page: Page | Cell | None = None


def dump(span: Span, image: bytes, root: str) -> bytes:
    """The reference to an image, as bytes."""
    crc = zlib.crc32(image) if span.crc == -1 else span.crc
    page = [] if span.page is None else [list(span.page)]
    if isinstance(span.page, Cell):
        page = [list(span.page._replace(row=0))]
    start = root if root.endswith("/") else root + "/"
    path = span.path
    path = path[len(start) :] if path.startswith(start) else _below(path, root)
    fields = [path, span.file_bytes, span.start, span.size, crc, *page]
    text = _ENCODER.encode(fields)
    if isinstance(span.page, Cell):  # the row stands apart: all others of the page share the rest
        text = f"[{span.page.row},{text}]"
    return text.encode("utf-8", "surrogatepass")  # names of files need not be UTF-8


def around_row(span: Span, root: str) -> tuple[bytes, bytes]:
    """What `dump` writes before and behind the row of a span's cell."""
    assert isinstance(span.page, Cell)
    row, _, rest = dump(span, b"", root).partition(b",")
    return row[:1], b"," + rest


@functools.lru_cache(maxsize=4096)
def _below(path: str, root: str) -> str:
    """A path relative to the root where it lies below it, whichever links lead there."""
    found = [path]
    if not files.is_remote(path):
        path = storage.plain_path(path)
        found = [os.path.abspath(path), os.path.realpath(path)]
    start = root.rstrip("/") + "/"
    return next((one[len(start) :] for one in found if one.startswith(start)), found[0])


def load(data: bytes, root: str) -> Reference:
    """The reference that `dump` made, with its path below `root`.

    Raises:
        ValueError: not such bytes, or a path that leads out of the root by '..'.
    """
    if not data[1:2].isdigit():
        return _load(data, root)
    row, _, rest = data[1:-1].partition(b",")
    of_page = _of_page(rest, root)
    page, number = of_page.page, int(row) if row.isdigit() else -1
    if not isinstance(page, Cell) or not 0 <= number < page.rows:
        raise ValueError(f"not a reference to an image: {data[:200]!r}")
    return of_page._replace(page=page._replace(row=number))


@functools.lru_cache(maxsize=4096)
def _of_page(data: bytes, root: str) -> Reference:
    """Rows of a page have it in common. Raises as `load`."""
    return _load(data, root)


def _load(data: bytes, root: str) -> Reference:
    try:
        path, file_bytes, start, size, crc, *rest = bounded_json.loads(data)
        page = _page(rest[0]) if rest else None
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"not a reference to an image: {error}") from None
    numbers = [file_bytes, start, size, 0 if crc == UNKNOWN else crc]
    if not isinstance(path, str) or not all(map(_is_count, numbers)):
        raise ValueError(f"not a reference to an image: {data[:200]!r}")
    apart = page.dictionary[:2] if isinstance(page, Cell) else ()
    if max(start + size, sum(apart)) > file_bytes:
        raise ValueError(f"a reference beyond the end of {path[:200]}")
    if max(size, page.unpacked if page else 0) > files.MAX_IMAGE_FILE:
        raise ValueError(f"a reference to {size} bytes of {path[:200]}")
    if ".." in posixpath.normpath(path).split("/"):
        raise ValueError(f"a reference that leads out of the data: {path[:200]}")
    whole = files.join(root, path)
    chained = "::" in whole and files.is_remote(whole)  # file systems, by fsspec
    if chained or not is_place(whole):
        raise ValueError(f"a reference to neither a local file nor a bucket: {whole[:200]}")
    return Reference(whole, file_bytes, start, size, crc, page)


def _page(value: Any) -> Page | Cell:
    """Raises TypeError, ValueError for what `dump` does not write."""
    if len(value) == len(Page._fields):
        page = Page(*value)
        if not all(map(_is_count, page[1:])) or page.start + page.size > page.unpacked:
            raise ValueError("its place in a page is beyond the page")
        return page
    cell = Cell._make([*value[:8], tuple(value[8])])
    counts = [*cell[1:7], *cell.dictionary[:3]]
    if not all(map(_is_count, counts)) or len(cell.dictionary) not in (0, 4):
        raise ValueError("its place in a page is not one")
    most = max([cell.unpacked, *cell.dictionary[1:3]])
    if cell.row >= cell.rows or cell.rows > _MOST_ROWS or most > files.MAX_IMAGE_FILE:
        raise ValueError("its place in a page is beyond the page")
    return cell


_MOST_ROWS = 1 << 24  # of a page, which has a thousand


def is_place(path: str) -> bool:
    """Whether images may be read in place there: a stranger's index calls no address."""
    return not files.is_remote(path) or path.split("://", 1)[0] in _SCHEMES


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
