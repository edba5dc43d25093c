"""Which records of a source are examples: `where`, `limit`, each caption or question by itself."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from coca_jax.config import Entry
from coca_jax.data import supervision
from coca_jax.data.sources import files
from coca_jax.data.sources.fields import (
    INNER_LABELS,
    INNER_TEXTS,
    selected,
    strings,
    values_of,
    wanted_values,
)
from coca_jax.data.sources.records import Record, json_text
from coca_jax.data.sources.source import Indices, Source
from coca_jax.runtime import activity
from coca_jax.runtime.storage import write_bytes

# The index of a view (views.py), kept in a file so that it is made once.
#
# Making one reads every record of the data. The file lies beside the data or in the workdir of the
# run, and is checked when it is read.


FOLDER = "views"  # of index files, beside the shards or in a workdir
_FORMAT = 2  # of index files; a file of another is made anew. 2: answers of null are none


class Index(NamedTuple):
    """What a view leaves of n examples.

    Attributes:
        rows: integers [n], the record of each example.
        parts: integers [n], which of the record's texts or questions; None: the whole record.
        class_names: the distinct labels of the examples, sorted; None where they were not seen.
    """

    rows: np.ndarray
    parts: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


class Indexes:
    """Where index files are kept, and which process of a run makes them.

    A file lies beside the data, or, where that cannot be written, in `workdir`. Of several
    processes the first one makes it and leaves it in the workdir, which all of them see, and the
    others wait for it there.

    Args:
        workdir: of the run; '' for none.
        process_index, process_count: of this process, and how many there are.
    """

    def __init__(self, workdir: str = "", process_index: int = 0, process_count: int = 1):
        self._workdir = workdir
        self._first = process_index == 0
        self._several = process_count > 1 and bool(workdir)

    def get(self, folder: str, mark: str, rows: int, make: Callable[[], Index]) -> Index:
        """The index of a view, from its file or made.

        Args:
            folder: of the data; '' for a place that keeps no files.
            mark: all that the index depends on; a file that was made of anything else is not taken.
            rows: how many records there are.
            make: makes the index.

        Raises:
            ValueError: what `make` raises; or the first process has written nothing in a day.
        """
        name = f"{hashlib.blake2b(mark.encode(), digest_size=12).hexdigest()}.npz"
        found = self._find(folder, name, mark, rows)
        if found is None and self._several and not self._first:
            found = self._wait(name, mark, rows)
        if found is None:
            found = make()
            self._save(folder, name, _encode(mark, found))
        elif self._several and self._first and self._find("", name, mark, rows) is None:
            self._save("", name, _encode(mark, found))  # the others may not see the data's folder
        return found

    def _find(self, folder: str, name: str, mark: str, rows: int) -> Index | None:
        for place in filter(None, (folder, self._workdir)):
            path = files.join(files.join(place, FOLDER), name)
            try:
                found = _decode(files.read(path), mark, rows) if files.exists(path) else None
            except (OSError, ValueError) as error:
                logging.warning("%s: damaged, made anew (%s)", path, error)
                continue
            if found is not None:
                return found
        return None

    def _wait(self, name: str, mark: str, rows: int) -> Index:
        path = f"{self._workdir}/{FOLDER}/{name}"
        look = functools.partial(self._find, "", name, mark, rows)
        # It may read a billion records. Where it ends meanwhile, this process hears of that.
        return activity.until(f"process 0 to write {path}", look, hours=24, pause=0.5)

    def _save(self, folder: str, name: str, data: bytes) -> None:
        written = bool(folder) and _write(folder, name, data)
        if self._workdir and (self._several or not written):
            written = _write(self._workdir, name, data) or written
        if not written:
            logging.info("an index could not be kept, neither in %r nor in a workdir", folder)


def _write(folder: str, name: str, data: bytes) -> bool:
    try:
        write_bytes(files.join(files.join(folder, FOLDER), name), data)
    except OSError:  # read-only data are usual
        return False
    return True


def _encode(mark: str, index: Index) -> bytes:
    small = np.uint32 if not len(index.rows) or index.rows.max() < 1 << 32 else np.int64
    arrays: dict[str, Any] = dict(rows=index.rows.astype(small))
    if index.parts is not None:
        arrays["parts"] = index.parts.astype(np.uint32)
    names = None if index.class_names is None else list(index.class_names)
    head = json.dumps(dict(format=_FORMAT, made_of=mark, class_names=names))
    out = io.BytesIO()
    np.savez_compressed(out, head=np.frombuffer(head.encode(), np.uint8), **arrays)
    return out.getvalue()


def _decode(data: bytes, mark: str, rows: int) -> Index | None:
    """None: made of something else. Raises ValueError: damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes().decode())
            found = arrays["rows"].astype(np.int64)
            parts = arrays["parts"].astype(np.int64) if "parts" in arrays.files else None
    except Exception as error:  # zipfile, zlib, numpy and json each have their own
        raise ValueError(str(error)) from None
    if head.get("format") != _FORMAT or head.get("made_of") != mark:
        return None
    if len(found) and found.max() >= rows or (parts is not None and len(parts) != len(found)):
        raise ValueError(f"it names records beyond {rows}")
    names = head["class_names"]
    return Index(found, parts, None if names is None else tuple(names))


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
    kind = supervision.of(entry)
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

    def __init__(self, source: Source, entry: Entry, kind: supervision.Kind, training: bool):
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
        found.class_names, found.unchecked = index.class_names, source.unchecked
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
        parts = [f"no record has {dict(self._where)}"]
        for field, seen in self._values.items():
            if field not in self._fields:
                parts.append(f"no field is called {field!r}: {self._nearest(field, self._fields)}")
                continue
            first = [*wanted_values(self._where[field]), ""][0]
            parts.append(f"{field!r} is {self._nearest(str(first), seen)}")
        return "; ".join(parts)

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


# Opens the entries of config.data.sources, wherever their data lie.


# The key of an entry that names its place, and the module of coca_jax.data whose
# `open_entry(entry, split)` opens it. Only that module is imported.
PLACES = {
    "path": "sources.array_record",
    "builtin": "synthetic_source",
    "tfds": "sources.tfds",
    "seqio": "seqio_source",
}


def open_source(
    entry: Entry | Mapping[str, Any] | str,
    split: str = "train",
    *,
    training: bool = False,
    indexes: Indexes | None = None,
) -> Source:
    """Opens one entry of `config.data.sources`, or a path of prepared data.

    Args:
        entry: a path, or what `config.Entry` has, with one of path, builtin, tfds and
            seqio.
        split: the split where the entry names none.
        training: leave out records without what the kind trains on.
        indexes: where the index of a view is kept; None: beside the data, where that can be
            written.

    Raises:
        ValueError, FileNotFoundError: what is wrong with it, in one line.
    """
    entry = Entry.of(entry)
    return narrow(open_whole(entry, split), entry, training=training, indexes=indexes)


def open_whole(entry: Entry, split: str = "train") -> Source:
    """All records of an entry's split, also those that it leaves out. Raises as `open_source`."""
    places = [place for place in PLACES if getattr(entry, place)]
    if len(places) != 1:
        raise ValueError(f"data source {entry.to_dict()}: give exactly one of {', '.join(PLACES)}")
    place = importlib.import_module(f"coca_jax.data.{PLACES[places[0]]}")
    return place.open_entry(entry, entry.split or split)
