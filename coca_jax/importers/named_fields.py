"""Whether the fields that options name are in the rows of lists: a slip would lose all captions."""

from __future__ import annotations

import contextlib
import csv
import itertools
import posixpath
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from coca_jax.data import bounded_json, formats
from coca_jax.importers import lines
from coca_jax.importers.items import LISTED_TEXTS, Options, is_field, text_column

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
        if path.lower().endswith((".jsonl", *lines.PACKED)):
            yield from _json_rows(path)
        else:
            yield from (row for row in lines.csv_rows(path) if not isinstance(row, csv.Error))


def _json_rows(path: str) -> Iterator[Mapping[str, Any]]:
    with contextlib.suppress(OSError, ValueError):  # of a damaged end, which the import lists
        for line in lines.of_file(path):
            with contextlib.suppress(ValueError):
                yield bounded_json.parse(line or b"")
