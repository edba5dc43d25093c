"""Lists of image files with captions: CSV or TSV, as open_clip's `filepath<TAB>title`."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from coca_jax.data import files, formats, named_files
from coca_jax.importers import imagefolder, lines
from coca_jax.importers.items import Item, Options, Unit, split_units

ROWS_PER_UNIT = 2048
PATTERNS = formats.PATTERNS["csv"]


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of the lists: ranges of rows.

    Raises:
        FileNotFoundError: no .csv or .tsv file, nor a .txt that is such a list.
        ValueError: a list has no such column.
    """
    units, root = [], named_files.root_of(path)
    for file in _lists(path, split):
        rows, columns = 0, None
        for fields in lines.csv_rows(file):
            if not columns and not isinstance(fields, csv.Error):
                columns = list(fields)
            rows += 1
        wanted = (*options.image_field.split(","), options.text_field, options.label_field)
        for field in wanted:
            if field and columns and field not in columns:
                raise ValueError(f"{file}: no column {field!r}; it has {columns}")
        units += split_units(file, rows, ROWS_PER_UNIT, root)
    return units


def _lists(path: str, split: str) -> list[str]:
    try:
        return files.find(path, PATTERNS, split)
    except FileNotFoundError:
        system, plain = files.filesystem(path)
        if not system.isdir(plain) or not (found := formats.text_lists(path)):
            raise
        return found


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of rows; paths are relative to the list."""
    for found in located(unit, options):
        yield found.load(unit, options)


def located(unit: Unit, options: Options) -> Iterator[imagefolder.Located]:
    """The items of a range of rows without their images."""
    for number, fields in enumerate(lines.csv_rows(unit.path)):
        if number >= unit.stop:
            return
        if number >= unit.start:
            yield imagefolder.row(unit, number, fields, options)
