"""Lines and rows of text files, each bounded: one that is damaged does not end the file."""

from __future__ import annotations

import codecs
import collections
import contextlib
import csv
import itertools
import json
import posixpath
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias

from coca_jax.data.sources import files, formats
from coca_jax.data.sources.fields import LISTED_TEXTS, is_field, text_column
from coca_jax.data.sources.items import Options
from coca_jax.runtime import bounded_json

MAX_ROW_BYTES = bounded_json.MAX_BYTES  # of a row or a caption's file too; more is damage
_BLOCK = 1 << 20


def lines(file: BinaryIO | _Sips, most: int = MAX_ROW_BYTES) -> Iterator[tuple[bytes | None, int]]:
    """(a line with its end, its bytes in the file); None for a line of more than `most` bytes."""
    kept: list[bytes] = []
    size = 0
    while block := file.read(_BLOCK):
        *ended, rest = block.split(b"\n")
        for piece in ended:
            size += len(piece) + 1
            yield (b"".join([*kept, piece, b"\n"]) if size <= most + 1 else None), size
            kept, size = [], 0
        size += len(rest)
        kept = [*kept, rest] if size <= most else []
    if size:
        yield (b"".join(kept) if size <= most else None), size


PACKED = (".jsonl.zst", ".jsonl.gz")  # of files whose lines are read from the beginning only
_MAX_UNPACKED, _MAX_RATIO = 1 << 30, 1000  # bytes, and over those of the file: more is a bomb


class _Sips:
    """A stream that gives little at once, so that little is lost before a damaged place."""

    def __init__(self, stream: Any):
        self._stream = stream

    def read(self, size: int) -> bytes:
        return self._stream.read(min(size, 1024))


def packed_lines(path: str) -> Iterator[tuple[bytes | None, int]]:
    """`lines` of a file that zstd or gzip has packed.

    Raises:
        OSError: it is damaged; the lines before are whole.
        ValueError: it unpacks to far more than lines do.
    """
    with files.open_unpacked(path) as stream:
        most, position = max(_MAX_UNPACKED, _MAX_RATIO * files.size(path)), 0
        for line, size in lines(_Sips(stream)):
            position += size
            if position > most:
                raise ValueError(f"{path} unpacks to more than {most} bytes")
            yield line, size


def no_object(line: bytes, error: ValueError) -> str:
    """What is wrong with a line of JSON that is no object: `error`, and how an array is read."""
    if isinstance(error, json.JSONDecodeError):  # its own text counts lines within this one
        why = f"not valid JSON: {error.msg} at column {error.colno}"
    else:
        why = str(error)
    array = "; an array of objects is read with --format=json and the file as --input"
    return f"{why}{array if line.lstrip().startswith(b'[') else ''}"


def of_file(path: str) -> Iterator[bytes | None]:
    """The lines of a file, packed or not, as `lines` gives them. Raises as `packed_lines`."""
    if path.lower().endswith(PACKED):
        yield from (line for line, _ in packed_lines(path))
        return
    with files.open_binary(path) as file:
        yield from (line for line, _ in lines(file))


def not_utf8(path: str) -> int:
    """The number, from 1, of the first line of a file that is not UTF-8; 0 where all are. Raises as
    `packed_lines`."""
    for number, line in enumerate(of_file(path), 1):
        try:
            (line or b"").decode()
        except UnicodeDecodeError:
            return number
    return 0


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


Row: TypeAlias = dict[str, str] | csv.Error


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


# Whether the fields that options name are in the rows of lists: a slip would lose all captions.


_LOOKED_AT = 20  # rows, of which each gives a URL where images are to be downloaded first
_MOST_SHOWN = 100  # fields in a message


def check(input: str, rows: Iterable[Mapping[str, Any]], options: Options) -> None:
    """Raises ValueError where none of the rows has a field of captions or labels that is named.
    The first row that has them ends the look: a field may be in few of them."""
    missing = [name for name in (options.text_field, options.label_field) if name]
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
    first = list(itertools.islice(rows, _LOOKED_AT))
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


def rows_of(paths: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The rows of lists, CSV or lines of JSON, that can be read."""
    for path in paths:
        if path.lower().endswith((".jsonl", *PACKED)):
            yield from _json_rows(path)
        else:
            yield from (row for row in csv_rows(path) if not isinstance(row, csv.Error))


def _json_rows(path: str) -> Iterator[Mapping[str, Any]]:
    with contextlib.suppress(OSError, ValueError):  # of a damaged end, which the import lists
        for line in of_file(path):
            with contextlib.suppress(ValueError):
                yield bounded_json.parse(line or b"")
