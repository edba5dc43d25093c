"""The rows of a parquet table for an index, without reading an image.

Of the column of images only the headers of its pages are read: which rows a page has, how it is
packed. Where in the page an image lies is found when training reads it (in_place.py). The other
columns are read whole batches at a time, as a row by itself takes a hundred times as long.

What is unusual goes the way of parquet.py, row by row: row groups whose images stand in lists, in
encodings that nobody writes by default, or are missing in some rows; and batches whose texts or
labels are not all there.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epy

from coca_jax.data.sources import parquet, references
from coca_jax.data.sources.fields import (
    CAPTION_COLUMN,
    LABEL_FIELDS,
    LISTED_TEXTS,
    names,
    plain_json,
    strings,
    without_bytes,
)
from coca_jax.data.sources.items import Item, Options, Rows, Unit, guarded

with epy.lazy_imports():
    import pyarrow as pa

_BATCH_ROWS = 4096
_ENCODINGS = {0: references.PLAIN, 2: references.DICTIONARY, 8: references.DICTIONARY}
_LARGE = 1024  # bytes of a value, on average, that are more of an image than of a text


class _Page(NamedTuple):
    """A page: its rows, the place of its first one, and what stands before and behind the number of
    a row in the reference to it."""

    rows: int
    span: references.Span
    before: bytes
    behind: bytes


class _Group(NamedTuple):
    """A row group: its number, its first row, how many it has, and the pages of its images; None
    where the headers do not tell the images' places."""

    number: int
    first: int
    rows: int
    pages: list[_Page] | None


def rows(unit: Unit, options: Options, root: str) -> Iterator[Rows | Item]:
    """The rows of a range, in their order, as `parquet.read` gives them.

    root: below which the index names files.
    """
    base = posixpath.basename(unit.path)
    try:
        reader = parquet._Reader(unit.path)
    except ValueError as error:
        yield Item(base, problem="damaged_archive", detail=str(error))
        return
    try:
        groups = _groups(reader, unit, options, root)
        for group in groups:
            start, stop = max(unit.start, group.first), min(unit.stop, group.first + group.rows)
            part = Unit(unit.path, start, stop, stop - start, unit.root)
            if group.pages is None:
                yield from parquet.read(part, options)
            else:
                yield from _of_group(reader, group, part, options)
    finally:
        reader.close()


def _groups(reader: Any, unit: Unit, options: Options, root: str) -> list[_Group]:
    """The row groups that the rows of a unit are in."""
    columns = parquet.Columns(unit.path)
    try:
        field, known = _image_field(reader.table.schema_arrow, options), True
        found, first = [], 0
        for number in range(reader.table.num_row_groups):
            count = reader.table.metadata.row_group(number).num_rows
            if first < unit.stop and unit.start < first + count:
                pages = None
                if field and known:
                    pages = _pages(columns, number, count, field, unit.path, root)
                found.append(_Group(number, first, count, pages))
            first += count
        return found
    finally:
        columns.close()


def _image_field(schema: pa.Schema, options: Options) -> list[str]:
    """The path of the column of images' bytes; [] where it is no such column."""
    if "," in options.image_field:
        return []
    named = [options.image_field] if options.image_field else parquet.IMAGE_FIELDS
    name = next((name for name in named if name in schema.names), "")
    if not name:
        return []
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return [name, "bytes"] if _is_bytes(kind.field("bytes").type) else []
    return [name] if _is_bytes(kind) else []


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _pages(
    columns: Any, group: int, count: int, field: list[str], path: str, root: str
) -> list[_Page] | None:
    """The pages of a group's images, as of `_Group`."""
    try:
        chunk = columns.chunk(group, field)
        levels = columns.levels(field)
        if chunk is None or levels is None or chunk.get(12, {}).get(3):  # rows without an image
            return None
        codec = parquet._CODECS[chunk[4]]
        dictionary: tuple[Any, ...] = ()
        found, read = [], 0
        for start, head in columns.headers(chunk):
            size, unpacked = head[3], head[2]
            if head[1] == parquet._DICTIONARY:
                dictionary = (start, size, unpacked, codec)
                continue
            header = head[5] if head[1] == parquet._DATA else head[8]
            second = head[1] == parquet._DATA_2
            encoding = _ENCODINGS[header[4] if second else header[2]]
            if not second and levels and header[3] != 3:  # as very old writers pack levels
                return None
            plain = header[5] + header.get(6, 0) if second else 0
            packed = codec if not second or header.get(7, True) else ""
            cell = references.Cell(
                packed, plain, unpacked, 0, header[1], encoding, levels, not second, ()
            )
            if encoding == references.DICTIONARY:
                cell = cell._replace(dictionary=dictionary)  # type: ignore[arg-type]
            span = references.Span(path, columns.bytes, start, size, cell, references.UNKNOWN)
            references.load(references.dump(span, b"", root), root)  # as a reader will
            found.append(_Page(header[1], span, *references.around_row(span, root)))
            read += header[1]
    except (KeyError, IndexError, TypeError, ValueError, OSError):
        return None
    return found if read == count else None


def _of_group(reader: Any, group: _Group, unit: Unit, options: Options) -> Iterator[Rows | Item]:
    """The rows of a unit, which is within a group."""
    columns = _other_columns(reader, group.number, options)
    if not columns:  # images alone; the rows say what is missing
        yield from parquet.read(unit, options)
        return
    number, places = group.first, _Places(group)
    batches = reader.table.iter_batches(
        _BATCH_ROWS, row_groups=[group.number], columns=columns, use_threads=False
    )
    while number < unit.stop:
        try:
            batch = next(batches)
            first, number = number, number + batch.num_rows
            if number <= unit.start:
                continue
            start, stop = max(unit.start, first), min(unit.stop, number)
            found = _Batch(batch.slice(start - first, stop - start), start, unit, options, reader)
            chosen = found.rows()
        except Exception:  # several of pyarrow's; `parquet.read` says what is wrong with these rows
            rest = Unit(unit.path, max(unit.start, first), unit.stop, root=unit.root)
            yield from parquet.read(rest, options)
            return
        yield from found.split(chosen, places, start - group.first)


class _Places:
    """The references to a group's images, by their rows."""

    def __init__(self, group: _Group):
        self._pages = group.pages or []
        self._ends = list(itertools.accumulate(page.rows for page in self._pages))

    def of(self, start: int, count: int) -> list[bytes]:
        """Those of `count` rows from `start` on."""
        found: list[bytes] = []
        for page, end in zip(self._pages, self._ends):
            first = end - page.rows
            low, high = max(start - first, 0), min(start + count - first, page.rows)
            found += [b"%b%d%b" % (page.before, row, page.behind) for row in range(low, high)]
        return found

    def span(self, row: int) -> references.Span:
        """Where one of them is."""
        number = bisect.bisect_right(self._ends, row)
        page = self._pages[number]
        cell = page.span.page._replace(row=row - self._ends[number] + page.rows)  # type: ignore
        return page.span._replace(page=cell)


def _other_columns(reader: Any, group: int, options: Options) -> list[str]:
    """The columns but for those of images."""
    schema, found = reader.table.schema, []
    image = _image_field(reader.table.schema_arrow, options)[0]
    sizes = reader.table.metadata.row_group(group)
    for number in range(len(schema)):
        column = schema.column(number)
        name = column.path.split(".")[0]
        of_bytes = column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
        large = of_bytes and sizes.column(number).total_uncompressed_size > _LARGE * sizes.num_rows
        if name != image and not large:
            found.append(column.path)
    return found


class _Batch:
    """Rows of a table without their images, the first of which has the number `first`."""

    def __init__(
        self, batch: pa.RecordBatch, first: int, unit: Unit, options: Options, reader: Any
    ):
        self._batch, self._first, self._options = batch, first, options
        self._base, self._classes = posixpath.basename(unit.path), reader.classes
        self._names = batch.schema.names
        self._values = {
            name: _plain(column.to_pylist(), kind)
            for name, column, kind in zip(self._names, batch.columns, batch.schema.types)
        }

    def rows(self) -> list[tuple[list[str], tuple[str, ...], str] | None]:
        """The texts, labels and further fields of each row; None of one that has to be looked at
        by itself."""
        count, options = self._batch.num_rows, self._options
        found = self._columns()
        if found is None:
            return [None] * count
        text, label = found
        texts: list[list[str] | None] = [[]] * count
        if text:
            texts = list(map(_texts, self._values[text]))
        labels: list[tuple[str, ...] | None] = [()] * count
        if label:
            known = tuple(self._classes.get(label) or options.class_names)
            labels = [_labels(value, known) for value in self._values[label]]
        rest = [name for name in self._names if name not in (text, label)]
        extras = ["{}"] * count
        if rest:
            fields = zip(*(self._values[name] for name in rest))
            extras = [plain_json(without_bytes(dict(zip(rest, row)))) for row in fields]
        shortest, longest = max(options.min_text, 1), options.max_text
        result: list[tuple[list[str], tuple[str, ...], str] | None] = []
        for caption, named, extra in zip(texts, labels, extras):
            sound = caption is not None and named is not None and (caption if text else named)
            if sound and all(
                shortest <= len(one) <= longest and "\ufffd" not in one for one in caption
            ):
                lacks = {"text": not caption, "label": not named}.get(options.require, False)
                result.append(None if lacks else (caption, named, extra))
            else:
                result.append(None)
        return result

    def _columns(self) -> tuple[str, str] | None:
        """The columns of texts and of labels, '' for none; None where that differs by row."""
        there, options = self._names, self._options
        if "." in options.text_field or "." in options.label_field:
            return None
        usual = [name for name in LISTED_TEXTS if name in there]
        like = [name for name in there if CAPTION_COLUMN.search(name)]
        if options.text_field or parquet._RECAPTIONED <= {*there}:
            text = options.text_field or LISTED_TEXTS[0]
        elif len(usual) > 1 or (not usual and len(like) > 1):
            return None
        else:
            text = next(iter(usual or like), "")
        label = options.label_field or next((name for name in LABEL_FIELDS if name in there), "")
        if text == label:
            return None
        return text if text in there else "", label if label in there else ""

    def split(
        self,
        chosen: Sequence[tuple[list[str], tuple[str, ...], str] | None],
        places: _Places,
        start: int,
    ) -> Iterator[Rows | Item]:
        """The rows in their order, of which several that are sound follow one another as one.

        start: of the first of them in its group."""
        images = places.of(start, len(chosen))
        number = 0
        for odd, group in itertools.groupby(chosen, lambda one: one is None):
            some = list(group)
            keys = [f"{self._base}#{self._first + number + n}" for n in range(len(some))]
            if odd:
                for n, key in enumerate(keys, number):
                    yield guarded(key, lambda: self._item(key, n, places.span(start + n)))  # noqa: B023
            else:
                columns = zip(*some)  # type: ignore[arg-type]
                yield Rows(keys, *map(list, columns), images[number : number + len(some)])  # type: ignore
            number += len(some)

    def _item(self, key: str, row: int, span: references.Span) -> Item:
        fields = {name: values[row] for name, values in self._values.items()}
        item = parquet.described(key, fields, self._options, self._classes)
        item.span = span
        return item


def _plain(values: list[Any], kind: pa.DataType) -> list[Any]:
    """A map, which Arrow gives as pairs, is an object as a struct is: its keys are no texts."""
    if not pa.types.is_map(kind):
        return values
    return [one and {str(key): value for key, value in one} for one in values]


def _texts(value: Any) -> list[str] | None:
    """As records have them; None of what is no text."""
    if isinstance(value, str):
        value = " ".join(value.split())
        return [value] if value else []
    try:
        found = [" ".join(one.split()) for one in strings(value)]
    except ValueError:
        return None
    return [one for one in found if one]


def _labels(value: Any, known: tuple[str, ...]) -> tuple[str, ...] | None:
    """As records have them; None of what is no label."""
    try:
        if isinstance(value, (str, int, type(None))):
            return _label(value, known)
        return _label.__wrapped__(value, known)
    except ValueError:
        return None


@functools.lru_cache(maxsize=1 << 16, typed=True)
def _label(value: Any, known: tuple[str, ...]) -> tuple[str, ...] | None:
    found = [" ".join(label.split()) for label in names(value, known)]
    if any("\ufffd" in label for label in found):
        return None
    return tuple(dict.fromkeys(label for label in found if label))
