"""Writes one split of a data set as ArrayRecord shards with a manifest, whatever it comes from.

Shards are written in parallel and appear whole or not at all; after a kill the same call goes on,
and the result is the same to the byte.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from array_record.python import array_record_module

from coca_jax.data import dedup, quarantine
from coca_jax.data.sources import files, in_place, manifest, records, registry
from coca_jax.data.sources import manifest as metadata
from coca_jax.data.sources.fields import named_classes, printable
from coca_jax.data.sources.items import Drawn, Item, Options, Rows, Unit
from coca_jax.data.sources.records import Record
from coca_jax.runtime import activity, machine, out_folder, progress, storage, unreachable
from coca_jax.runtime.workers import Engine

# Writes one shard: reads its units, checks every item, and keeps account of each.


_Answer = TypeVar("_Answer")
_REPORT_EVERY = 64
_ASKED_AT_ONCE = 16
_MAX_CLASSES = 100_000
_FEW_UNREAD, _ROWS_OF_ARCHIVE = 200_000, 5_000  # rows; a guess for archives, which do not tell


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


def drawn_before(job: Job) -> Drawn:
    """What was drawn of a job's data before they were its input, as far as they tell."""
    of_data = registry.find(job.format).drawn
    return of_data(job.units[0]) if of_data else Drawn()


def read_items(job: Job) -> Iterator[Item]:
    """The items of a job's units, in order. A file that cannot be opened is one problem item.

    Raises as `read_rows`.
    """
    yield from _read(job, registry.find(job.format).read)


def read_rows(job: Job) -> Iterator[Item | Rows]:
    """`read_items`; of an index without checks some formats give many at once.

    Raises:
        Unreachable: the store of a file did not give it; what is behind the gap is not known.
        OSError: prepared data are no longer there.
    """
    format = registry.find(job.format)
    read: Callable[..., Iterator[Any]] = format.read
    if job.options.unread and format.index_rows:
        read = functools.partial(format.index_rows, root=job.root)
    yield from _read(job, read)


def _read(job: Job, read: Callable[[Unit, Options], Iterator[Any]]) -> Iterator[Any]:
    for unit in registry.find(job.format).joined(job.units):
        items = read(unit, job.options)
        while (item := _next_item(items, unit, job.format)) is not None:
            if isinstance(item, Item):
                item.key = printable(item.key)
            yield item


def _next_item(items: Iterator[Any], unit: Unit, format: str) -> Any:
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
    left_out = quarantine.wanted(item, job.options)
    if left_out:
        return b"", None, "", left_out
    record, reason, detail = quarantine.record(item, job.options)
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
        The account: file, count, with_text, with_label, bytes, sha256; read; quarantined, a list
        of {key, reason, detail}; filtered, reason -> number; classes, the label names seen.
    """
    read = 0
    with tempfile.TemporaryDirectory() as folder:
        parts = [_Part(one, folder) for one in (job.twin, job) if one is not None]
        reported = 0
        for item in read_rows(job):
            for part in parts:
                if isinstance(item, Item):
                    part.add(read, item)
                else:
                    part.add_rows(item)
            read += 1 if isinstance(item, Item) else len(item.keys)
            if read - reported >= _REPORT_EVERY:
                report(read - reported)
                reported = read
        report(read - reported)
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
        self._counts: Counter[str] = Counter(count=0, with_text=0, with_label=0)
        self._quarantined: list[dict[str, str]] = []
        self._filtered: Counter[str] = Counter()
        self._classes: set[str] = set()

    def add(self, number: int, item: Item) -> None:
        """Writes an item, or says in the account why it is left out."""
        try:
            accepted, record, reason, detail = _judged(number, item, self._job)
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
            self._writer.write(accepted)
        self._counts["count"] += 1
        self._counts["with_text"] += bool(record.texts)
        self._counts["with_label"] += bool(record.labels)
        if len(self._classes) < _MAX_CLASSES:
            self._classes.update(record.labels)

    def add_rows(self, rows: Rows) -> None:
        """Writes those of many sound rows that the selection keeps."""
        options = self._job.options
        if options.where or options.sample < 1.0:
            for key, texts, labels, extra, image in zip(*rows):
                item = Item(key, texts=texts, labels=labels, extra=json.loads(extra))
                left_out = quarantine.wanted(item, options)
                if left_out:
                    self._filtered[left_out] += 1
                else:
                    self._write_row(key, texts, labels, extra, image)
            return
        for key, texts, labels, extra, image in zip(*rows):
            if options.holdout:
                held = quarantine.is_held_out(key.encode(), options.holdout)
                if held != options.held_out:
                    self._filtered["held_out" if held else "not_held_out"] += 1
                    continue
            self._write_row(key, texts, labels, extra, image)

    def _write_row(
        self, key: str, texts: list[str], labels: tuple[str, ...], extra: str, image: bytes
    ) -> None:
        self._writer.write(records.serialize(Record(image, tuple(texts), labels, key, extra)))
        self._counts["count"] += 1
        self._counts["with_text"] += bool(texts)
        self._counts["with_label"] += bool(labels)
        if labels and len(self._classes) < _MAX_CLASSES:
            self._classes.update(labels)

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
    known = scan_results(job)
    if known is not None:
        return known
    found, ranked = [], [dataclasses.replace(job, options=one) for one in _ranked(job.options)]
    for number, item in enumerate(read_items(job)):
        report(1)
        try:
            for rank, one in enumerate(ranked):
                if not quarantine.wanted(item, one.options):
                    if _judged(number, item, one)[1]:
                        fingerprint = dedup.fingerprint(item.image, item.second)
                        found.append((rank, number, item.key, _files(item), *fingerprint))
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


def scan_results(job: Job) -> list[tuple[int, int, str, str, str, str]] | None:
    """What `scan` has found, or None."""
    path = f"{job.part}.fingerprints.json"
    if not files.exists(path):
        return None
    return [tuple(entry) for entry in json.loads(files.read(path))]


def sha256(path: str) -> str:
    """Of a local file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Does the shards of an import: their fingerprints, then the shards, on whichever engine.


@dataclasses.dataclass(frozen=True)
class Hands:
    """engine: who does the shards. processes: of engine 'local'; 0: one per core. progress: shows
    how far they are."""

    engine: Engine = Engine()
    processes: int = 0
    progress: bool = True

    def do(self, function: Callable, jobs: list[Job], what: str) -> list[Any]:
        """function(job, report) for each job, in their order."""
        known = all(unit.rows for job in jobs for unit in job.units)
        total = sum(unit.rows for job in jobs for unit in job.units) if known else None
        processes = self.processes or machine.count()
        # Without reading an image this process is done before others have started.
        rows = sum(unit.rows or _ROWS_OF_ARCHIVE for job in jobs for unit in job.units)
        if rows < _FEW_UNREAD and all(job.options.unread for job in jobs):
            processes = 1
        # In-memory files exist in this process only.
        if any("memory://" in path for job in jobs for path in (job.work, job.units[0].path)):
            processes = 1
        with progress.Bar(total, "examples", what, shown=self.progress) as bar:
            return self.engine.run(function, jobs, bar.update, processes=processes)


def written(jobs: list[Job], options: Options, hands: Hands) -> list[dict[str, Any] | None]:
    """Writes the shards that no earlier run has finished, and returns what was written of each;
    None of one that is another's to write, or waits for what others have still to read."""
    if options.dedup != "none" or options.exclude:
        hands.do(scan, hands.engine.own(jobs), "fingerprints")
        scanned = of_each(scan_results, jobs)
        known = [entries for entries in scanned if entries is not None]
        if len(known) < len(jobs):
            return [None] * len(jobs)
        with activity.announce(f"comparing {sum(map(len, known))} images"):
            jobs = _deduplicated(jobs, known, options)
    numbers = [job.number for job in jobs]
    found = dict(zip(numbers, of_each(finished, jobs)))
    left = [job for job in hands.engine.own(jobs) if not found[job.number]]
    found |= zip((job.number for job in left), hands.do(write, left, "prepare"))
    return list(found.values())


def _deduplicated(
    jobs: list[Job],
    scanned: list[list[tuple[int, int, str, str, str, str]]],
    options: Options,
) -> list[Job]:
    """Tells each job what to leave out, by the fingerprints of all. Rows of one split that name the
    same file are no duplicates: they go or stay together."""
    every = [(job.number, entry) for job, entries in zip(jobs, scanned) for entry in entries]
    of_file: dict[tuple[int, str], tuple[int, int]] = {}
    like: dict[tuple[int, int], tuple[int, int]] = {}
    found = []
    for shard, (rank, number, key, place, content, look) in sorted(
        every, key=lambda one: one[1][0]
    ):
        here = shard, number
        like[here] = of_file.setdefault((rank, place), here) if place else here
        if like[here] == here:
            found.append((shard, number, key, content, look))
    exclude = [one for path in options.exclude for one in dedup.to_exclude(path)]
    drop = dedup.decide(found, options.dedup, options.distance, exclude)
    duplicates: dict[int, dict[int, str]] = {job.number: {} for job in jobs}
    for (shard, number), first in like.items():
        if first in drop:
            duplicates[shard][number] = drop[first]
    return [dataclasses.replace(job, drop=duplicates[job.number]) for job in jobs]


# What is asked for of a split, as its manifest keeps it, and whether that is there already, or
# begun.


_BEGUN = ".unfinished-"  # before the name of a split


class Otherwise(ValueError):
    """`place` holds what was asked for otherwise; why: that, in words, remedy: of `prepare`."""

    def __init__(self, place: str, why: str, remedy: str):
        super().__init__(f"{why}; {remedy}")
        self.place, self.why = place, why


@contextlib.contextmanager
def within(flag: str, folder: str) -> Iterator[None]:
    """Data that were brought into a folder otherwise get the remedy of whoever gave that folder by
    a flag ('--workdir'), not the flags of `prepare`."""
    try:
        yield
    except Otherwise as error:
        raise ValueError(
            f"{flag}={folder}: {error.why.removeprefix('--out=')}; give another {flag}, or remove "
            f"{error.place}"
        ) from None


def import_request(format: str, input: str, options: Options) -> dict[str, Any]:
    """What is asked for, as JSON has it."""
    found = {"format": format, "input": input, "options": dataclasses.asdict(options)}
    return json.loads(json.dumps(found))


def is_there(out: str, split: str, request: dict[str, Any]) -> bool:
    """Whether `out` holds a split of this request. Raises ValueError where it is of another."""
    there = manifest.read_manifest(out)["splits"].get(split)
    if there is not None and there.get("request") != request:
        why = f"--out={out} already holds a split {split!r} made with other options"
        raise Otherwise(out, why, "give --overwrite, or another --out or --split")
    return there is not None


def refuse_held_out(out: str, request: dict[str, Any], written: Collection[str]) -> None:
    """Raises ValueError where images that are held out would be in two splits: `out` has a split
    of the same request but for the holdout. written: the splits that are written now."""
    asked = request["options"]
    for name, split in manifest.read_manifest(out)["splits"].items():
        there = split.get("request")
        if name in written or not there:
            continue
        held = {key: there["options"][key] for key in ("holdout", "held_out")}
        others = held["held_out"] != asked["held_out"] and held["holdout"] != asked["holdout"]
        if not others or there != request | {"options": asked | held}:
            continue
        if asked["held_out"]:
            raise Otherwise(
                out,
                f"--out={out} holds a split {name!r} of the same input, in which the images that "
                "--holdout keeps apart would be too",
                "give another --out",
            )
        raise Otherwise(
            out,
            f"--out={out} holds a split {name!r} of images held out of the same input, which "
            "would be in both",
            f"give --holdout={held['holdout']}, or another --out",
        )


def refuse_pairs(format: str, input: str, split: str, options: Options) -> None:
    """Raises ValueError for pairs of images, which by the bytes of one image cannot be held out."""
    if "," in options.image_field or registry.find(format).has_pairs(input, split):
        raise ValueError(
            f"--input={input}: --holdout keeps no pairs of images apart, as an image may stand in "
            "several; give them a field 'split', or write each side by --where and --split"
        )


def unfinished(out: str, split: str) -> str:
    """The folder of what is written of a split before it is whole."""
    return files.join(out, f"{_BEGUN}{split}")


def check_folder(out: str) -> None:
    """Raises ValueError for a folder that holds something and was neither written nor begun by an
    import: with its manifest it would count as prepared data."""
    system, plain = files.filesystem(out)
    if not system.isdir(plain) or files.exists(files.join(out, manifest.MANIFEST)):
        return
    names = files.listing(out)
    others = [name for name in names if not files.is_hidden(name)]
    if others and not any(name.startswith(_BEGUN) for name in names):
        raise out_folder.something_else(out, others[0])


def begun(
    input: str, work: str, request: dict[str, Any], state: Callable[[list[Unit]], str]
) -> list[list[Unit]]:
    """The shards that an earlier run began to write in `work`, by their units. Raises ValueError
    where it did so for another request, or of files that have changed since."""
    plan = json.loads(files.read(files.join(work, "plan.json")))
    if plan["request"] != request:
        why = f"{work} is an unfinished import with other options"
        raise Otherwise(work, why, "give --overwrite, or remove it")
    groups = [[Unit(**unit) for unit in group] for group in plan["groups"]]
    before, now = plan.get("state"), state([unit for group in groups for unit in group])
    if before and now and manifest.have_changed(before, now):
        why = f"{input} has changed since {work} was begun"
        raise Otherwise(work, why, "give --overwrite, or remove that folder")
    return groups


# Why an import holds nothing, told from what it wrote so far.


class NothingLeft(ValueError):
    """An import that leaves no example: what it listed and filtered."""

    def __init__(
        self,
        request: dict[str, Any],
        read: int,
        listed: Sequence[Mapping[str, str]],
        filtered: Mapping[str, int],
    ):
        self.listed, self.filtered = listed, filtered
        super().__init__(quarantine.nothing_usable(request["input"], read, listed, filtered))

    def left_out(self, rows: int) -> Counter[str]:
        """What was filtered of a split of so many rows, by reason; 'where' without those of other
        splits."""
        found = Counter({k: n for k, n in self.filtered.items() if k != "where"})
        return found + Counter(where=rows - len(self.listed) - found.total())


def _check_usable(work: str) -> None:
    """Raises NothingLeft where the shards that an import has written so far hold no example."""
    names = [n for n in files.listing(work) if re.fullmatch(r"part-\d+\.json", n)]
    accounts = [json.loads(files.read(files.join(work, name))) for name in names]
    listed = [entry for account in accounts for entry in account["quarantined"]]
    where = sum(account["filtered"].get("where", 0) for account in accounts)
    if (listed or where) and not any(account["count"] for account in accounts):
        request = json.loads(files.read(files.join(work, "plan.json")))["request"]
        read = sum(account["read"] for account in accounts)
        raise NothingLeft(request, read, listed, {"where": where} if where else {})


_ROWS_PER_SHARD = 16_384
_HARDLY = 1e-3  # a chance
State = Callable[[list[Unit]], str]


class EmptySide(ValueError):
    """A holdout that leaves none of `read` images for `split`; `why` says what that comes from
    where it is hardly chance, else ''."""

    def __init__(self, request: dict[str, Any], read: int, split: str, filtered: Mapping[str, int]):
        share, held = request["options"]["holdout"], request["options"]["held_out"]
        by_hash = filtered == {"not_held_out" if held else "held_out": read}
        self.read, self.split, self.why = read, split, ""
        if by_hash and (1 - share if held else share) ** read < _HARDLY:
            side, fix = ("left", "larger") if held else ("took", "smaller")
            self.why = f", as they are equal or what an earlier holdout {side} (try a {fix} share)"
        super().__init__(
            f"--input={request['input']}: a holdout of {share:.3g} leaves none of {read} images "
            f"for the split {split!r}{self.why}; give another share"
        )


def splits_of(format: str, input: str) -> list[str]:
    """The splits that an input tells by the names of its files or folders; [] when it tells none.

    Raises ValueError for an unknown format or data that it cannot open.
    """
    found = registry.find(format)
    return found.splits(input) if found.splits else files.splits_in_names(input, found.patterns)


def prepare_with_holdout(
    format: str, input: str, out: str, share: float, *, held_split: str = "test", **keywords: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Imports one split as two: about a `share` of its images apart, chosen by their bytes.

    Images of equal bytes go to the same side, on every machine and in every order.

    Args:
        share: above 0, below 1.
        held_split: the split of those that are kept apart.
        keywords: of `prepare`.

    Returns:
        What `prepare` returns, of the others and of those kept apart.

    Raises:
        FileNotFoundError, ValueError: as `prepare`; pairs of images.
        EmptySide: no image falls to one of the sides.
    """
    if not 0 < share < 1:
        raise ValueError(f"--holdout={share}: give a share of the images, above 0 and below 1")
    out, split = storage.plain_path(str(out)), keywords.pop("split", "train")
    if split == held_split:
        raise ValueError(f"--split={split} is what --holdout writes; give another --split")
    options = dataclasses.replace(keywords.pop("options", None) or Options(), holdout=share)
    keywords.setdefault("read_split", split)
    request = import_request(format, str(input), options)
    # Asked before the one is written that others must go with.
    if keywords.get("overwrite") or not is_there(out, split, request):
        refuse_pairs(format, str(input), keywords["read_split"], options)
    apart = dataclasses.replace(options, held_out=True)
    beside, work = (split, options), unfinished(out, split)
    known = files.exists(work)
    try:
        keywords_here = keywords | dict(split=held_split, options=apart, beside=beside)
        held = prepare(format, input, out, **keywords_here)
    except ValueError:  # another share is another import
        if known or not files.exists(work):
            raise
        try:
            _check_usable(work)  # then the share is not what is wrong
        finally:
            system, plain_work = files.filesystem(work)
            system.rm(plain_work, recursive=True)
        raise
    return prepare(format, input, out, split=split, options=options, **keywords), held


def prepare(
    format: str,
    input: str,
    out: str,
    *,
    split: str = "train",
    read_split: str = "",
    options: Options | None = None,
    processes: int = 0,
    shard_count: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    engine: Engine | None = None,
    beside: tuple[str, Options] | None = None,
    state: State = lambda units: "",
) -> dict[str, Any]:
    """Imports one split; see the module's text.

    Args:
        split: the name that it gets.
        read_split: the one that is read, where the input tells several; '': `split`.
        engine: who does the shards; None: `processes` of this machine, 0: one per core.
        beside: another split of the same examples, and its options: its shards are written in the
            same pass, for a call for that split to take.
        state: tells of units whether their files have changed; kept in the manifest where it is.

    Returns:
        split, read, written, quarantined (by reason), filtered (by reason), shards, classes,
        images with texts and with labels, bytes, out. Of an engine with a share: split, out,
        shards, and waiting, the number of those that are not there; a call without a share then
        joins them.

    Raises:
        FileNotFoundError: no input.
        ValueError: the format cannot be read, or no item can be used (NothingLeft); or `out` holds
            this split, or an unfinished import of it, of other options or of files changed since.
    """
    options = options or Options()
    _refuse_unread(options)
    out = storage.plain_path(str(out))
    check_place(str(input), out, split)
    if engine and engine.share and overwrite:  # a job that starts late would begin once more
        raise ValueError("--overwrite and --shard exclude each other; give another --out")
    manifest = metadata.read_manifest(out)
    request = import_request(format, str(input), options)
    if not overwrite and is_there(out, split, request):
        return _summary(out, split, manifest)
    refuse_held_out(out, request, {split, beside[0] if beside else split})
    dedup.check_excluded(options.exclude)
    work = unfinished(out, split)
    begun = (work, shard_count, request, state)
    jobs = plan(format, str(input), read_split or split, options, *begun, replace=overwrite)
    classes = declared_classes(format, jobs[0].units[0], options)
    if beside and (overwrite or beside[0] not in manifest["splits"]):
        jobs = _with_twins(jobs, str(input), unfinished(out, beside[0]), beside[1])
    found = written(jobs, options, Hands(engine or Engine(), processes, progress))
    if engine and engine.share:
        waiting = sum(account is None for account in found)
        return dict(split=split, out=str(out), shards=len(jobs), waiting=waiting)
    return _finish(out, split, work, jobs, [one for one in found if one], request, classes)


def _refuse_unread(options: Options) -> None:
    """Raises ValueError for what an index without checks cannot know."""
    of_images = dict(
        dedup=options.dedup != "none",
        exclude=bool(options.exclude),
        min_side=options.min_side > 1,
        max_aspect=options.max_aspect > 0,
    )
    if options.unread and (flag := next((name for name, given in of_images.items() if given), "")):
        raise ValueError(f"--{flag}: it needs every image, and --nocheck reads none; leave out one")


def declared_classes(format: str, unit: Unit, options: Options) -> list[str]:
    """The class names that data or options give, in order; [] where the labels tell them."""
    return named_classes(tuple(registry.find(format).declared_classes(unit, options)))[0]


def check_place(input: str, out: str, split: str) -> None:
    """Raises ValueError for a folder that cannot be written to, or a split that names no file."""
    if not split or "/" in split or split.startswith("."):
        raise ValueError(f"--split={split}: files begin with its name; give one without '/'")
    if files.filesystem(files.real(input)) == files.filesystem(files.real(out)):
        raise ValueError(f"--out={out} is --input; give a folder of its own")
    if not out.isascii() and printable(out) != out:
        raise ValueError(f"--out={printable(out)}: the name of the folder is not UTF-8")


def _with_twins(jobs: list[Job], input: str, work: str, options: Options) -> list[Job]:
    """The jobs, each with that of its units for another split, in `work`, where it is not done and
    what is left out does not depend on other shards."""
    if options.dedup != "none" or options.exclude:
        return jobs
    path = files.join(work, "plan.json")
    groups = [[dataclasses.asdict(unit) for unit in job.units] for job in jobs]
    groups = json.loads(json.dumps(groups))  # as they are read again, without tuples
    request = import_request(jobs[0].format, input, options)
    if not files.exists(path):
        plan = json.loads(files.read(files.join(jobs[0].work, "plan.json"))) | {"request": request}
        storage.write_bytes(path, json.dumps(plan).encode())
    plan = json.loads(files.read(path))
    if plan["request"] != request or plan["groups"] != groups:
        return jobs  # the call for that split says what is wrong
    twins = [dataclasses.replace(job, options=options, work=work) for job in jobs]
    return [
        job if done else dataclasses.replace(job, twin=twin)
        for job, twin, done in zip(jobs, twins, of_each(finished, twins))
    ]


def plan(
    format: str,
    input: str,
    split: str,
    options: Options,
    work: str,
    shard_count: int,
    request: dict[str, Any],
    state: State = lambda units: "",
    *,
    anew: bool = False,
    replace: bool = False,
) -> list[Job]:
    """The shards to write; the same as before when an earlier run was cut short, unless `anew`.
    replace: one of other options or of files that have changed is removed, not refused."""
    path = files.join(work, "plan.json")
    groups: list[list[Unit]] | None = None
    if not anew and files.exists(path):
        try:
            groups = begun(input, work, request, state)
        except ValueError:
            if not replace:
                raise
            system, plain_work = files.filesystem(work)
            system.rm(plain_work, recursive=True)
    if groups is None:
        with activity.announce(f"looking through {input}"):
            with unreachable.required():
                units = registry.find(format).plan(input, split, options)
            if not units:
                raise ValueError(f"{input}: no rows in it, as --format={format} reads it")
            in_place.check(format, units, options)
            groups = _group(units, shard_count)
            saved: dict[str, Any] = {"request": request, "state": state(units)}
        saved["groups"] = [[dataclasses.asdict(unit) for unit in group] for group in groups]
        try:
            storage.write_bytes(path, json.dumps(saved).encode())
        except OSError as error:
            raise OSError(
                f"--out: {path} cannot be written ({error}); give another folder"
            ) from None
    root = in_place.root_of(input) if options.in_place else ""
    return [
        Job(number, tuple(group), format, options, work, root)
        for number, group in enumerate(groups)
    ]


def _group(units: Sequence[Unit], shard_count: int) -> list[list[Unit]]:
    """Units that follow one another, in groups of about equal size."""
    if not shard_count:
        rows = sum(unit.rows for unit in units)
        shard_count = -(-rows // _ROWS_PER_SHARD) if all(u.rows for u in units) else len(units)
    shard_count = max(1, min(shard_count, len(units)))
    edges = [len(units) * i // shard_count for i in range(shard_count + 1)]
    return [list(units[a:b]) for a, b in zip(edges, edges[1:])]


def _finish(
    out: str,
    split: str,
    work: str,
    jobs: list[Job],
    accounts: list[dict[str, Any]],
    request: dict[str, Any],
    classes: list[str],
) -> dict[str, Any]:
    """Gives the shards their names and writes the manifest; can itself be cut short and rerun."""
    read = sum(account["read"] for account in accounts)
    written = sum(account["count"] for account in accounts)
    listed = [entry for account in accounts for entry in account["quarantined"]]
    reasons = Counter(entry["reason"] for entry in listed)
    filtered: Counter[str] = Counter()
    for account in accounts:
        filtered.update(account["filtered"])
    if read != written + len(listed) + sum(filtered.values()):
        raise RuntimeError(f"{read} read, but {written} + {len(listed)} + {filtered} accounted for")
    if not written:
        _refuse_empty(work, split, request, read, listed, filtered)
    entries = _named(out, split, work, jobs, accounts)
    lines = "".join(json.dumps(e, ensure_ascii=False, sort_keys=True) + "\n" for e in listed)
    storage.write_bytes(files.join(out, f"{split}-quarantine.jsonl"), lines.encode())
    seen = {label for account in accounts for label in account["classes"]}
    drawn = metadata.with_drawn(drawn_before(jobs[0]), request["options"])
    manifest_entry = dict(
        count=written,
        with_text=sum(account["with_text"] for account in accounts),
        with_label=sum(account["with_label"] for account in accounts),
        read=read,
        quarantined=dict(reasons),
        filtered=dict(filtered),
        shards=entries,
        request=request,
        classes=classes or sorted(seen),
        drawn=dataclasses.asdict(drawn),
    )
    if state := json.loads(files.read(files.join(work, "plan.json"))).get("state"):
        manifest_entry["state"] = state
    if jobs[0].root:
        manifest_entry["root"] = in_place.relative_root(jobs[0].root, out)
    with metadata.changing(out) as manifest:
        manifest["class_names"] = classes or metadata.class_names(manifest, split, seen)
        manifest["splits"][split] = manifest_entry
    shard = re.compile(rf"{re.escape(split)}-\d{{5,}}-of-\d{{5,}}\.array_record")
    present = {entry["file"] for entry in entries}
    for name in files.listing(out):  # of the split that was there before
        if shard.fullmatch(name) and name not in present:
            storage.remove(files.join(out, name))
    system, plain_work = files.filesystem(work)
    system.rm(plain_work, recursive=True)
    for line in quarantine.of_split(out, split, manifest):
        print(line, file=sys.stderr)
    return _summary(out, split, manifest)


def _refuse_empty(
    work: str,
    split: str,
    request: dict[str, Any],
    read: int,
    listed: list[dict[str, str]],
    filtered: Mapping[str, int],
) -> NoReturn:
    """Raises EmptySide or NothingLeft: why none of `read` items is in the split."""
    system, plain_work = files.filesystem(work)
    system.rm(plain_work, recursive=True)  # nothing in it is worth going on with
    if set(filtered) & {"held_out", "not_held_out"} and not listed:
        raise EmptySide(request, read, split, filtered)
    raise NothingLeft(request, read, listed, filtered)


def _named(
    out: str, split: str, work: str, jobs: list[Job], accounts: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Moves the shards that hold something to their names; what the manifest says of each."""
    system, plain_out = files.filesystem(out)
    plain_work = files.filesystem(work)[1]
    nonempty = [(job, account) for job, account in zip(jobs, accounts) if account["count"]]
    names = {
        job.number: f"{split}-{number:05d}-of-{len(nonempty):05d}.array_record"
        for number, (job, _) in enumerate(nonempty)
    }

    def move(job: Job) -> None:
        part = f"{plain_work}/part-{job.number:05d}.array_record"
        if system.exists(part):
            system.mv(part, f"{plain_out}/{names[job.number]}")

    of_each(move, [job for job, _ in nonempty])  # a bucket copies each
    keys = ("count", "bytes", "sha256")
    return [
        {"file": names[job.number], **{key: account[key] for key in keys}}
        for job, account in nonempty
    ]


def _summary(out: str, split: str, manifest: dict[str, Any]) -> dict[str, Any]:
    found = manifest["splits"][split]
    return dict(
        split=split,
        read=found["read"],
        written=found["count"],
        quarantined=found["quarantined"],
        filtered=found["filtered"],
        with_text=found["with_text"],
        with_label=found["with_label"],
        shards=len(found["shards"]),
        bytes=sum(shard["bytes"] for shard in found["shards"]),
        classes=len(found.get("classes", manifest["class_names"] if found["with_label"] else ())),
        out=str(out),
    )
