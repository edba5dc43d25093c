"""Which records of a source are examples: `where`, `limit`, each caption or question by itself."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from coca_jax.config import Entry
from coca_jax.console import activity
from coca_jax.data import kinds
from coca_jax.data.field_texts import (
    INNER_LABELS,
    INNER_TEXTS,
    selected,
    strings,
    values_of,
    wanted_values,
)
from coca_jax.data.random_access import Indices, Source
from coca_jax.data.records import Record
from coca_jax.data.texts import json_text
from coca_jax.data.view_index import Index, Indexes

_LONG = 50_000  # records; to look at more takes long enough to say so
# What of an entry decides which examples there are.
_VIEW_KEYS = (
    *("kind", "where", "limit", "captions", "questions", "answers"),
    *("text_field", "label_field"),
)


def narrow(
    source: Source,
    entry: Entry,
    *,
    training: bool = False,
    indexes: Indexes | None = None,
) -> Source:
    """What an entry of `config.data.sources` leaves of an opened source.

    Args:
        training, indexes: see `sources.open_source`.

    Raises:
        ValueError: nothing is left.
    """
    kind = kinds.of(entry)
    if not source.applied_fields:
        source = _refield(source, entry.text_field, entry.label_field)
    view = View(source, entry, kind, training)
    found = source if view.whole else view.select(_index(view, indexes or Indexes()))
    if not len(found):
        raise ValueError(f"data source {source.name}: it is empty")
    found.kind = kind
    return found


def _index(view: View, indexes: Indexes) -> Index:
    source = view.source
    if not view.scans:
        return Index(np.arange(min(len(source), view.limit), dtype=np.int64))
    if not source.fingerprint:  # nothing says whether a file would be of the same data
        return view.scan()
    return indexes.get(source.folder, view.mark(), len(source), view.scan)


class View:
    """Which records of `source` an entry takes, and as what.

    Attributes:
        source: whose texts and labels are already those of the entry.
        limit: at most so many of its records.
        whole: each record is one example.
        scans: records must be read to know which are.
    """

    def __init__(self, source: Source, entry: Entry, kind: kinds.Kind, training: bool):
        self.source, self._kind, self._training = source, kind, training
        self._where = dict(entry.where)
        self.limit = entry.limit or len(source)
        self._given = {k: v for k, v in entry.to_dict().items() if k in _VIEW_KEYS}
        self._useful_only = training and kind.wanted not in source.every
        self.scans = bool(self._where or kind.divides or self._useful_only)
        self.whole = not self.scans and self.limit >= len(source)

    def mark(self) -> str:
        """All that the index depends on, as text."""
        given = dict(self._given, training=self._training, of=self.source.fingerprint)
        return json.dumps(given, sort_keys=True, default=list)

    def scan(self) -> Index:
        """Reads every record. Raises ValueError, with the cause, where nothing is left."""
        if len(self.source) > _LONG:
            print(
                f"looking once at all {len(self.source):,} records of {self.source.name}",
                file=sys.stderr,
                flush=True,
            )
        rows: list[int] = []
        parts: list[int] = []
        names: set[str] = set()
        taken, missed = 0, Missed(self._where)
        for row, record in self._records():
            if taken >= self.limit:
                break
            if self._where:
                extra = json.loads(record.extra)
                if not selected(self._where, extra, record.texts, record.labels):
                    if not taken:
                        missed.add(record, extra)
                    continue
            taken += 1
            for part, labels in self._examples(record):
                rows.append(row)
                parts.append(part)
                names.update(labels)
        if not rows:
            left = self._where and not taken
            why = missed.line() if left else self._kind.nothing(self._training) + self._named()
            raise ValueError(f"data source {self.source.name}: {why}")
        if self._useful_only and len(rows) < taken:
            logging.info(
                "%s: %d of %d records have a %s",
                *(self.source.name, len(rows), taken, self._kind.wanted),
            )
        return Index(
            np.array(rows, np.int64),
            np.array(parts, np.int64) if self._kind.divides else None,
            tuple(sorted(names)) if self._kind.has_classes else None,
        )

    def _named(self) -> str:
        """What is said of a field that was named and gave nothing; '' where none was."""
        flag = f"{self._kind.wanted}_field"
        return f"; {flag}={self._given[flag]!r} gives none" if self._given.get(flag) else ""

    def _records(self) -> Iterator[tuple[int, Record]]:
        source, row = self.source, 0
        # Images may lie elsewhere, and far away; of what is drawn only whole records have `extra`.
        read = source.read_texts if source.folder else source.read
        try:
            for start in range(0, len(source), 256):
                with activity.doing(f"reading {source.name}"):
                    found = read(range(start, min(start + 256, len(source))))
                for row, record in enumerate(found, start):
                    yield row, record
        except RuntimeError:
            # array_record's own. Its threads read at the same time: of which of several damaged
            # places it speaks is chance, and is not said.
            raise ValueError(
                f"data source {self.source.name}: a record after number {row} cannot be read "
                f"(a shard is damaged), and {self._given} needs all of them; prepare it again"
            ) from None

    def _examples(self, record: Record) -> list[tuple[int, tuple[str, ...]]]:
        """(part, labels) of each example that a record is."""
        if self._kind.divides:
            try:
                return self._kind.examples(record)
            except ValueError as error:
                raise ValueError(f"data source {self.source.name}: {error}") from None
        if self._training and not self._kind.trains(record):
            return []
        return [(0, record.labels)]

    def _fingerprint(self) -> str:
        """Of the examples, from that of the source: two views of it have two."""
        whole = self.source.fingerprint
        if not whole:
            return ""
        return self.mark() if self.scans else f"{whole}, the first {self.limit}"

    def select(self, index: Index) -> Source:
        """The source that has the examples of an index."""
        source, rows, parts, kind = self.source, index.rows, index.parts, self._kind

        def taken(records: list[Record], wanted: np.ndarray) -> list[Record]:
            if parts is None:
                return records
            which = zip(records, parts[wanted].tolist(), wanted.tolist())
            return [kind.example(record, part, number) for record, part, number in which]

        def read(indices: Indices) -> list[Record]:
            wanted = np.asarray(indices, np.int64)
            return taken(source.read(rows[wanted]), wanted)

        def read_texts(indices: Indices) -> list[Record]:
            wanted = np.asarray(indices, np.int64)
            return taken(source.read_texts(rows[wanted]), wanted)

        have = {kind.wanted} if self._useful_only else set()
        found = Source(
            source.name,
            len(rows),
            read,
            read_texts,
            every=source.every | kind.gives | have,
            fingerprint=self._fingerprint(),
        )
        found.class_names = index.class_names
        return found


class Missed:
    """What the records have that `where` leaves none of: for the line that says so."""

    MOST = 1000  # values of a field that are remembered
    SHOWN = 8

    def __init__(self, where: Mapping[str, Any]):
        self._where = where
        self._values: dict[str, set[str]] = {field: set() for field in where}
        self._fields: set[str] = set()

    def add(self, record: Record, extra: Mapping[str, Any]) -> None:
        """Looks at a record that was left out."""
        self._fields.update(extra)
        self._fields.update(["label"] if record.labels else (), ["text"] if record.texts else ())
        for field, seen in self._values.items():
            values = values_of(field, extra, record.texts, record.labels)
            seen.update(str(v) for v in values[: self.MOST - len(seen)] if v is not None)

    def line(self) -> str:
        """What is not there, and what is, the nearest first."""
        told = [f"no record has {dict(self._where)}"]
        for field, seen in self._values.items():
            if field not in self._fields:
                told.append(f"no field is called {field!r}: {self._nearest(field, self._fields)}")
                continue
            first = [*wanted_values(self._where[field]), ""][0]
            told.append(f"{field!r} is {self._nearest(str(first), seen)}")
        return "; ".join(told)

    def _nearest(self, word: str, there: set[str]) -> str:
        def far(one: str) -> tuple[float, str]:
            return (-difflib.SequenceMatcher(None, word, one).ratio(), one)

        shown = [one if len(one) < 60 else f"{one[:60]}.." for one in sorted(there, key=far)]
        more = ", ..." if len(shown) > self.SHOWN else ""
        return ", ".join(shown[: self.SHOWN]) + more


def _refield(source: Source, text_field: str, label_field: str) -> Source:
    """The source whose texts or labels come from fields of `extra`."""
    if not text_field and not label_field:
        return source

    def taken(record: Record, value: Any, inner: Sequence[str]) -> tuple[str, ...]:
        try:
            return tuple(map(json_text, strings(value, inner)))
        except ValueError as error:
            raise ValueError(f"data source {source.name}: {record.key}: {error}") from None

    def change(record: Record) -> Record:
        extra = json.loads(record.extra)
        if text_field:
            texts = taken(record, extra.get(text_field), INNER_TEXTS)
            record = record._replace(texts=texts)
        if label_field:
            labels = taken(record, extra.get(label_field), INNER_LABELS)
            record = record._replace(labels=labels)
        return record

    return Source(
        source.name,
        len(source),
        lambda indices: [change(r) for r in source.read(indices)],
        lambda indices: [change(r) for r in source.read_texts(indices)],
        folder=source.folder,
        fingerprint=source.fingerprint,
    )
