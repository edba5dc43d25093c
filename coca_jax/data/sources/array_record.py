"""Prepared data: the manifest of a folder, and random access to its ArrayRecord shards."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module

from coca_jax.config import Entry
from coca_jax.data.sources import (
    files,
    formats,
    in_place,
    manifest,
    records,
    references,
    remote,
)
from coca_jax.data.sources.fields import names, strings
from coca_jax.data.sources.items import Drawn, Item, Options, Unit, split_units
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.registry import Format
from coca_jax.data.sources.source import UNREAD, Indices, Problem, Reader, Source, read_one
from coca_jax.runtime import storage, unreachable

HOLD_BYTES = 1 << 30  # data sets below this stay in memory once read
# Shards of a source that stay open: this share of what the process may have, and so many at most;
# there are other sources, and sockets.
_OPEN = (0.25, 4096)
_ASKED_AT_ONCE = 16  # shards in a bucket
MANIFEST = manifest.FILE


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of prepared data.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder that `prepare` has not written, with the command that would; or a
            damaged manifest.
    """
    found = manifest.read(path)
    if found is not None:
        return found
    remote = files.is_remote(path)
    if remote or not os.path.exists(path):
        what = f"no such folder, or no {MANIFEST} in it" if remote else "no such folder"
        raise FileNotFoundError(
            f"data source {path}: {what}; write it with "
            f"`coca-jax prepare --out={path}` (a recipe's first lines show how), or name data of "
            "your own (--data= of train and evaluate)"
        )
    raise ValueError(
        f"data source {path}: not prepared data (no {MANIFEST}); run `coca-jax prepare "
        f"--format={formats.guess(path)} --input={path} --out=DIR` and give path=DIR"
    )


def open_entry(entry: Entry, split: str) -> Source:
    """An entry dict(path=...) of config.data.sources. Raises as `open_split`, and ValueError for
    another field of the images than its records are of."""
    found = open_split(entry.path, split)
    if not entry.image_field:
        return found
    request = read_manifest(storage.plain_path(entry.path))["splits"][split].get("request")
    options = request.get("options") if isinstance(request, dict) else None
    made_by = options.get("image_field", "") if isinstance(options, dict) else entry.image_field
    if made_by != entry.image_field:
        raise ValueError(
            f"data source {entry.path}: it was prepared with image_field={made_by!r}, not "
            f"{entry.image_field!r}; leave that out, or prepare the data by it"
        )
    return found


def open_split(path: str, split: str) -> Source:
    """A split of a folder that `coca-jax prepare` wrote.

    Raises:
        FileNotFoundError: the folder or one of its shards is missing.
        ValueError: no such split, or a shard has another size than the manifest says.
    """
    path = storage.plain_path(path)
    splits = read_manifest(path)["splits"]
    if split not in splits:
        raise ValueError(f"data source {path}: no split {split!r}; it has {sorted(splits)}")
    shards = splits[split]["shards"]
    paths = [files.join(path, shard["file"]) for shard in shards]
    for shard, size in zip(shards, _sizes(paths)):
        if size is None:
            raise FileNotFoundError(f"data source {path}: shard {shard['file']} is missing")
        if size != shard["bytes"]:
            raise ValueError(
                f"data source {path}: {shard['file']} has {size} bytes, the "
                f"manifest says {shard['bytes']}; prepare it again"
            )
    counts = [shard["count"] for shard in shards]
    read: Reader = ArrayRecordFiles(paths, counts)
    if sum(shard["bytes"] for shard in shards) < HOLD_BYTES:
        read = Held(read, sum(counts), HOLD_BYTES)
    read_texts = None
    if "root" in splits[split]:  # an index of data that are read in place
        images = in_place.InPlace(read, _root(path, splits[split]["root"]))
        read, read_texts = images, images.without_images
    found = Source(
        f"{path} [{split}]",
        sum(counts),
        read,
        read_texts,
        every=[has for has in ("text", "label") if splits[split][f"with_{has}"] == sum(counts)],
        folder=path,
        fingerprint=" ".join([split, *(shard["sha256"] for shard in shards)]),
    )
    request = splits[split].get("request")
    options = request.get("options") if isinstance(request, dict) else None
    found.unchecked = isinstance(options, dict) and not options.get("check", True)
    return found


def _sizes(paths: list[str]) -> list[int | None]:
    """Bytes of each file; None where it is not there. Raises OSError where a store does not answer.

    Those in a bucket are asked for many at once: it takes tens of milliseconds to answer for each
    of a thousand shards.
    """
    if not any(map(files.is_remote, paths)):
        return [_size(path) for path in paths]
    pool = concurrent.futures.ThreadPoolExecutor(_ASKED_AT_ONCE)
    try:
        # Each in this thread's context, so that whoever is `unreachable.noting` hears of failures.
        asked = [pool.submit(contextvars.copy_context().run, _size, path) for path in paths]
        return [one.result() for one in asked]
    finally:
        pool.shutdown(cancel_futures=True)


def _size(path: str) -> int | None:
    try:
        with storage.as_os_error(path, "cannot be reached"):
            return files.size(path)
    except FileNotFoundError:
        return None


def _root(path: str, manifest: str) -> str:
    """The folder or URL below which an index names files.

    Raises:
        ValueError: neither a local one nor one in a bucket.
        FileNotFoundError: it is gone.
    """
    root = files.real(files.join(path, manifest))
    if not references.is_place(root):
        raise ValueError(
            f"data source {path}: it is an index of {root[:200]}, neither here nor in a bucket"
        )
    if not files.exists(root):
        raise FileNotFoundError(
            f"data source {path}: it is an index of what lies in {root}, which is not there; put "
            "the data back, or prepare a copy without --in_place"
        )
    return root


class Held:
    """Keeps what was read in memory, up to `limit` bytes. Thread-safe."""

    def __init__(self, read: Reader, size: int, limit: int):
        self._read, self._room = read, limit
        self._records: list[Record | None] = [None] * size

    def __call__(self, indices: Indices) -> list[Record]:
        """The records at `indices`, in their order."""
        records = self._records
        missing = sorted({int(i) for i in indices if records[i] is None})
        fresh: dict[int, Record] = {}
        if missing:
            for index, record in zip(missing, self._read(missing)):
                fresh[index] = record
                if self._room > 0:
                    self._room -= len(record.image) + len(record.second) + 512
                    records[index] = record
        return [records[i] or fresh[int(i)] for i in indices]


class ArrayRecordFiles:
    """Reads records at indices into a list of ArrayRecord files, of which the last ones stay open.
    Thread-safe."""

    def __init__(self, paths: list[str], counts: list[int]):
        self._paths = paths
        self._ends = np.cumsum(counts)
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
            else:
                while len(self._readers) >= storage.most_open(
                    *_OPEN
                ):  # closed once no thread reads it
                    self._readers.popitem(last=False)
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    remote.local_copy(self._paths[shard]),
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=32768,
                )
            return self._readers[shard]

    def __call__(self, indices: Indices) -> list[Record]:
        """The records at `indices`, in their order; RuntimeError where a shard is damaged."""
        wanted = np.asarray(indices, np.int64)
        shards = np.searchsorted(self._ends, wanted, side="right")
        result: list[Record | None] = [None] * len(wanted)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            start = self._ends[shard - 1] if shard else 0
            data = self._reader(int(shard)).read([int(i - start) for i in wanted[rows]])
            for row, serialized in zip(rows, data):
                result[row] = records.parse(serialized)
        return result  # type: ignore[return-value]


# Prepared data as input: to be split, narrowed, shrunk or freed of duplicates once more.


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
    rows = len(open_split(path, split))
    return [
        Unit(f"{path}@{split}", unit.start, unit.stop, unit.rows)
        for unit in split_units(path, rows, ROWS_PER_UNIT)
    ]


def splits(path: str) -> list[str]:
    """The splits that were prepared."""
    return sorted(read_manifest(path)["splits"])


def has_pairs(path: str, split: str) -> bool:
    """Whether there are pairs of images among its first records. Raises as `plan` and `read`."""
    units = plan(path, split, Options())
    return any(item.second for item in itertools.islice(read(units[0], Options()), _LOOK_AT))


def declared_classes(unit: Unit, options: Options) -> list[str]:
    """The class names of the data, unless other labels are taken or others given."""
    if options.label_field or options.class_names:
        return list(options.class_names)
    return list(read_manifest(unit.path.rpartition("@")[0])["class_names"])


def drawn(unit: Unit) -> Drawn:
    """What was drawn of the data until the split was left."""
    path, _, split = unit.path.rpartition("@")
    return manifest.drawn(read_manifest(path)["splits"][split])


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The records of a range, in their order; one that cannot be read is one problem item.

    Raises:
        Unreachable: a store did not give what it has.
        FileNotFoundError, ValueError: the data are no longer there.
        OSError: this process has too many files open.
    """
    path, _, split = unit.path.rpartition("@")
    manifest = json.dumps(read_manifest(path)["splits"].get(split))
    source, before = _opened(path, split, manifest), drawn(unit)
    for start in range(unit.start, unit.stop, 256):
        rows = range(start, min(start + 256, unit.stop))
        for row, (record, why) in zip(rows, _records(source, rows)):
            item = _item(record, options)
            item.drawn = before
            if why:
                item.key = item.key or f"{split}/{row}"
                item.problem = "missing_image" if record is not UNREAD else "damaged_archive"
                item.detail = why.detail
            yield item
    if unit.stop >= len(source):
        _opened.cache_clear()  # it may hold a GiB of records


@functools.lru_cache(maxsize=1)
def _opened(path: str, split: str, manifest: str) -> Source:
    """The data of all units of a split: to open them asks for each of the shards. told: what the
    manifest says of the split, other things where it was written anew."""
    return open_split(path, split)


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


def _records(source: Source, rows: range) -> Iterable[tuple[Record, Problem | None]]:
    """Each record with None; where one cannot be read, what an index says of it, or UNREAD, and why.
    Raises as `read`."""
    try:
        with unreachable.required():
            return [(record, None) for record in source.read(rows)]
    except unreachable.Unreachable:
        raise
    except Exception:  # of one of them; of which its own read says
        return (_record(source, row) for row in rows)


def _record(source: Source, row: int) -> tuple[Record, Problem | None]:
    with unreachable.required():
        record, why = read_one(source, row)
        if why:
            with contextlib.suppress(Exception):  # as of the image, of a shard that is damaged
                record = source.read_texts([row])[0]
    return record, why


FORMATS = (
    Format(
        *("prepared", plan, read, (), 0),
        in_place=False,
        splits=splits,
        declared_classes=declared_classes,
        drawn=drawn,
        has_pairs=has_pairs,
    ),
)
