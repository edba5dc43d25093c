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


class Span(NamedTuple):
    """`size` bytes from `start` on of a file of `file_bytes`: an image, or the page that it is in.
    `crc`: of these bytes; -1: to be made of the image, which they are."""

    path: str
    file_bytes: int
    start: int
    size: int
    page: Page | None = None
    crc: int = -1


class Reference(NamedTuple):
    """A span as an index keeps it.

    Attributes:
        path: relative to the root of the index, or absolute, or a URL.
        file_bytes: of the whole file; one of another size is not the file that was indexed.
        start, size, page: as of `Span`.
        crc: zlib.crc32 of the bytes of the span.
    """

    path: str
    file_bytes: int
    start: int
    size: int
    crc: int
    page: Page | None = None


def dump(span: Span, image: bytes, root: str) -> bytes:
    """The reference to an image, as bytes."""
    crc = zlib.crc32(image) if span.crc < 0 else span.crc
    page = [] if span.page is None else [list(span.page)]
    fields = [_below(span.path, root), span.file_bytes, span.start, span.size, crc, *page]
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")  # names of files need not be UTF-8


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
    try:
        path, file_bytes, start, size, crc, *rest = bounded_json.loads(data)
        page = Page(*rest[0]) if rest else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"not a reference to an image: {error}") from None
    numbers = [file_bytes, start, size, crc, *((page[1:]) if page else ())]
    if not isinstance(path, str) or not all(map(_is_count, numbers)):
        raise ValueError(f"not a reference to an image: {data[:200]!r}")
    if start + size > file_bytes or (page and page.start + page.size > page.unpacked):
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


def is_place(path: str) -> bool:
    """Whether images may be read in place there: a stranger's index calls no address."""
    return not files.is_remote(path) or path.split("://", 1)[0] in _SCHEMES


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
