"""Lists of image files with their texts, a JSON object a line, packed by zstd or gzip or not."""

from __future__ import annotations

from collections.abc import Iterator

from coca_jax.data import files, formats, named_files
from coca_jax.importers import imagefolder, named_fields
from coca_jax.importers.items import Item, Options, Unit

PATTERNS = formats.PATTERNS["jsonl"]


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of the lists: ranges of lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no row has a field that is named; or pyarrow, which unpacks zstd, is not
            installed.
    """
    root = named_files.root_of(path)
    lists = files.find(path, PATTERNS, split)
    for file in lists:
        files.check_unpacks(file)
    named_fields.check(path, named_fields.rows_of(lists), options)
    for file in lists:
        named_fields.refuse_urls(file, named_fields.rows_of([file]), options)
    return [unit for file in lists for unit in imagefolder.line_units(file, root)]


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of lines; paths are relative to the list."""
    for found in located(unit, options):
        yield found.load(unit, options)


def located(unit: Unit, options: Options) -> Iterator[imagefolder.Located]:
    """The items of a range of lines without their images."""
    yield from imagefolder.line_located(unit, options)
