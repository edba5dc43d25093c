"""Lists of image files with captions: CSV or TSV, as open_clip's `filepath<TAB>title`."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from coca_jax.data.sources import files, formats, image_folder, rows
from coca_jax.data.sources.items import Item, Options, Unit

PATTERNS = formats.PATTERNS["csv"]


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of the lists: ranges of rows.

    Raises:
        FileNotFoundError: no .csv or .tsv file, nor a .txt that is such a list.
        ValueError: a list has no such column.
    """
    units, root = [], formats.root_of(path)
    for file in _lists(path, split):
        whole = (list(row) for row in rows.csv_rows(file) if not isinstance(row, csv.Error))
        columns = next(whole, [])
        wanted = (*options.image_field.split(","), options.text_field, options.label_field)
        for field in wanted:
            if field and columns and field not in columns:
                raise ValueError(f"{file}: no column {field!r}; it has {columns}")
        rows.refuse_urls(file, rows.rows_of([file]), options)
        units += image_folder.csv_units(file, root)
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


def located(unit: Unit, options: Options) -> Iterator[image_folder.Located]:
    """The items of a range of rows without their images."""
    yield from image_folder.csv_located(unit, options)
