"""Prepared data as input: to be split, narrowed, shrunk or freed of duplicates once more."""

from __future__ import annotations

import json
from collections.abc import Iterator

from coca_jax.data import prepared
from coca_jax.importers import metadata
from coca_jax.importers.items import Drawn, Item, Options, Unit, names, split_units, strings

ROWS_PER_UNIT = 4096


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of a split: ranges of its records; of the only split where `split` is ''.

    Raises:
        FileNotFoundError, ValueError: not prepared data, or no such split; or images of a field
            are asked for.
    """
    if options.image_field:
        raise ValueError(
            f"--image_field={options.image_field}: {path} is prepared, and its images are those "
            "that it was prepared with; leave it out"
        )
    found = splits(path)
    if not split and len(found) == 1:
        split = found[0]
    rows = len(prepared.open_split(path, split))
    return [
        Unit(f"{path}@{split}", unit.start, unit.stop, unit.rows)
        for unit in split_units(path, rows, ROWS_PER_UNIT)
    ]


def splits(path: str) -> list[str]:
    """The splits that were prepared."""
    return sorted(prepared.read_manifest(path)["splits"])


def declared_classes(unit: Unit, options: Options) -> list[str]:
    """The class names of the data, unless other labels are taken or others given."""
    if options.label_field or options.class_names:
        return list(options.class_names)
    return list(prepared.read_manifest(unit.path.rpartition("@")[0])["class_names"])


def drawn(unit: Unit) -> Drawn:
    """What was drawn of the data until the split was left."""
    path, _, split = unit.path.rpartition("@")
    return metadata.drawn(prepared.read_manifest(path)["splits"][split])


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The records of a range, in their order."""
    path, _, split = unit.path.rpartition("@")
    source, before = prepared.open_split(path, split), drawn(unit)
    for start in range(unit.start, unit.stop, 256):
        for record in source.read(range(start, min(start + 256, unit.stop))):
            extra = json.loads(record.extra) if record.extra else {}
            item = Item(record.key, record.image, record.texts, record.labels)
            item.second, item.drawn = record.second, before
            if options.text_field:
                try:
                    item.texts = strings(extra.pop(options.text_field, None))
                except ValueError as error:
                    item.problem, item.detail = "bad_record", str(error)
            if options.label_field or options.class_names:
                field = options.label_field
                try:
                    found = extra.pop(field, None) if field else record.labels
                    item.labels = names(found, options.class_names)
                except ValueError as error:
                    item.problem, item.detail = "bad_label", str(error)
            item.extra = extra
            yield item
