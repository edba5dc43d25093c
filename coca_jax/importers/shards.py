"""Writes one shard: reads its units, checks every item, and keeps account of each."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import glob
import hashlib
import importlib
import json
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from array_record.python import array_record_module

from coca_jax import extras
from coca_jax.data import files, images, records, unreachable
from coca_jax.data.records import Record
from coca_jax.files import storage
from coca_jax.importers import checks, dedup, in_place, remarks
from coca_jax.importers.items import Drawn, Item, Options, Unit, printable

MODULES = {
    "imagefolder": "imagefolder",
    "sidecars": "sidecars",
    "webdataset": "webdataset",
    "csv": "csv_list",
    "jsonl": "jsonl_list",
    "json": "json_list",
    "parquet": "parquet",
    "tfrecord": "tfrecord",
    "tfds": "tfds_name",
    "prepared": "prepared",
}
_Answer = TypeVar("_Answer")
_REPORT_EVERY = 64
_ASKED_AT_ONCE = 16
_MAX_CLASSES = 100_000
_MAX_FIELDS = 8  # that are named


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to write.

    Attributes:
        number: of the shard.
        units: what it holds.
        format: of the input.
        work: the folder of unfinished imports.
        root: of an index, the folder or URL below which it names files.
        drop: items (by their number in the shard) that deduplication leaves out, and why.
        twin: the shard of the same units that gets what a holdout leaves of them.
    """

    number: int
    units: tuple[Unit, ...]
    format: str
    options: Options
    work: str
    root: str = ""
    drop: Mapping[int, str] = dataclasses.field(default_factory=dict)
    twin: Job | None = None

    @property
    def part(self) -> str:
        return files.join(self.work, f"part-{self.number:05d}")


def importer(name: str) -> Any:
    """The module that reads a format.

    It has `plan(path, split, options)`, the units of the input; `read(unit, options)`, their items;
    and PATTERNS, globs of its files, or `splits(path)` where others tell the splits. Besides, where
    they apply: `located` (items without their images), `joined`, `drawn`, `has_pairs` and
    `declared_classes`.

    Raises:
        ValueError: an unknown format, or one whose package is not installed.
    """
    if name not in MODULES:
        raise ValueError(f"--format={name}: use one of {', '.join(MODULES)}")
    if name == "parquet":
        extras.check("pyarrow", "parquet", "--format=parquet")
    return importlib.import_module(f"coca_jax.importers.{MODULES[name]}")


def drawn_before(job: Job) -> Drawn:
    """What was drawn of a job's data before they were its input, as far as they tell."""
    of_data = getattr(importer(job.format), "drawn", None)
    return of_data(job.units[0]) if of_data else Drawn()


def joined(module: Any, units: Sequence[Unit]) -> Sequence[Unit]:
    """Units as one process reads them one after the other: of some formats neighbours are one."""
    join = getattr(module, "joined", None)
    return join(units) if join else units


def read_items(job: Job) -> Iterator[Item]:
    """The items of a job's units, in order. A file that cannot be opened is one problem item.

    Raises:
        Unreachable: the store of a file did not give it; what is behind the gap is not known.
        OSError: prepared data are no longer there.
    """
    module = importer(job.format)
    for unit in joined(module, job.units):
        items = module.read(unit, job.options)
        while (item := _next_item(items, unit, job.format)) is not None:
            item.key = printable(item.key)
            yield item


def _next_item(items: Iterator[Item], unit: Unit, format: str) -> Item | None:
    """The next item of a unit, None after the last one. Raises Unreachable."""
    with unreachable.noting() as failures:
        try:
            item = next(items, None)
        except unreachable.Unreachable:
            raise
        except Exception as error:
            remote = files.is_remote(unit.path) and not isinstance(error, FileNotFoundError)
            of_store = isinstance(error, OSError) or storage.is_of_network(error)
            if remote and of_store and not failures:
                failures.append((unit.path, error))
            of_file = isinstance(error, OSError) and format != "prepared"  # which tells each record
            if not failures and not of_file:
                raise
            # It was there when the import was planned.
            item = Item(printable(unit.path), problem="damaged_archive", detail=str(error))
    for path, why in failures:
        # An image by a URL of the web may lie on a host that is no more; that row alone is lost.
        if path == unit.path or not path.startswith(("http://", "https://")):
            raise unreachable.error(path, why) from why
    return item


def _judged(number: int, item: Item, job: Job) -> tuple[bytes, Record | None, str, str]:
    """(serialized, record, '', '') of an item that is kept, (b'', None, reason, detail) of one that
    cannot be used; b'' and no reason of one that is left out on purpose, by `detail`."""
    left_out = checks.wanted(item, job.options)
    if left_out:
        return b"", None, "", left_out
    record, reason, detail = checks.record(item, job.options)
    if record and number in job.drop:
        record, reason, detail = None, *job.drop[number].split(": ", 1)
    if record and job.options.in_place:
        record = in_place.referring(record, item, job.root)
        if not record:
            reason, detail = "not_in_place", "it lies compressed; without --in_place it is copied"
    return records.serialize(record) if record else b"", record, reason, detail


def finished(job: Job) -> dict[str, Any] | None:
    """The account of a shard that an earlier run has finished."""
    path = f"{job.part}.json"
    return json.loads(files.read(path)) if files.exists(path) else None


def of_each(ask: Callable[[Job], _Answer], jobs: Sequence[Job]) -> list[_Answer]:
    """What `ask` says of each job, many asked at once: a bucket takes tens of milliseconds to say
    whether one of ten thousand files is there."""
    with concurrent.futures.ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return list(pool.map(ask, jobs))


def write(job: Job, report: Callable[[int], None]) -> dict[str, Any]:
    """Writes a shard and its account, whole or not at all, and before it that of its twin.

    Args:
        job: the shard.
        report: called with the number of items read since the last call.

    Returns:
        The account: file, count, with_text, with_label, with_numbers_alone, with_lost_range, bytes,
        sha256; read; quarantined, a list of {key, reason, detail}; filtered, reason -> number;
        classes, the label names seen; caption_like, fields of examples without a caption that may
        hold one.
    """
    read = 0
    with tempfile.TemporaryDirectory() as folder:
        parts = [_Part(one, folder) for one in (job.twin, job) if one is not None]
        for number, item in enumerate(read_items(job)):
            read += 1
            if read % _REPORT_EVERY == 0:
                report(_REPORT_EVERY)
            for part in parts:
                part.add(number, item)
        report(read % _REPORT_EVERY)
        return [part.finish(read) for part in parts][-1]


class _Part:
    """A shard under way, and its account."""

    def __init__(self, job: Job, folder: str):
        self._job = job
        self._data = f"{job.part}.array_record"
        remote = files.is_remote(self._data)
        name = f"shard-{int(job.options.held_out)}"
        self._local = os.path.join(folder, name) if remote else _begun(self._data)
        options = "group_size:1,uncompressed"
        with records.writing(self._data):
            self._writer = array_record_module.ArrayRecordWriter(self._local, options)
        self._counts: Counter[str] = Counter(
            count=0, with_text=0, with_label=0, with_numbers_alone=0, with_lost_range=0
        )
        self._quarantined: list[dict[str, str]] = []
        self._filtered: Counter[str] = Counter()
        self._classes: set[str] = set()
        self._caption_like: set[str] = set()

    def add(self, number: int, item: Item) -> None:
        """Writes an item, or says in the account why it is left out."""
        try:
            kept, record, reason, detail = _judged(number, item, self._job)
        except Exception as error:  # one bad row never ends an import
            record, reason, detail = None, "bad_record", f"{type(error).__name__}: {error}"
        if record is None and not reason:
            self._filtered[detail] += 1
            return
        if record is None:
            detail = printable(detail[:300])
            self._quarantined.append({"key": item.key, "reason": reason, "detail": detail})
            return
        with records.writing(self._data):
            self._writer.write(kept)
        self._counts["count"] += 1
        self._counts["with_text"] += bool(record.texts)
        self._counts["with_label"] += bool(record.labels)
        self._counts["with_numbers_alone"] += remarks.are_numbers(record.texts)
        if self._job.options.verify:  # else no image is decoded
            self._counts["with_lost_range"] += images.loses_range(item.image)
        if not record.texts and len(self._caption_like) < _MAX_FIELDS:
            self._caption_like |= remarks.caption_like(item.extra)
        if len(self._classes) < _MAX_CLASSES:
            self._classes.update(record.labels)

    def finish(self, read: int) -> dict[str, Any]:
        """Gives the shard its place and writes the account. read: the items that it was given."""
        with records.writing(self._data):
            self._writer.close()
        size, digest = os.path.getsize(self._local), sha256(self._local)
        _put(self._local, self._data)
        account: dict[str, Any] = dict(
            **self._counts,
            bytes=size,
            sha256=digest,
            read=read,
            quarantined=self._quarantined,
            filtered=dict(self._filtered),
            classes=sorted(self._classes),
            caption_like=sorted(self._caption_like),
        )
        text = json.dumps(account, ensure_ascii=False, sort_keys=True)
        storage.write_bytes(f"{self._job.part}.json", text.encode())
        return account


def _begun(data: str) -> str:
    """A new name for a local shard that is not whole; what a killed process left is removed. A
    process that is only taken for dead may write on, but not into the file of the one after it."""
    for path in glob.glob(f"{glob.escape(data)}.*.tmp"):
        os.remove(path)
    return f"{data}.{uuid.uuid4().hex[:8]}.tmp"


def _put(local: str, data: str) -> None:
    """Gives a finished file its place, whole or not at all."""
    if not files.is_remote(data):
        shutil.move(local, data)
        return
    system, plain = files.filesystem(data)
    system.put_file(local, f"{plain}.tmp")
    system.mv(f"{plain}.tmp", plain)


def scan(job: Job, report: Callable[[int], None]) -> list[tuple[int, int, str, str, str, str]]:
    """(rank, number in the shard, key, place, content, look) of each item that can be used, on both
    sides of a holdout; kept on disk. rank: 0 for what keeps its images first, `Options.yields_to`.
    place: the file or files that a row names for its images; '' where they are no files."""
    known = scanned(job)
    if known is not None:
        return known
    found, ranked = [], [dataclasses.replace(job, options=one) for one in _ranked(job.options)]
    for number, item in enumerate(read_items(job)):
        report(1)
        try:
            for rank, one in enumerate(ranked):
                if not checks.wanted(item, one.options):
                    if _judged(number, item, one)[1]:
                        told = dedup.fingerprint(item.image, item.second)
                        found.append((rank, number, item.key, _files(item), *told))
                    break
        except Exception:  # `write` says what is wrong with it
            continue
    storage.write_bytes(f"{job.part}.fingerprints.json", json.dumps(found).encode())
    return found


def _ranked(options: Options) -> list[Options]:
    """Of what an import yields to, in order, and of itself, without a holdout."""
    whole = dataclasses.replace(options, holdout=0.0)
    found = []
    for field, values in options.yields_to:
        where = (*(one for one in options.where if one[0] != field), (field, values))
        found.append(dataclasses.replace(whole, where=where))
    return [*found, whole]


def _files(item: Item) -> str:
    """The files that are an item's images; '' where one is part of a file, or lies nowhere."""
    spans = [item.span, item.second_span] if item.second else [item.span]
    whole = [span.path for span in spans if span and not span.page and span.size == span.file_bytes]
    return "\n".join(whole) if len(whole) == len(spans) else ""


def scanned(job: Job) -> list[tuple[int, int, str, str, str, str]] | None:
    """What `scan` has found, or None."""
    path = f"{job.part}.fingerprints.json"
    if not files.exists(path):
        return None
    return [tuple(entry) for entry in json.loads(files.read(path))]


def sha256(path: str) -> str:
    """Of a local file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
