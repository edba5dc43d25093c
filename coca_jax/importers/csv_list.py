"""Lists of image files with captions: CSV or TSV, as open_clip's `filepath<TAB>title`."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator

from coca_jax.data import files
from coca_jax.importers.imagefolder import from_fields
from coca_jax.importers.items import Item, Options, Unit, split_units

ROWS_PER_UNIT = 2048
PATTERNS = ("*.csv", "*.tsv")  # of its files


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of the lists: ranges of rows.

    Raises:
        FileNotFoundError: no .csv, .tsv or .txt file.
        ValueError: a list has no such column.
    """
    units = []
    for file in files.find(path, PATTERNS, split):
        rows, columns = 0, None
        for fields in _rows(file):
            columns = columns or list(fields)
            rows += 1
        for field in (options.image_field, options.text_field, options.label_field):
            if field and columns and field not in columns:
                raise ValueError(f"{file}: no column {field!r}; it has {columns}")
        units += split_units(file, rows, ROWS_PER_UNIT)
    return units


def _rows(path: str) -> Iterator[dict]:
    """Rows as dicts; tabs separate where the header has one, else commas."""
    text = files.read(path).decode("utf-8", "replace").removeprefix("\ufeff")
    tabs = "\t" in text.split("\n", 1)[0]
    # A caption in a tab-separated list may hold a lone quotation mark; open_clip's readers keep it
    # only where it does not open the field, so quotes count here as pandas counts them.
    yield from csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",")


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of rows; paths are relative to the list."""
    folder = posixpath.dirname(unit.path)
    for number, fields in enumerate(_rows(unit.path)):
        if unit.start <= number < unit.stop:
            fields.pop(None, None)  # more cells than columns
            yield from_fields(folder, fields, options)
