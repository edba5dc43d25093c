"""Data as it lies there, for evaluation: TFDS sets in any file format, and by an index all that is
read in place.

Training wants random access and reads prepared data (data/filters.py); evaluation goes through a
split once, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from coca_jax.config import Entry
from coca_jax.data import filters, holdout, mixture, quarantine, source_index, supervision
from coca_jax.data.sources import (
    array_record,
    fields,
    files,
    items,
    tfds,
)
from coca_jax.data.sources.items import Item, Options, Unit
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import Indices, Source, read_one
from coca_jax.runtime import activity

_ROWS_PER_UNIT = 1024  # of TFDS examples held at a time


Given: TypeAlias = Entry | Mapping[str, Any]


def open_source(entry: Given, split: str) -> Source:
    """Opens an entry as `data.sources.open_source` does, and what is not prepared besides.

    path may be whatever can be read in place, and tfds any set that the user has.

    Raises:
        ValueError, FileNotFoundError: what is wrong with it, in one line.
    """
    entry = Entry.of(entry)
    split = entry.split or split
    if entry.tfds:
        return filters.narrow(_tfds(entry, split), entry)
    placed = _placed(entry, split)
    found = filters.open_whole(placed, split)
    if placed.path != entry.path:  # messages name what was given, not where its index is kept
        found.name = f"{entry.path} [{split}]"
    return filters.narrow(found, placed)


def class_names(entry: Given, split: str) -> list[str]:
    """The class names of a data set: those it declares, else those that its records have."""
    entry = Entry.of(entry)
    split = entry.split or split
    if entry.tfds:
        units = tfds.plan(tfds.data_path(entry.tfds, entry.data_dir), split, _options(entry))
        declared = tfds.declared_classes(units[0], _options(entry))
        if declared:
            return declared
    else:
        return mixture.class_names(_placed(entry, split), split)
    found = open_source(entry, split)
    return sorted({label for record in found for label in record.labels})


def splits(entry: Given) -> list[str]:
    """The splits of a data set; [] for data that are not prepared and tell none, by names of
    files or folders or by a field `split`. The field tells none where `where` has values of it."""
    entry = Entry.of(entry)
    if entry.tfds:
        return tfds.splits(tfds.data_path(entry.tfds, entry.data_dir))
    found = find_splits(entry)
    return sorted(array_record.read_manifest(entry.path)["splits"]) if found is None else found[0]


def find_splits(entry: Entry) -> tuple[list[str], holdout.SplitField | None] | None:
    """What data at a path tell of their splits, as `holdout.of_data`; None of prepared ones."""
    return source_index.find_splits(entry) if source_index.is_needed(entry) else None


def check_split(entry: Given, split: str) -> None:
    """Raises ValueError for a split that data do not have, where they have or tell some."""
    entry = Entry.of(entry)
    by_path = None if entry.tfds else find_splits(entry)
    found = splits(entry) if by_path is None else by_path[0]
    called = str if by_path is None else holdout.split_of  # the former are names as such
    if found and called(split) not in map(called, found):
        place = entry.path or entry.tfds
        raise ValueError(f"data {place} have no split {split!r}; they have {', '.join(found)}")


def choose_split(entry: Given) -> str:
    """The split to evaluate on where nobody names one: 'test', else validation, else the only one.

    Raises ValueError where the data have several and none of these.
    """
    entry = Entry.of(entry)
    found = splits(entry)
    usual = [split for split in ("test", *files.VALIDATION) if split in found]
    if not found or usual:
        return usual[0] if usual else "test"
    if len(found) > 1:
        raise ValueError(
            f"data {entry.path or entry.tfds}: give --split, one of {', '.join(found)}"
        )
    return found[0]


def counts(entry: Given) -> dict[str, int]:
    """{'caption': examples that have one, 'label': examples that have one} of `entry`'s split; {}
    where that is not known without going through the images, or not at once."""
    entry = Entry.of(entry)
    if entry.tfds or entry.builtin or entry.where:
        return {}
    if entry.text_field or entry.label_field:
        return {}
    entry = _placed(entry, entry.split or "test")
    there = array_record.read_manifest(entry.path)["splits"].get(entry.split or "test")
    return dict(caption=there["with_text"], label=there["with_label"]) if there else {}


def _placed(entry: Entry, split: str) -> Entry:
    """The entry, whose path is an index of its data where they are not prepared."""
    if not source_index.is_needed(entry):
        return entry
    return source_index.of_index(entry, source_index.cached(entry, split), split)


def _options(entry: Entry) -> Options:
    return Options(
        text_field=entry.text_field,
        label_field=entry.label_field,
        image_field=entry.image_field,
    )


def _tfds(entry: Entry, split: str) -> Source:
    """Reads units of the split one after the other and holds the last one."""
    path, options = tfds.data_path(entry.tfds, entry.data_dir), _options(entry)
    whole = tfds.plan(path, split, options)
    rows = sum(unit.rows for unit in whole)
    units = items.split_units(whole[0].path, rows, _ROWS_PER_UNIT)
    held: dict[int, list[Record]] = {}

    def unit_records(number: int) -> list[Record]:
        if number not in held:
            held.clear()
            unit: Unit = units[number]
            held[number] = [_record(item, path) for item in tfds.read(unit, options)]
        return held[number]

    def read(indices: Indices) -> list[Record]:
        places = [divmod(int(i), _ROWS_PER_UNIT) for i in indices]
        return [unit_records(number)[row] for number, row in places]

    return Source(f"tfds {entry.tfds} [{split}]", rows, read, applied_fields=True)


def _record(item: Item, path: str) -> Record:
    if item.problem:
        raise ValueError(f"data {path}: {item.key}: {item.problem}: {item.detail}")
    texts, labels = (tuple(found) for found in quarantine.texts_and_labels(item))
    extra = fields.plain_json(item.extra)
    return Record(item.image, texts, labels, item.key, extra, item.second)


# The records that an evaluation goes through: those of a data set that have what it needs.

_PART = 256  # records read at a time
# Of each source without checks that was evaluated on, which records can be used.
_sound: dict[str, dict[int, bool]] = {}


class Records:
    """The records of a data entry in their stored order, read as one goes through them.

    Args:
      data: an entry as in config.data.sources with `split`; `path` may be read in place, and
        `tfds` any set that the user has.
      limit: at most so many of those that count; 0: all.
      known: only records one of whose texts is among these; None: all.
      need: what a record must have to count, the name of a kind of source ('caption', 'label');
        '': nothing.

    Attributes: left_out, the number of records without what is needed, up to the last that counts.

    A record has image (encoded bytes; of drawn scenes uint8 [64, 64, 3]), second (the other image
    of a pair), text, labels, key and extra; drawn scenes have `scene`. Raises ValueError or
    FileNotFoundError for bad data, or data none of which has what is needed.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        limit: int = 0,
        known: set[str] | None = None,
        need: str = "",
    ):
        entry = Entry.of(data)
        if need and not _suits(entry, need):
            entry = entry.change({"kind": need}, "data")
        self.scenes = bool(entry.builtin)
        if self.scenes:
            from coca_jax.data.synthetic_source import Scenes

            source: Any = Scenes(entry.split or "test", entry.kind, entry.objects, entry.scenery)
        else:
            source = open_source(entry, "test")
        self._source = source
        self._indices = np.arange(len(source))
        self._given = 0
        self.left_out = self.damaged = 0
        # Going through a TFDS set costs as much as evaluating on it.
        if self.scenes or source.complete or entry.tfds:
            need = ""
        unchecked = not self.scenes and source.unchecked
        if need or known is not None or unchecked:
            self._choose(limit or len(source), known, need)
            if need and not len(self._indices) and self.left_out == len(source):
                remedy = supervision.KINDS[need].remedy()
                raise ValueError(f"data {source.name}: no example has a {need}; give {remedy}")
        elif limit:
            self._indices = self._indices[:limit]

    def _choose(self, limit: int, known: set[str] | None, need: str) -> None:
        """Leaves the first `limit` records that count. Those behind the last are not read."""
        has = supervision.KINDS[need]().trains if need else None
        chosen: list[int] = []
        for part in self._parts():
            for index, record in zip(part, self._source.read_texts(part)):
                if has is not None and not has(record):
                    self.left_out += 1
                elif known is None or not known.isdisjoint(self._texts(record)):
                    if not self.scenes and self._source.unchecked and not self._is_sound(index):
                        self.damaged += 1
                        continue
                    chosen.append(index)
                    if len(chosen) == limit:
                        break
            if len(chosen) == limit:
                break
        self._indices = np.array(chosen, np.int64)

    def _is_sound(self, index: int) -> bool:
        """Whether the images of a record of an index without checks can be read. An evaluation in a
        run asks for the same ones each time."""
        known = _sound.setdefault(f"{self._source.name} {self._source.fingerprint}", {})
        if index not in known:
            record, problem = read_one(self._source, index)
            known[index] = not problem and not quarantine.problem_of(record)
        return known[index]

    def _texts(self, record: Any) -> Sequence[str]:
        return [record["text"]] if self.scenes else record.texts

    def __len__(self) -> int:
        return len(self._indices)

    def _parts(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._indices), _PART):
            yield self._indices[start : start + _PART]
            activity.alive()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._given = 0
        for part in self._parts():
            self._given += len(part)
            if self.scenes:
                yield from self._source.read(part)
                continue
            for record in self._source.read(part):
                yield dict(
                    image=record.image,
                    text=list(record.texts),
                    labels=list(record.labels),
                    key=record.key,
                    extra=record.extra,
                    second=record.second,
                )

    def unreadable(self, read: Callable[[bytes], Any], last: int) -> str:
        """The key of the first of the `last` records given whose image `read` refuses, and why; ''
        where there is none. Only those are looked at: images are decoded as they are needed."""
        if self.scenes or not self._given:
            return ""
        first = max(0, self._given - last - _PART)  # of the last part some may not be given yet
        for record in self._source.read(self._indices[first : self._given]):
            try:
                read(record.image)
            except ValueError as error:
                return f"{record.key}: {error}"
        return ""


def _suits(entry: Entry, need: str) -> bool:
    """Whether the records of an entry, as its kind reads them, have what is needed."""
    wanted, kind = supervision.KINDS[need].wanted, supervision.of(entry)
    if not entry.builtin:
        return wanted in kind.gives
    return wanted == kind.wanted or (wanted == "text" and kind.drawn == "captions")
