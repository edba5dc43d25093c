"""Parquet tables with images: HF's image struct, raw bytes, or paths of image files."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from coca_jax.data import files, formats, named_files
from coca_jax.importers import named_fields, parquet_pages
from coca_jax.importers.items import (
    LABEL_FIELDS,
    LISTED_TEXTS,
    Item,
    Options,
    Unit,
    chosen,
    guarded,
    load_image,
    names,
    only,
    open_readers,
    split_units,
    strings,
    take,
    text_column,
    without_bytes,
)

ROWS_PER_UNIT = 4096
IMAGE_FIELDS = (
    *("image", "img", "jpg", "png", "bytes", "image_bytes"),
    *("file_name", "filepath", "path", "images"),
)
PATTERNS = formats.PATTERNS["parquet"]
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
    units, root = [], named_files.root_of(path)
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
        named_fields.refuse_urls(file, first, options)
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
    with contextlib.closing(parquet_pages.Columns(unit.path)) as columns:
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
                            lambda: _row(key, one, unit, options, reader.classes),  # noqa: B023
                        )
                        yield places.tell(item, one) if options.in_place else item
                if reader.number > unit.stop:
                    reader.give_back(batch)
                    return


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

    def __init__(self, columns: parquet_pages.Columns, group: int, options: Options):
        self._columns, self._group = columns, group
        self._first, _, self._second = options.image_field.partition(",")
        self._known: dict[tuple[str, bool], parquet_pages.Values] = {}

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

    def _values(self, field: str, second: bool = False) -> parquet_pages.Values:
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


def _row(
    key: str, one: pa.RecordBatch, unit: Unit, options: Options, classes: dict[str, list[str]]
) -> Item:
    try:
        fields = _fields(one)
    except UnicodeDecodeError as error:
        return Item(key, problem="bad_utf8", detail=str(error))
    first, _, second = options.image_field.partition(",")
    image, other = take(fields, first, IMAGE_FIELDS), take(fields, second, ())
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
    _load(item, image, unit, options)
    if second and not item.problem:
        found = _load(Item(key), other, unit, options)
        item.second, item.problem, item.detail = found.image, found.problem, found.detail
        item.second_span = found.span
    return item


def _fields(one: pa.RecordBatch) -> dict[str, Any]:
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
