"""Lists of image files with their texts, a JSON object a line, packed by zstd or gzip or not."""

from __future__ import annotations

from collections.abc import Iterator

from coca_jax.data.sources import files, formats, image_folder, rows
from coca_jax.data.sources.items import Item, Options, Unit

PATTERNS = formats.PATTERNS["jsonl"]


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of the lists: ranges of lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no row has a field that is named; or pyarrow, which unpacks zstd, is not
            installed.
    """
    root = formats.root_of(path)
    lists = files.find(path, PATTERNS, split)
    for file in lists:
        files.check_unpacks(file)
    rows.check(path, rows.rows_of(lists), options)
    for file in lists:
        rows.refuse_urls(file, rows.rows_of([file]), options)
    return [unit for file in lists for unit in image_folder.line_units(file, root)]


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of lines; paths are relative to the list."""
    for found in located(unit, options):
        yield found.load(unit, options)


def located(unit: Unit, options: Options) -> Iterator[image_folder.Located]:
    """The items of a range of lines without their images."""
    yield from image_folder.line_located(unit, options)
