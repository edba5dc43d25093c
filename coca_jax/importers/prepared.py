"""Prepared data as input: to be split, narrowed, shrunk or freed of duplicates once more."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Iterable, Iterator

from coca_jax.data import prepared, unreachable
from coca_jax.data.random_access import UNREAD, Source, read_one
from coca_jax.data.records import Record
from coca_jax.importers import metadata
from coca_jax.importers.items import Drawn, Item, Options, Unit, names, split_units, strings

ROWS_PER_UNIT = 4096
_LOOK_AT = 64  # records


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


def has_pairs(path: str, split: str) -> bool:
    """Whether there are pairs of images among its first records. Raises as `plan` and `read`."""
    units = plan(path, split, Options())
    return any(item.second for item in itertools.islice(read(units[0], Options()), _LOOK_AT))


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
    """The records of a range, in their order; one that cannot be read is one problem item.

    Raises:
        Unreachable: a store did not give what it has.
        FileNotFoundError, ValueError: the data are no longer there.
        OSError: this process has too many files open.
    """
    path, _, split = unit.path.rpartition("@")
    told = json.dumps(prepared.read_manifest(path)["splits"].get(split))
    source, before = _opened(path, split, told), drawn(unit)
    for start in range(unit.start, unit.stop, 256):
        rows = range(start, min(start + 256, unit.stop))
        for row, (record, why) in zip(rows, _records(source, rows)):
            item = _item(record, options)
            item.drawn = before
            if why:
                item.key = item.key or f"{split}/{row}"
                item.problem = "missing_image" if record is not UNREAD else "damaged_archive"
                item.detail = why
            yield item
    if unit.stop >= len(source):
        _opened.cache_clear()  # it may hold a GiB of records


@functools.lru_cache(maxsize=1)
def _opened(path: str, split: str, told: str) -> Source:
    """The data of all units of a split: to open them asks for each of the shards. told: what the
    manifest says of the split, other things where it was written anew."""
    return prepared.open_split(path, split)


def _item(record: Record, options: Options) -> Item:
    """The item of a record, of the wanted fields."""
    extra = json.loads(record.extra) if record.extra else {}
    item = Item(record.key, record.image, record.texts, record.labels, second=record.second)
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
    return item


def _records(source: Source, rows: range) -> Iterable[tuple[Record, str]]:
    """Each record with ''; where one cannot be read, what an index says of it, or UNREAD, and why.
    Raises as `read`."""
    try:
        with unreachable.required():
            return [(record, "") for record in source.read(rows)]
    except unreachable.Unreachable:
        raise
    except Exception:  # of one of them; of which its own read says
        return (_record(source, row) for row in rows)


def _record(source: Source, row: int) -> tuple[Record, str]:
    with unreachable.required():
        record, why = read_one(source, row)
        if why:
            with contextlib.suppress(Exception):  # as of the image, of a shard that is damaged
                record = source.read_texts([row])[0]
    return record, why
