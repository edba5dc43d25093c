"""Indexes of data that are named where prepared data may be: as sources of a run, in its workdir;
to be evaluated on, in the cache folder."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from coca_jax.config import Config, Entry
from coca_jax.data import holdout, prepare
from coca_jax.data.sources import files, formats, manifest, references, registry
from coca_jax.data.sources.items import Options, Unit, whole_files
from coca_jax.runtime import activity, cache_folder, storage
from coca_jax.runtime.storage import write_bytes

_ASKED_AT_ONCE = 16  # files: a network's disk takes half a millisecond to answer for each


def is_needed(entry: Entry) -> bool:
    """Whether an entry names data that are there and not prepared."""
    if not entry.path or files.exists(files.join(entry.path, manifest.FILE)):
        return False
    return files.is_pattern(entry.path) or files.exists(entry.path)


def of_sources(config: Config, workdir: str, *, main_process: bool = True) -> Config:
    """The config whose sources that are not prepared are indexes of them in workdir/data/NAME,
    made now by the main process; the others wait for it. Of local data a run in a bucket has a
    copy.

    Raises ValueError or OSError for data that cannot be read in place, in one line.
    """
    sources = list(config.data.sources)
    numbers = [number for number, entry in enumerate(sources) if is_needed(entry)]
    needed = [sources[number] for number in numbers]
    outs = places(workdir, [reading(entry) for entry in needed])
    for number, out in zip(numbers, outs):
        entry = sources[number]
        split = entry.split or "train"
        if main_process:
            format, input, options = _before(entry, split, out) or _of_split(entry, split)
            if files.exists(files.join(out, manifest.FILE)):
                refuse_changed(input, out, state_of_input(format, input, out, options, split))
            _make(format, input, split, out, options)
            check_losses(input, out)
        wait_for(out, split)
        sources[number] = dataclasses.replace(of_index(entry, out, split), split=split)
    if not numbers:
        return config
    return config.change({"data.sources": tuple(source.to_dict() for source in sources)})


def wait_for(out: str, split: str) -> None:
    """Returns once the main process has written a split of data into `out`. Raises ValueError where
    it has not within a day: a copy of data that cannot be read in place takes hours."""

    def look() -> Any:
        return manifest.read_manifest(out)["splits"].get(split)

    activity.until(f"process 0 to write the split {split!r} of {out}", look, hours=24)


def reading(entry: Entry) -> tuple[str, ...]:
    """What decides what is read of data which are not prepared: path, split and fields."""
    return entry.path, entry.split or "train", *_fields(entry).values()


def places(workdir: str, read: Sequence[tuple[str, ...]]) -> list[str]:
    """The folder of the index of each path, below workdir/data. What is read equally, by all that
    stands behind the path too, shares one."""
    first: dict[tuple[str, ...], str] = {}
    names = folder_names([path for path, *_ in read])
    return [
        first.setdefault((files.absolute(path), *how), files.join(workdir, f"data/{name}"))
        for (path, *how), name in zip(read, names)
    ]


def planned(path: str, workdir: str) -> str:
    """Where the index of some data will be in a workdir, but for a number behind a name."""
    return files.join(workdir, f"data/{folder_names([path])[0]}")


def folder_names(paths: Sequence[str]) -> list[str]:
    """A short name for each path: its last part, numbered where several share it."""
    names: dict[str, None] = {}
    for path in paths:
        last = re.split(r"[*{]", posixpath.basename(path.rstrip("/")))[0] or "data"
        if of_hub := re.search(r"/[^/]+___([^/]+)/", path):  # OWNER___NAME/..., the hub's cache
            last = of_hub[1]
        name = last.partition(".")[0].removeprefix("tfds:") or "data"
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names[next(one for one in itertools.chain([name], numbered) if one not in names)] = None
    return list(names)


def cached(entry: Entry, split: str) -> str:
    """The folder of an index of a split, made now where the cache folder has none of these files.

    Raises ValueError or OSError for data that cannot be read in place, in one line.
    """
    format, path, options = _of_split(entry, split)
    options = dataclasses.replace(options, check=True)  # once, and not in each evaluation
    out = _cache_file(path, split, options)
    with open(out.with_suffix(".lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may evaluate
        _make(format, path, split, str(out), options)
    return str(out)


def _cache_file(path: str, split: str, options: Options, *, images: bool = True) -> pathlib.Path:
    """The place in the cache folder of what is told of a split, as these options read it: another
    one where they or the files are others, images=False: those that rows name left out."""
    format = formats.guess(path)
    _check(path, format)
    with activity.announce(f"looking through {path}"):
        units = registry.find(format).plan(path, split, options)
    asked = dataclasses.asdict(options)
    del asked["yields_to"]  # which no index does
    mark = [format, path, split, asked, _files(_paths(units))]
    if named := images and _state_of_named(format, units, options):
        mark.append(named)
    folder = cache_folder.folder() / "indexes"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / _digest(mark)


def find_splits(entry: Entry) -> tuple[list[str], holdout.SplitField | None]:
    """`holdout.of_data` of data which are not prepared, gone through once for the same files:
    of tars that reads the pictures too. A field for which `where` has values tells none.

    Raises as `holdout.of_data`, and as `cached`."""
    path, options = files.absolute(entry.path), _options(entry)
    names = prepare.splits_of(formats.guess(path), path)
    if names or holdout.FIELD in entry.where:
        return names, None
    cache = str(_cache_file(path, "", options, images=False)) + ".split.json"
    if not files.exists(cache):
        found = holdout.find_splits(formats.guess(path), path, options)
        write_bytes(cache, json.dumps(found and dataclasses.asdict(found)).encode())
    found = holdout.read(json.loads(files.read(cache)))
    return (list(found.values) if found else []), found


def _of_split(entry: Entry, split: str) -> tuple[str, str, Options]:
    """The format of data which are not prepared, and what is read for a split of them, and how.
    Raises ValueError for one that they do not tell, where they tell some."""
    path, options = files.absolute(entry.path), _options(entry)
    narrowed = holdout.narrowed(entry.path, find_splits(entry)[1], split, options)
    return formats.guess(path), path, narrowed


def _before(entry: Entry, split: str, out: str) -> tuple[str, str, Options] | None:
    """What was read, and how, for the index of a split of these data that is in `out`; None where
    there is none. A run goes on with it, however the path was written."""
    there = manifest.request(out, split)
    if not there or files.absolute(there["input"]) != files.absolute(entry.path):
        return None
    where = tuple((field, tuple(values)) for field, values in there["options"].get("where", ()))
    made_by = {key: there["options"].get(key, "") for key in (*_fields(entry), "check")}
    options = dataclasses.replace(_options(entry), where=where, **made_by)
    return there["format"], there["input"], options


def of_index(entry: Entry, out: str, split: str) -> Entry:
    """The entry that reads the index of its data in `out`, whose texts and labels are those of its
    fields already, but for fields that the index was not made by. Raises ValueError where that was
    made by another field of the images, of which its records have one alone, or by a field of texts
    or labels where the entry names none: the usual ones are not in its records."""
    made_by = manifest.request(out, split).get("options", {})
    for key in _fields(entry) if made_by else ():
        had, asked = made_by.get(key, ""), getattr(entry, key)
        if had != asked and (key == "image_field" or not asked):
            raise ValueError(
                f"data source {entry.path}: its index in {out} is of {key}={had!r}, not {asked!r}; "
                "use a new --workdir, or remove that index"
            )
    taken = (key for key in _fields(entry) if made_by.get(key, "") == getattr(entry, key))
    changes: dict[str, Any] = dict.fromkeys(taken, "")
    return dataclasses.replace(entry, path=out, **changes)


def _fields(entry: Entry) -> dict[str, Any]:
    """The fields by which an index of an entry's data is made; not those that `where` has values
    of, which stay what they are in its records."""
    names = dict(text_field=entry.text_field, label_field=entry.label_field)
    chosen = {key: "" if name in dict(entry.where) else name for key, name in names.items()}
    return chosen | dict(image_field=entry.image_field)


def _options(entry: Entry) -> Options:
    return Options(in_place=True, check=False, **_fields(entry))


def _is_read(name: str) -> bool:
    """Whether a file in a folder of pictures is one of them, or a text of one."""
    return name.lower().endswith((*formats.MEDIA, *formats.SIDECARS))


def _paths(units: list[Unit]) -> Iterable[str]:
    return (unit.path for unit in units)


def _files(
    paths: Iterable[str], wanted: Callable[[str], bool] = _is_read
) -> list[tuple[str, int, str, str]]:
    """Name, size, checksum (of a bucket; else '') and time of each of the files, and of those in
    the folders that are wanted by their names."""
    found: list[tuple[str, int, str, str]] = []
    above = ""  # a folder below it is among its files
    for path in sorted({path.rstrip("/") + "/" for path in paths}):
        if above and path.startswith(above):
            continue
        system, plain = files.filesystem(path.rstrip("/"))
        if not files.is_remote(path) and os.path.isdir(plain):
            above = path
            found += _below(plain, wanted)
            continue
        about = system.info(plain)
        if about["type"] == "directory":
            above = path
            inside = system.find(plain, detail=True)
            found += [_about(name, inside[name]) for name in sorted(inside) if wanted(name)]
        else:
            found.append(_about(path.rstrip("/"), about))
    return found


def _below(folder: str, wanted: Callable[[str], bool]) -> list[tuple[str, int, str, str]]:
    """`_files` of a local folder. One with a million files takes seconds, and not minutes."""
    found, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif wanted(entry.path):
                    about = _stat(entry)
                    found.append((entry.path, about.st_size, "", str(about.st_mtime)))
    return sorted(found)


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    """Of what a link leads to, where that is there."""
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)


def _about(path: str, info: Mapping[str, Any]) -> tuple[str, int, str, str]:
    checksum = str(info.get("ETag") or info.get("etag") or "")
    return path, int(info.get("size") or 0), checksum, "" if checksum else str(info.get("mtime"))


def state(format: str, out: str, options: Options, units: list[Unit]) -> str:
    """What tells whether the files of some units have changed since `out` was written, short enough
    to be kept there: a digest of what they are, and behind a '-' one that has their times too,
    which a copy on another machine changes; the same two of the images that rows of lists name. ''
    for those that are not files here or in a bucket, or where `out` lies in a folder of theirs,
    which it changes itself."""
    if not registry.formats()[format].in_place or not all(
        references.is_place(u.path) for u in units
    ):
        return ""
    above = tuple(f"{unit.path.rstrip('/')}/" for unit in units)
    if files.absolute(out).startswith(above):
        return ""
    found = _files(_paths(units))
    own = f"{_digest([file[:3] for file in found])}-{_digest(found)}"
    if options.unread:  # a file that a row names is compared when it is read
        return own
    named = _state_of_named(format, units, options)
    return f"{own}-{named}" if named else own


def _state_of_named(format: str, units: list[Unit], options: Options) -> str:
    """The digests of `state` of the local images that rows of lists name; '' where there are none.
    To ask for each of those in a bucket would take as long as to read them."""
    module, count = registry.find(format), 0
    what, when = (hashlib.blake2b(digest_size=16) for _ in range(2))
    here = [unit for unit in whole_files(units) if not files.is_remote(unit.path)]
    lists = [unit for unit in here if not os.path.isdir(files.absolute(unit.path))]
    with concurrent.futures.ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        for unit in lists if module.located else ():
            roots = (unit.root or posixpath.dirname(unit.path), *options.allow_paths)
            named = (
                (one.folder, name)
                for one in module.located(unit, options)
                for name in filter(None, (one.name, one.second))
                if not files.is_remote(files.join(one.folder, name))
            )
            # Many a thread at a time: to hand over one costs more than a local disk's answer.
            while block := list(itertools.islice(named, _ASKED_AT_ONCE * 512)):
                parts = [block[at : at + 512] for at in range(0, len(block), 512)]
                asked = pool.map(lambda part, roots=roots: _stamps(part, roots), parts)
                for (_, name), (size, time_ns) in zip(block, itertools.chain(*asked)):
                    what.update(f"{name!r} {size}\n".encode())
                    when.update(f"{name!r} {size} {time_ns}\n".encode())
                count += len(block)
    return f"{what.hexdigest()}-{when.hexdigest()}" if count else ""


def _stamps(named: Sequence[tuple[str, str]], roots: Sequence[str]) -> list[tuple[int, int]]:
    """`_stamp` of each (folder, name)."""
    return [_stamp(folder, name, roots) for folder, name in named]


def _stamp(folder: str, name: str, roots: Sequence[str]) -> tuple[int, int]:
    """The size and time of a file that a row names; (-1, 0) where none is there."""
    try:
        found = storage.stamp(files.join(folder, name))
        found = found or storage.stamp(formats.resolve(folder, name, roots))
    except (OSError, ValueError):
        found = None
    return found or (-1, 0)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def state_of_input(
    format: str, input: str, out: str, options: Options, read_split: str = ""
) -> str:
    """`state` of an input, or of a split of it. Raises as `plan`."""
    if not registry.formats()[format].in_place:  # of which some have no split ''
        return ""
    with activity.announce(f"looking through {input}"):
        units = registry.find(format).plan(input, read_split, options)
        return state(format, out, options, units)


def refuse_changed(input: str, out: str, now: str, go_on: str = "") -> None:
    """Raises ValueError where `out` holds an index or copy of an input of another state than `now`;
    of other times alone it says so.

    go_on: what goes on without the change, where it is not to name `out` as the data."""
    go_on = go_on or f"name {out} in its place"
    for split in manifest.read_manifest(out)["splits"].values():
        before = split.get("state", now)
        if now and manifest.have_changed(before, now):
            raise ValueError(
                f"{input} has changed since its index was made in {out}; use a new --workdir, "
                f"restore it, or {go_on} to go on without the change"
            )
        if now and manifest.have_changed(before, now, times=True):
            print(
                f"{input}: its files have other times than when its index was made in {out}, and "
                "the same names and sizes; if they were corrected, use a new --workdir",
                file=sys.stderr,
            )
            return


def _check(path: str, format: str) -> None:
    if not registry.formats()[format].in_place:
        raise ValueError(
            f"data source {path}: --format={format} cannot be read in place; give what "
            "`coca-jax prepare` makes of it"
        )


def check_losses(input: str, out: str) -> None:
    """Raises ValueError where more than half of the rows of the data in `out` could not be used.
    Then `out` is removed, so that the command can be repeated with better data."""
    there = manifest.read_manifest(out)["splits"]
    lists = [files.join(out, f"{name}-quarantine.jsonl") for name in there]
    lines = b"".join(files.read(one) for one in lists if files.exists(one)).splitlines()
    usable = sum(split["count"] for split in there.values())
    if len(lines) > usable:
        storage.remove(out)
        raise too_many_lost(input, out, [json.loads(line) for line in lines], usable)


def too_many_lost(
    input: str, out: str, lost: Sequence[Mapping[str, str]], usable: int
) -> ValueError:
    """The error of data that have lost more rows than are usable, which lists them next to `out`.

    lost: {key, reason, detail} of each.
    """
    listed = f"{out}-quarantine.jsonl"
    write_bytes(listed, "".join(f"{json.dumps(one, sort_keys=True)}\n" for one in lost).encode())
    reasons = Counter(one["reason"] for one in lost)
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    allow = ""
    if "outside_input" in reasons:
        allow = ", or let fit and prepare read them with --allow_paths=FOLDER"
    return ValueError(
        f"{input}: {len(lost):,} of {len(lost) + usable:,} rows cannot be used ({counts}), more than "
        f"half. They are listed in {listed}. Correct them or remove them from the data{allow}."
    )


def _make(format: str, path: str, split: str, out: str, options: Options) -> None:
    """Writes the index of a split, or what is left of it."""
    _check(path, format)
    line = f"{path} is read in place, as {format}: making an index of it in {out}"
    if files.is_remote(out) and not files.is_remote(path):
        options = dataclasses.replace(options, in_place=False)
        line = f"{path} lies on this machine: importing it into {out}"
    if not files.exists(files.join(out, manifest.FILE)):
        print(line, file=sys.stderr, flush=True)
    keep = functools.partial(state, format, out, options)
    prepare.prepare(format, path, out, split=split, options=options, state=keep)
