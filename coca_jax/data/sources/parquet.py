"""Parquet tables with images: HF's image struct, raw bytes, or paths of image files."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import posixpath
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from absl import logging
from etils import epy

from coca_jax.data.sources import files, formats, lists
from coca_jax.data.sources.fields import (
    LABEL_FIELDS,
    LISTED_TEXTS,
    chosen,
    names,
    only,
    strings,
    take,
    text_column,
    without_bytes,
)
from coca_jax.data.sources.items import (
    Item,
    Options,
    Unit,
    guarded,
    load_image,
    open_readers,
    split_units,
)
from coca_jax.data.sources.references import Page, Span
from coca_jax.data.sources.registry import Format

with epy.lazy_imports():
    import pyarrow as pa
    import pyarrow.parquet as pq

# Where the values of a parquet column lie in the file: in its pages, each packed by itself.
#
# A value is found by its bytes, not by the encoding of its page, so that a place is right whatever
# wrote the file. The headers are Thrift's compact protocol:
# https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift


_CODECS = {0: "", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_MAX_FOOTER, _MAX_HEADER = 100 << 20, 16 << 20  # bytes
_MAX_PAGE = 128 << 20  # bytes of a page, packed or not; writers make them of about one MiB
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of pages
_BYTE_ARRAY = 6
_OPTIONAL, _REPEATED = 1, 2  # values of a column
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
        self._schema: list[Any] = []
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
            footer = _Thrift(handle.read(size)).struct()
            self._schema, self._groups = footer[2], footer[4]
        except (ValueError, IndexError, KeyError, struct.error):
            return

    @property
    def bytes(self) -> int:
        """Of the file."""
        return self._bytes

    def chunk(self, group: int, field: Sequence[str]) -> dict[int, Any] | None:
        """What the footer says of a group's column of bytes, by its path. Raises IndexError,
        KeyError, TypeError, ValueError for a damaged footer."""
        if self._handle is None:
            self._open()
        chunks = [chunk[3] for chunk in self._groups[group][1]]
        names = [part.encode() for part in field]
        return next((one for one in chunks if one[3] == names and one[1] == _BYTE_ARRAY), None)

    def levels(self, field: Sequence[str]) -> int | None:
        """The definition level of a value that is there; None of values in lists. Raises as
        `chunk`."""
        nodes, found = iter(self._schema[1:]), 0
        for depth, part in enumerate(field):
            for node in nodes:
                if node[4] == part.encode():
                    break
                _skip(nodes, node)
            if node.get(3) == _REPEATED or bool(node.get(5)) != (depth + 1 < len(field)):
                return None
            found += node.get(3) == _OPTIONAL
        return found

    def headers(self, chunk: dict[int, Any]) -> Iterator[tuple[int, dict[int, Any]]]:
        """(where its bytes begin, its header) of each page of images, or of a dictionary of them.
        Raises as `chunk`, and OSError."""
        position = min(chunk[9], chunk.get(11) or chunk[9])
        end = position + chunk[7]
        while 0 <= position < end:
            head, length = _header(self._handle, position, end)
            position += length
            if not 0 <= head[3] <= end - position:
                raise ValueError("a page beyond its column")
            if head[1] in (_DATA, _DICTIONARY, _DATA_2):
                yield position, head
            position += head[3]

    def values(self, group: int, name: str) -> Values:
        """The values of a column that the group has as bytes; a struct's field `bytes` counts as
        the struct, what is in a list as the list."""
        if self._handle is None:
            self._open()
        try:
            chunks = [chunk[3] for chunk in self._groups[group][1]]
            for chunk in chunks:
                column, *within = [part.decode() for part in chunk[3]]
                field = [part for part in within if part not in _OF_LISTS]
                if column == name and field in ([], ["bytes"]) and chunk[1] == _BYTE_ARRAY:
                    return Values(_pages(self._handle, chunk), self._path, self._bytes)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            pass  # damaged, which the reader of the rows says
        return Values(iter(()), self._path, self._bytes)


def _skip(nodes: Iterator[Any], node: dict[int, Any]) -> None:
    """Goes behind what is below a node of a schema."""
    for _ in range(node.get(5) or 0):
        _skip(nodes, next(nodes))


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
        statistics = head.get(8, {})
        plain = statistics.get(5, 0) + statistics.get(6, 0)
        codec = codec if statistics.get(7, True) else ""
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


ROWS_PER_UNIT = 4096
IMAGE_FIELDS = (
    *("image", "img", "jpg", "png", "bytes", "image_bytes"),
    *("file_name", "filepath", "path", "images"),
)
PATTERNS = ("*.parquet",)
# Columns of what `recaption --to=parquet` wrote: its `text` alone is what an image keeps.
_RECAPTIONED = {"text", "captions", "originals", "scores", "source"}
_BATCH_BYTES = 256 << 20  # of a batch, were each of its rows as large as its whole row group
_MAX_UNPACKED, _MAX_RATIO = 1 << 30, 100  # of a row group that is more of a bomb than pictures


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of parquet files: ranges of rows. A file that cannot be read is one of them.

    Raises:
        FileNotFoundError: no parquet file.
        ValueError: one that has no such column.
    """
    units, root = [], formats.root_of(path)
    for file in files.find(path, PATTERNS, split):
        try:
            with files.open_binary(file) as handle:
                table = _open(handle)
                columns, rows = table.schema_arrow.names, table.metadata.num_rows
                first = _first_texts(table)
        except ValueError:
            units.append(Unit(file, rows=1))  # `read` says what is wrong with it
            continue
        images = options.image_field.split(",")
        for field in (*images, options.text_field, options.label_field):
            if field and field not in columns:
                raise ValueError(f"{file}: no column {field!r}; it has {columns}")
        lists.refuse_urls(file, first, options)
        if not options.image_field and not set(IMAGE_FIELDS) & set(columns):
            raise ValueError(f"{file}: which column holds images? --image_field of {columns}")
        units += split_units(file, rows, ROWS_PER_UNIT, root)
    return units


def _open(handle: Any) -> pq.ParquetFile:
    """Raises ValueError: not a parquet file, or a damaged one."""
    try:
        return pq.ParquetFile(
            handle, thrift_string_size_limit=100 << 20, thrift_container_size_limit=1 << 20
        )
    except Exception as error:  # several of pyarrow's, which have no common base
        raise ValueError(f"not a parquet file: {error}") from None


def _first_texts(table: pq.ParquetFile) -> list[dict[str, Any]]:
    """The first row of a table that can only name its images: its texts. None of a table with a
    column of bytes or structs for them, and of one that is empty or damaged."""
    kinds = dict(zip(table.schema_arrow.names, table.schema_arrow.types))
    texts = [n for n, k in kinds.items() if pa.types.is_string(k) or pa.types.is_large_string(k)]
    if set(IMAGE_FIELDS) & (kinds.keys() - set(texts)):
        return []
    with contextlib.suppress(Exception):  # several of pyarrow's; `read` says what is wrong
        batch = next(table.iter_batches(1, columns=texts, use_threads=False), None)
        return batch.to_pylist() if batch is not None else []
    return []


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the ClassLabel columns, from the schema metadata that HF datasets write. Metadata
    of another shape say nothing, which a warning tells."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    found: dict[str, list[str]] = {}
    try:
        features = json.loads(metadata)["info"]["features"] if metadata else {}
        for column, feature in features.items():
            while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
                feature = feature["feature"]  # a sequence of labels
            if isinstance(feature, list) and feature:
                feature = feature[0]
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                listed = feature.get("names")
                if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
                    found[column] = list(listed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logging.warning("the metadata 'huggingface' of a parquet file are damaged: %r", error)
    return found


def declared_classes(unit: Unit, options: Options) -> list[str]:
    """The class names that the first file declares for the label column, in order."""
    try:
        with files.open_binary(unit.path) as handle:
            found = class_names(_open(handle).schema_arrow)
    except ValueError:
        found = {}
    wanted = (options.label_field,) if options.label_field else LABEL_FIELDS
    return next((found[name] for name in wanted if name in found), list(options.class_names))


def joined(units: Sequence[Unit]) -> list[Unit]:
    """The units with those in one that follow each other in a file: each reads the rows of its
    first row group from their beginning on, and pandas writes a million rows in one group."""
    found: list[Unit] = []
    for unit in units:
        last = found[-1] if found else None
        if last and last.path == unit.path and last.stop == unit.start > 0:
            rows = last.rows + unit.rows
            found[-1] = dataclasses.replace(last, stop=unit.stop, rows=rows)
        else:
            found.append(unit)
    return found


class _Reader:
    """A file and how far its rows have been read: `number` is that of the next one."""

    def __init__(self, path: str):
        """Raises ValueError: not a parquet file, or a damaged one."""
        self._opened = contextlib.ExitStack()
        self._handle = self._opened.enter_context(files.open_binary(path))
        self._bytes = files.size(path)
        try:
            self.table = _open(self._handle)
            self.classes = class_names(self.table.schema_arrow)
        except ValueError:
            self.close()
            raise
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._group, self.number = -1, 0

    def close(self) -> None:
        self._opened.close()

    def go_to(self, group: int, first: int, row: int) -> None:
        """To a row of a group, or to one before it. first: of the group."""
        if self._group != group or self.number > row:
            self._batches = _batches(self.table, group, self._bytes)
            self._group, self.number = group, first

    def batch(self) -> pa.RecordBatch | None:
        """The next rows of the group, None behind its last ones. Raises what pyarrow does."""
        group, self._group = self._group, -1  # behind an error there is no way on
        found = next(self._batches, None)
        if found is not None:
            self._group = group
            self.number += found.num_rows
        return found

    def give_back(self, batch: pa.RecordBatch) -> None:
        """Rows that the next unit wants too."""
        self._batches = itertools.chain([batch], self._batches)
        self.number -= batch.num_rows


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of rows. A damaged row group ends with one problem item."""
    held = open_readers.get()
    key = f"{unit.path} {files.mark(unit.path)}" if held is not None else ""
    reader = held.pop(key, None) if held is not None else None
    if reader is None:
        try:
            reader = _Reader(unit.path)
        except ValueError as error:
            name = posixpath.basename(unit.path)
            yield Item(name, problem="damaged_archive", detail=str(error))
            return
    with contextlib.ExitStack() as opened:
        opened.callback(reader.close)
        yield from _rows(reader, unit, options)
        if held is not None and unit.stop < reader.table.metadata.num_rows:
            for other in [*held]:
                held.pop(other).close()
            held[key] = reader
            opened.pop_all()


def _rows(reader: _Reader, unit: Unit, options: Options) -> Iterator[Item]:
    base, first = posixpath.basename(unit.path), 0
    with contextlib.closing(Columns(unit.path)) as columns:
        for group in range(reader.table.num_row_groups):
            start, first = first, first + reader.table.metadata.row_group(group).num_rows
            if start >= unit.stop or first <= unit.start:
                continue
            reader.go_to(group, start, max(start, unit.start))
            places = _Places(columns, group, options)
            while (number := reader.number) < min(first, unit.stop):
                try:
                    batch = reader.batch()
                except Exception as error:  # several of pyarrow's
                    detail = f"row group {group}: {type(error).__name__}: {error}"
                    where = f"{base}#{max(number, unit.start)}"
                    yield Item(where, problem="damaged_archive", detail=detail)
                    break
                if batch is None:
                    detail = f"row group {group} ends {first - number} rows early"
                    yield Item(f"{base}#{number}", problem="damaged_archive", detail=detail)
                    break
                for row in range(max(unit.start - number, 0), batch.num_rows):
                    if number + row < unit.stop:
                        key, one = f"{base}#{number + row}", batch.slice(row, 1)
                        item = guarded(
                            key,
                            lambda: row_item(key, one, unit, options, reader.classes),  # noqa: B023
                        )
                        yield places.tell(item, one) if options.in_place else item
                if reader.number > unit.stop:
                    reader.give_back(batch)
                    return


def index_rows(unit: Unit, options: Options, root: str) -> Iterator[Any]:
    """See `parquet_index.rows`."""
    from coca_jax.data.sources import parquet_index  # which reads what is unusual by this module

    yield from parquet_index.rows(unit, options, root)


def column(unit: Unit, name: str) -> Iterator[Any]:
    """The values of a column in a range of rows, but for those behind damage; none where there is
    no such column."""
    with files.open_binary(unit.path) as handle, contextlib.suppress(Exception):  # of pyarrow
        table, number = _open(handle), 0
        if name not in table.schema_arrow.names:
            return
        for batch in table.iter_batches(ROWS_PER_UNIT, columns=[name], use_threads=False):
            values = batch.column(0).to_pylist()
            yield from values[max(unit.start - number, 0) : max(unit.stop - number, 0)]
            number += len(values)


class _Places:
    """Where the images of a row group lie, of rows that hold their bytes."""

    def __init__(self, columns: Columns, group: int, options: Options):
        self._columns, self._group = columns, group
        self._first, _, self._second = options.image_field.partition(",")
        self._known: dict[tuple[str, bool], Values] = {}

    def tell(self, item: Item, row: pa.RecordBatch) -> Item:
        """The item of a row, which says where its images lie."""
        if not item.problem:
            if item.image and not item.span:
                there = [name for name in IMAGE_FIELDS if name in row.schema.names]
                values = {name: row.column(name)[0].as_py() for name in there}
                field = chosen(values, self._first, there)
                item.span = self._values(field).find(item.image)
            if item.second and not item.second_span:
                item.second_span = self._values(self._second, True).find(item.second)
        return item

    def _values(self, field: str, second: bool = False) -> Values:
        if (field, second) not in self._known:
            self._known[field, second] = self._columns.values(self._group, field)
        return self._known[field, second]


def _batches(table: pq.ParquetFile, group: int, file_bytes: int) -> Iterator[pa.RecordBatch]:
    """The rows of a group, few at a time: a value that stands once in a file can be in each row.

    Raises:
        ValueError: the group unpacks to far more than it is.
    """
    # Not asked of its columns: where what they say is damaged, pyarrow ends the process (26.0).
    size = table.metadata.row_group(group).total_byte_size
    if size > _MAX_UNPACKED and size > _MAX_RATIO * file_bytes:
        raise ValueError(f"it unpacks to {size} bytes, in a file of {file_bytes}")
    rows = max(1, min(16, _BATCH_BYTES // max(size, 1)))
    yield from table.iter_batches(rows, row_groups=[group], use_threads=False)


def row_item(
    key: str, one: pa.RecordBatch, unit: Unit, options: Options, classes: dict[str, list[str]]
) -> Item:
    """The item of a row, a batch of one."""
    try:
        values = fields(one)
    except UnicodeDecodeError as error:
        return Item(key, problem="bad_utf8", detail=str(error))
    first, _, second = options.image_field.partition(",")
    image, other = take(values, first, IMAGE_FIELDS), take(values, second, ())
    item = described(key, values, options, classes)
    if item.problem:
        return item
    _load(item, image, unit, options)
    if second and not item.problem:
        found = _load(Item(key), other, unit, options)
        item.second, item.problem, item.detail = found.image, found.problem, found.detail
        item.second_span = found.span
    return item


def described(
    key: str, fields: dict[str, Any], options: Options, classes: dict[str, list[str]]
) -> Item:
    """The item of a row but for its images, whose fields are taken already."""
    # Of an image that keeps no text the captions that it did not keep are none either.
    if _RECAPTIONED <= fields.keys():
        text = options.text_field or LISTED_TEXTS[0]
    else:
        text = text_column(fields, options.text_field, LISTED_TEXTS)
    item = Item(key, texts=strings(take(fields, text, ())))
    label_field = options.label_field or next((f for f in LABEL_FIELDS if f in fields), "")
    known = classes.get(label_field) or options.class_names
    try:
        item.labels = names(fields.pop(label_field, None), known)
    except ValueError as error:
        item.problem, item.detail = "bad_label", str(error)
        return item
    item.extra = without_bytes(fields)
    return item


def fields(one: pa.RecordBatch) -> dict[str, Any]:
    """The fields of a row. A map, which Arrow gives as pairs, is an object as a struct is: its keys
    are no texts."""
    fields = one.to_pylist()[0]
    for name, kind in zip(one.schema.names, one.schema.types):
        if pa.types.is_map(kind) and fields[name] is not None:
            fields[name] = {str(key): value for key, value in fields[name]}
    return fields


def _load(item: Item, image: Any, unit: Unit, options: Options) -> Item:
    """Puts an image into the item: HF's struct, bytes, the path of a file, or a list of one."""
    image = only(image)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        item.image = image
    elif isinstance(image, str) and image:
        load_image(item, posixpath.dirname(unit.path), image, unit, options)
    else:
        item.problem = "missing_image"
        what = f"{type(image).__name__}: neither bytes nor a path"
        if isinstance(image, list):
            what = f"a list of {len(image)}, and an example has one"
        item.detail = f"the image of the row is {what}"
    return item


FORMATS = (
    Format(
        *("parquet", plan, read, PATTERNS, 2),
        package=("pyarrow", "parquet"),
        column=column,
        index_rows=index_rows,
        joined=joined,
        declared_classes=declared_classes,
    ),
)
