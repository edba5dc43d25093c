"""Lists that name image files: CSV and TSV, lines of JSON, and JSON files (COCO's captions, Karpathy's
lists, arrays of objects such as LLaVA's). READERS has one reader for each.

Lines and rows are bounded, and one that is damaged does not end its list: it becomes an item with a
problem. A metadata.jsonl or metadata.csv of an image folder is read by the same functions.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import copy
import csv
import functools
import itertools
import json
import posixpath
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias

from coca_jax.data.sources import files, formats
from coca_jax.data.sources.fields import (
    LABEL_FIELDS,
    LISTED_TEXTS,
    is_field,
    names,
    only,
    strings,
    take,
    text_column,
)
from coca_jax.data.sources.items import Item, Options, Unit, guarded, load_image, split_units
from coca_jax.data.sources.registry import Format
from coca_jax.runtime import bounded_json

_CSV, _JSONL, _JSON = ("*.csv", "*.tsv"), ("*.jsonl",), ("*.json",)
ROWS_PER_UNIT = 2048
BYTES_PER_UNIT = 64 << 20
MAX_ROW_BYTES = bounded_json.MAX_BYTES  # of a row; more is damage
_BLOCK = 1 << 20
_MAX_JSON_BYTES = 1 << 30  # of a JSON list, which is read as a whole
_LOOK_AT = 20  # first rows: of which one names an image that exists, or each gives a URL
_MOST_SHOWN = 100  # fields in a message
_KINDS = (
    'an array of objects as lines of .jsonl have them, COCO\'s captions {"images": [{id, '
    'file_name}], "annotations": [{image_id, caption}]}, or Karpathy\'s {"images": [{filename, '
    "sentences}]}"
)
Row: TypeAlias = dict[str, str] | csv.Error
_Row: TypeAlias = dict[str, Any] | csv.Error


def plan_csv(path: str, split: str, options: Options) -> list[Unit]:
    """Units of CSV and TSV lists: ranges of rows. Raises FileNotFoundError, ValueError as `_plan`."""
    return _plan(path, _csv_lists(path, split), _csv_objects, csv_units, options)


def plan_jsonl(path: str, split: str, options: Options) -> list[Unit]:
    """Units of lists with a JSON object a line: ranges of lines. Raises as `_plan`."""
    lists = files.find(path, _JSONL, split)
    return _plan(path, lists, _line_objects, line_units, options)


def plan_json(path: str, split: str, options: Options) -> list[Unit]:
    """Units of lists that are one JSON value: ranges of rows. Raises as `_plan`."""

    def units(file: str, root: str) -> list[Unit]:
        return split_units(file, len(_parsed(file)), ROWS_PER_UNIT, root)

    return _plan(path, _json_lists(path, split), _objects, units, options)


def plan_metadata(path: str, found: Sequence[str], options: Options) -> list[Unit]:
    """Units of the metadata files of an image folder, CSV or lines of JSON. Raises as `_plan`."""

    def units(file: str, root: str) -> list[Unit]:
        return line_units(file, root) if _has_lines(file) else csv_units(file, root)

    def rows(file: str) -> Iterator[Mapping[str, Any]]:
        return _line_objects(file) if _has_lines(file) else _csv_objects(file)

    return _plan(path, found, rows, units, options)


def _has_lines(file: str) -> bool:
    return file.lower().endswith(".jsonl")


def _plan(
    path: str,
    lists: Sequence[str],
    rows: Callable[[str], Iterable[Mapping[str, Any]]],
    units: Callable[[str, str], list[Unit]],
    options: Options,
) -> list[Unit]:
    """The units of the lists of an input. rows, units: of one of them.

    Raises:
        FileNotFoundError: there is no list.
        ValueError: a file is no such list, no row has a field that is named, or the images are
            URLs.
    """
    root = formats.root_of(path)
    check(path, itertools.chain.from_iterable(map(rows, lists)), options)
    for file in lists:
        refuse_urls(file, rows(file), options)
    return [unit for file in lists for unit in units(file, root)]


def _csv_lists(path: str, split: str) -> list[str]:
    try:
        return files.find(path, _CSV, split)
    except FileNotFoundError:
        system, plain = files.filesystem(path)
        if not system.isdir(plain) or not (found := formats.text_lists(path)):
            raise
        return found


def line_units(path: str, root: str) -> list[Unit]:
    """Byte ranges of a file of lines."""
    units, start, first, position, rows = [], 0, 0, 0, 0
    with files.open_binary(path) as file:
        refuse_utf16(path, file)
        for number, (line, size) in enumerate(lines(file), 1):
            position += size
            rows += line is None or bool(line.strip())
            if rows == ROWS_PER_UNIT or position - start >= BYTES_PER_UNIT:
                units.append(Unit(path, start, position, rows, root, line=first))
                start, first, rows = position, number, 0
    if rows:
        units.append(Unit(path, start, position, rows, root, line=first))
    return units


def csv_units(path: str, root: str) -> list[Unit]:
    """Ranges of the rows of a table, each with the byte at which they begin."""
    units, start, offset, stop, behind = [], 0, 0, 0, 0
    for stop, (_, behind) in enumerate(csv_places(path), 1):
        if stop - start >= ROWS_PER_UNIT and behind >= 0:
            units.append(Unit(path, start, stop, stop - start, root, offset=offset))
            start, offset = stop, behind
    if stop > start:
        units.append(Unit(path, start, stop, stop - start, root, offset=offset))
    return units


def json_splits(path: str) -> list[str]:
    """The splits that the names of a folder's lists tell, [] where they tell none."""
    if not _is_folder(path):
        return files.splits_in_names(path, _JSON)
    return sorted({*map(_split_of, formats.caption_lists(path))} - {""})


def _json_lists(path: str, split: str) -> list[str]:
    """The lists of an input for a split."""
    if not _is_folder(path):
        return files.find(path, _JSON, split)
    found = formats.caption_lists(path)
    if split and any(map(_split_of, found)):
        wanted = files.SPLITS.get(split.lower(), split)
        found = [file for file in found if _split_of(file) == wanted]
    if not found:
        of_split = f" for split {split!r}" if split else ""
        raise FileNotFoundError(
            f"{path}: no JSON list of captions{of_split} in it or next to it. Give the list: "
            f"{path}/NAME.json."
        )
    return found


def _is_folder(path: str) -> bool:
    system, plain = files.filesystem(path)
    return not files.is_pattern(path) and system.isdir(plain)


def _split_of(file: str) -> str:
    return files.split_of(posixpath.basename(file))


def _objects(file: str) -> list[dict[str, Any]]:
    return [row for row in _parsed(file) if isinstance(row, dict)]


def json_located(unit: Unit, options: Options) -> Iterator[Located]:
    """The items of a range of rows without their images."""
    mark = files.mark(unit.path)
    found, folder = _json_rows(unit.path, mark), _folder(unit.path, unit.root, mark)
    for number in range(unit.start, min(unit.stop, len(found))):
        fields = found[number]
        own = fields if isinstance(fields, csv.Error) else dict(fields)  # of which some are taken
        yield row(unit, number, own, options, folder)
    if unit.stop >= len(found):
        _json_rows.cache_clear()  # it is large, and a run that reads it here has no use for it


@functools.lru_cache(maxsize=1)
def _json_rows(path: str, mark: str) -> Sequence[_Row]:
    """`_parsed`, kept for the next range of rows."""
    return _parsed(path)


def _parsed(path: str) -> Sequence[_Row]:
    """The rows of a list; errors in the place of those that are none. Raises ValueError where the
    file is no list."""
    try:
        found = bounded_json.loads(files.read_bounded(path, _MAX_JSON_BYTES).decode("utf-8-sig"))
    except files.TooLarge as error:
        raise ValueError(f"{error}; write an object a line, as .jsonl") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON in UTF-8 ({error}); lines of JSON are called .jsonl, or read by "
            "`coca-jax prepare --format=jsonl`"
        ) from None
    if isinstance(found, list):
        return [_object(one) for one in found]
    listed = found.get("images") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        there = f"an object of {', '.join(sorted(found)[:8])}" if isinstance(found, dict) else found
        raise ValueError(f"{path} holds {str(there)[:200]}; give {_KINDS}")
    images = [_with_file_name(_object(one)) for one in listed]
    annotations = found.get("annotations")
    return _with_captions(path, images, annotations) if annotations else images


def _object(value: Any) -> _Row:
    if isinstance(value, dict):
        return value
    return csv.Error(f"not a JSON object, but a {type(value).__name__}")


def _with_file_name(image: _Row) -> _Row:
    """An image of Karpathy's lists, which has its folder and name apart, under COCO's name."""
    if isinstance(image, csv.Error) or not isinstance(image.get("filename"), str):
        return image
    rest = {k: v for k, v in image.items() if k not in ("filename", "filepath")}
    folder = image.get("filepath")
    name = posixpath.join(folder if isinstance(folder, str) else "", image["filename"])
    return {"file_name": name} | rest


def _with_captions(path: str, images: Sequence[_Row], annotations: Any) -> list[_Row]:
    """COCO's images, each with the captions that name its id. Raises ValueError where none is."""
    captions: dict[str, list[Any]] = {}
    bad: list[_Row] = []
    for number, one in enumerate(annotations if isinstance(annotations, list) else ()):
        if isinstance(one, dict) and one.get("caption"):
            captions.setdefault(str(one.get("image_id")), []).append(one["caption"])
        else:
            bad.append(csv.Error(f"annotation {number} is no object with a caption"))
    if not captions:
        raise ValueError(f"{path}: none of its annotations has a caption; give captions_*.json")
    for image in images:
        if isinstance(image, dict):
            image |= {"caption": captions.pop(str(image.get("id")), [])}
    lost = [csv.Error(f"no image has the id {name}, which captions name") for name in captions]
    return [*images, *bad, *lost]


@functools.lru_cache(maxsize=1)
def _folder(path: str, root: str, mark: str) -> str:
    """The folder from which a list names its pictures: its own, that of its split as COCO has it
    (train2017 of captions_train2017.json), or else the root."""
    split = posixpath.splitext(posixpath.basename(path))[0].rpartition("_")[2]
    rows = [
        dict(row) for row in _json_rows(path, mark)[:_LOOK_AT] if not isinstance(row, csv.Error)
    ]
    names = [only(row[formats.image_field(row)]) for row in rows if formats.image_field(row)]
    named = [name for name in names if isinstance(name, str)]
    within = [name for name in named if not posixpath.isabs(name) and "://" not in name]
    for folder in (posixpath.dirname(path) or ".", files.join(root, split)):
        with contextlib.suppress(ValueError):  # a name that cannot be a path
            if any(files.exists(files.join(folder, name)) for name in within):
                return folder
    return root


class Located:
    """An item without its image, and the name of its image's file, relative to a folder; of a pair
    that of the other image as well."""

    def __init__(self, item: Item, folder: str = "", name: Any = "", second: Any = ""):
        self.item, self.folder, self.name, self.second = item, folder, name, second

    def load(self, unit: Unit, options: Options) -> Item:
        """The item with its image or images, unless it has a problem already."""
        item = copy.copy(self.item)
        if not item.problem:
            load_image(item, self.folder, self.name, unit, options)
        if self.second and not item.problem:
            other = load_image(Item(item.key), self.folder, self.second, unit, options)
            item.second, item.problem, item.detail = other.image, other.problem, other.detail
            item.second_span = other.span
        return item


def row(
    unit: Unit,
    number: int,
    fields: dict[str, Any] | csv.Error,
    options: Options,
    folder: str = "",
) -> Located:
    """One row of a list: its item, and the name of its image in a folder, by default the list's."""
    where = f"{posixpath.basename(unit.path)} row {number + 1}"
    if isinstance(fields, csv.Error):
        return Located(Item(where, problem="bad_record", detail=str(fields)))
    return _located(where, folder or posixpath.dirname(unit.path), fields, options)


def _located(where: str, folder: str, fields: dict[str, Any], options: Options) -> Located:
    first, _, other = options.image_field.partition(",")
    usual = (column for column in formats.IMAGE_COLUMNS if column in fields)
    column = first or formats.image_field(fields) or next(usual, "")
    is_there = is_field(fields, column)
    name = only(take(fields, column, ()))
    if not isinstance(name, str) or not name:
        there = ", ".join(sorted(map(str, fields)))
        detail = f"no column of an image file; give --image_field=NAME, one of {there}"
        if is_there and name in (None, ""):
            detail = f"its {column!r} is empty"
        elif isinstance(name, list):
            detail = f"its {column!r} has {len(name)} images, and an example has one"
        return Located(Item(where, problem="missing_image", detail=detail))
    second = fields.pop(other, None) if other else ""
    if other and (not isinstance(second, str) or not second):
        detail = f"the row names no {other!r}"
        return Located(Item(where, problem="missing_image", detail=detail))

    text = text_column(fields, options.text_field, LISTED_TEXTS)

    def make() -> Item:
        item = Item(name, texts=strings(take(fields, text, ())))
        if second:  # the same two images may stand beside several texts
            item.key = f"{name}+{second}#{item.texts[0] if item.texts else ''}"
        try:
            labels = take(fields, options.label_field, LABEL_FIELDS)
            item.labels = names(labels, options.class_names)
        except ValueError as error:
            item.problem, item.detail = "bad_label", str(error)
            return item
        item.extra = fields
        return item

    return Located(guarded(name, make), folder, name, second)


def csv_located(unit: Unit, options: Options) -> Iterator[Located]:
    """The items of a range of a table's rows without their images."""
    first = unit.start if unit.offset else 0
    rows = enumerate(csv_places(unit.path, unit.offset), first)
    for number, (fields, _) in itertools.islice(rows, unit.start - first, unit.stop - first):
        yield row(unit, number, fields, options)


def line_located(unit: Unit, options: Options) -> Iterator[Located]:
    """The items of a range of lines without their images."""
    base, position = posixpath.basename(unit.path), unit.start
    with files.open_binary(unit.path) as file:
        file.seek(unit.start)
        for number, (line, size) in enumerate(lines(file), unit.line + 1):
            position += size
            where = f"{base} line {number}"
            if line is None:
                detail = f"a line of more than {MAX_ROW_BYTES} bytes"
                yield Located(Item(where, problem="bad_json", detail=detail))
            elif line.strip():
                yield _json_row(unit, where, line, options)
            if position >= unit.stop:
                return


def _json_row(unit: Unit, where: str, line: bytes, options: Options) -> Located:
    try:
        fields = bounded_json.parse(line)
    except ValueError as error:
        reason = "bad_utf8" if isinstance(error, UnicodeDecodeError) else "bad_json"
        detail = str(error) if reason == "bad_utf8" else no_object(line, error)
        return Located(Item(where, problem=reason, detail=detail))
    return _located(where, posixpath.dirname(unit.path), fields, options)


# The lines of a file.


def lines(file: BinaryIO, most: int = MAX_ROW_BYTES) -> Iterator[tuple[bytes | None, int]]:
    """(a line with its end, its bytes in the file); None for a line of more than `most` bytes."""
    pending: list[bytes] = []
    size = 0
    while block := file.read(_BLOCK):
        *ended, rest = block.split(b"\n")
        for piece in ended:
            size += len(piece) + 1
            yield (b"".join([*pending, piece, b"\n"]) if size <= most + 1 else None), size
            pending, size = [], 0
        size += len(rest)
        pending = [*pending, rest] if size <= most else []
    if size:
        yield (b"".join(pending) if size <= most else None), size


def no_object(line: bytes, error: ValueError) -> str:
    """What is wrong with a line of JSON that is no object: `error`, and how an array is read."""
    if isinstance(error, json.JSONDecodeError):  # its own text counts lines within this one
        why = f"not valid JSON: {error.msg} at column {error.colno}"
    else:
        why = str(error)
    array = "; an array of objects is read with --format=json and the file as --input"
    return f"{why}{array if line.lstrip().startswith(b'[') else ''}"


def refuse_utf16(path: str, file: BinaryIO) -> None:
    """Raises ValueError for a list in UTF-16, as spreadsheets call it "Unicode text"; the file
    stands at its beginning then and now."""
    start = file.read(2)
    file.seek(0)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError(f"{path} is text in UTF-16; save it in UTF-8 (iconv -f UTF-16 -t UTF-8)")


class _CsvLines:
    """What csv.reader reads. Unlike a generator it goes on after it has raised, and it takes lines
    back.

    Attributes:
        taken: the lines that have been given since the list was last cleared.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._lines, self._position = file, lines(file), 0
        self._queue: collections.deque[str] = collections.deque()
        self.taken: list[str] = []
        self._error: csv.Error | None = None

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        if self._error:
            error, self._error = self._error, None
            raise error
        while not self._queue:
            line, size = next(self._lines)
            self._position += size
            if line is None:
                raise csv.Error(f"a line of more than {MAX_ROW_BYTES} bytes")
            # bytes end lines at \r, \n and \r\n alone, as the format does.
            parts = line.decode("utf-8", "replace").encode().splitlines(keepends=True)
            self._queue.extend(part.decode() for part in parts)
        self.taken.append(self._queue.popleft())
        return self.taken[-1]

    def go_to(self, position: int) -> None:
        """The next line is that which begins at a byte of the file."""
        self._file.seek(position)
        self._queue.clear()
        self._error = None
        self._lines, self._position = lines(self._file), position

    def position(self) -> int:
        """The byte at which the next line begins; -1 where that is within one of the file's."""
        return -1 if self._queue or self._error else self._position

    def take_back(self, start: int) -> None:
        """The lines taken from `start` on will come again."""
        self._queue.extendleft(reversed(self.taken[start:]))
        self.taken = []

    def blank(self) -> int:
        """How many of the lines taken are blank ones before a row, of which it is not made."""
        return sum(1 for _ in itertools.takewhile(lambda line: not line.strip("\r\n"), self.taken))

    def following(self) -> str | None:
        """The next line, which comes again; '' for one that is too long, None at the end."""
        taken, self.taken = self.taken, []
        try:
            found = next(self)
            self.take_back(0)
            return found
        except csv.Error as error:
            self._error = error
            return ""
        except StopIteration:
            return None
        finally:
            self.taken = taken


# The rows of a CSV file.


def csv_rows(path: str) -> Iterator[Row]:
    """The rows of `csv_places`. Raises as that."""
    return (row for row, _ in csv_places(path))


def csv_places(path: str, start: int = 0) -> Iterator[tuple[Row, int]]:
    """Rows of a CSV file as dicts, each with the byte at which to start for the next; -1 where
    none can. What separates their cells: `formats.dialect`. A row that the format does not allow
    comes as its error.

    Raises:
        ValueError: the file has no header that can be read, or one that names two columns alike
            or is the row of a picture, or is UTF-16.
    """
    with files.open_binary(path) as file:
        refuse_utf16(path, file)
        source = _CsvLines(file)
        try:
            head = next(source, "").removeprefix("\ufeff")
            second = source.following() or ""
            source.taken = [head]
            source.take_back(0)
            # A caption in a tab-separated list may hold a lone quotation mark; open_clip's readers
            # keep it only where it does not open the field, so quotes count as pandas counts them.
            way = formats.dialect(head, second)
            rows = csv.DictReader(source, **way)
            columns = rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        except csv.Error as error:
            raise ValueError(f"{path}: its first line names no columns: {error}") from None
        named = [name for name in columns if name]
        if second and (twice := next((name for name in named if named.count(name) > 1), "")):
            raise ValueError(f"{path}: two columns are called {twice!r}; rename one of them")
        if second and (cell := next((n for n in named if n.lower().endswith(formats.MEDIA)), "")):
            raise ValueError(
                f"{path}: its first line is the row of a picture, {cell}, where the names of the "
                "columns are to be; put them before it, such as file_name and text"
            )
        if start:
            source.go_to(start)
        while columns:
            source.taken = []
            try:
                row = next(rows)
                if why := _torn(row, source, columns, way):
                    raise csv.Error(why)
            except StopIteration:
                return
            except csv.Error as error:
                # An open quotation mark has swallowed rows that are whole.
                source.take_back(source.blank() + 1)
                yield error, source.position()
                continue
            surplus = row.pop(None, [])  # type: ignore[call-overload]
            if any(cell.strip() for cell in surplus):  # a text cut at its comma is another text
                marks = formats.SEPARATORS[rows.reader.dialect.delimiter]
                more = csv.Error(f"more cells than columns; quote texts with {marks}")
                yield more, source.position()
                continue
            yield row, source.position()


def _torn(
    row: Mapping[str, Any], source: _CsvLines, columns: Sequence[str], way: Mapping[str, Any]
) -> str:
    """What is wrong with a row of several lines, which a quotation mark in front of a text that is
    not quoted would make of rows that are whole; '' for nothing."""
    first, *behind = source.taken[source.blank() :]
    if not behind:
        return ""
    if "".join(source.taken).count('"') % 2 and source.following() is None:
        return "a quotation mark that is never closed"
    image = formats.image_field({name: row[name] for name in columns})
    if not image:
        return ""
    at, why = columns.index(image), "a quotation mark begins its text and ends in another row"
    cells = _cells(first, {**way, "quoting": csv.QUOTE_NONE})
    named = cells[at] if len(cells) == len(columns) > 1 else ""
    if named.lower().endswith(formats.MEDIA) and first.partition(named)[0].count('"') % 2:
        return f"{why}; quote the whole text"  # a text in front of its picture's name
    for line in behind:
        cells = _cells(line, way)
        named = cells[at] if len(cells) >= len(columns) > 1 else ""
        # Behind a mark it may be the end of this very row, whose text has several lines.
        if named.strip().lower().endswith(formats.MEDIA) and '"' not in line.partition(named)[0]:
            return f"{why}; quote the whole text"
    return ""


def _cells(line: str, way: Mapping[str, Any]) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r\n")], **way), [])
    except csv.Error:
        return []


# Whether the fields that options name are in the rows: a misspelled one would lose all captions.


def check(input: str, rows: Iterable[Mapping[str, Any]], options: Options) -> None:
    """Raises ValueError where none of the rows has a field of images, captions or labels that is named.
    The first row that has them ends the look: a field may be in few of them."""
    wanted = (*options.image_field.split(","), options.text_field, options.label_field)
    missing = [name for name in wanted if name]
    there: dict[str, None] = {}
    for row in rows if missing else ():
        missing = [name for name in missing if not is_field(row, name)]
        if not missing:
            return
        if len(there) < _MOST_SHOWN:
            there |= dict.fromkeys(map(str, row))
    if missing and there:
        shown = list(itertools.islice(there, _MOST_SHOWN))
        raise ValueError(f"{input}: no field {missing[0]!r}; it has {shown}")


def refuse_urls(path: str, rows: Iterable[Mapping[str, Any]], options: Options) -> None:
    """Raises ValueError for a list at `path` whose first rows all give the URL of an image, which
    are downloaded first, unless `options` allow URLs."""
    first = list(itertools.islice(rows, _LOOK_AT))
    named = options.image_field.partition(",")[0]
    if any("://" in allowed for allowed in options.allow_paths) or not first:
        return
    columns = {formats.url_field({named: row.get(named)} if named else row) for row in first}
    if len(columns) != 1 or not (column := columns.pop()):
        return
    rest = {name: value for name, value in first[0].items() if name != column}
    text = text_column(rest, options.text_field, LISTED_TEXTS)
    caption = f" --caption_col={shlex.quote(text)}" if text else ""
    kind = posixpath.splitext(path.lower().removesuffix(".gz").removesuffix(".zst"))[1][1:]
    raise ValueError(
        f"{path}: its images are URLs (column {column!r}), and images are read from files. "
        f"Download them first: pip install img2dataset; img2dataset --url_list={shlex.quote(path)} "
        f"--input_format={kind} --url_col={shlex.quote(column)}{caption} "
        "--output_format=webdataset --output_folder=images"
    )


def _csv_objects(path: str) -> Iterator[Mapping[str, Any]]:
    return (row for row in csv_rows(path) if not isinstance(row, csv.Error))


def _line_objects(path: str) -> Iterator[Mapping[str, Any]]:
    with files.open_binary(path) as file:
        for line, _ in lines(file):
            with contextlib.suppress(ValueError):
                yield bounded_json.parse(line or b"")


def _format(
    name: str,
    plan: Callable[[str, str, Options], list[Unit]],
    located: Callable[[Unit, Options], Iterator[Located]],
    patterns: tuple[str, ...],
    priority: int,
    splits: Callable[[str], list[str]] | None = None,
) -> Format:
    def read(unit: Unit, options: Options) -> Iterator[Item]:
        """The items of a range of rows; paths are relative to the list."""
        for found in located(unit, options):
            yield found.load(unit, options)

    return Format(name, plan, read, patterns, priority, located=located, splits=splits)


FORMATS = (
    _format("csv", plan_csv, csv_located, _CSV, 4),
    _format("jsonl", plan_jsonl, line_located, _JSONL, 5),
    _format("json", plan_json, json_located, _JSON, 0, json_splits),
)
