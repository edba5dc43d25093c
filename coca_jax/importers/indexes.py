"""Indexes of data that are named where prepared data may be: as sources of a run, in its workdir;
to be evaluated on, in the cache folder."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import posixpath
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax import cache_folder
from coca_jax.config import Config, Entry
from coca_jax.data import files, formats, manifest, references
from coca_jax.importers import in_place, metadata, shards, splits
from coca_jax.importers.items import Options, Unit


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
    names = folder_names([sources[number].path for number in numbers])
    for number, name in zip(numbers, names):
        entry, out = sources[number], files.join(workdir, f"data/{name}")
        split = entry.split or "train"
        if main_process:
            if files.exists(files.join(out, manifest.FILE)):
                format, options = formats.guess(entry.path), _options(entry)
                now = state_of_input(format, entry.path, out, options, split)
                refuse_changed(entry.path, out, now)
            _make(entry, split, out)
        while split not in (manifest.read(out) or {"splits": {}})["splits"]:
            time.sleep(1)
        sources[number] = dataclasses.replace(entry, path=out, split=split, image_field="")
    if not numbers:
        return config
    return config.change({"data.sources": tuple(source.to_dict() for source in sources)})


def planned(path: str, workdir: str) -> str:
    """Where the index of some data will be in a workdir, but for a number behind a name."""
    return files.join(workdir, f"data/{folder_names([path])[0]}")


def folder_names(paths: Sequence[str]) -> list[str]:
    """A short name for each path: its last part, numbered where two share it."""
    names: list[str] = []
    for path in paths:
        last = re.split(r"[*{]", posixpath.basename(path.rstrip("/")))[0] or "data"
        name = last.partition(".")[0].removeprefix("tfds:") or "data"
        count = Counter(names)[name]
        names.append(f"{name}-{count + 1}" if count else name)
    return names


def cached(entry: Entry, split: str) -> str:
    """The folder of an index of a split, made now where the cache folder has none of these files.

    Raises ValueError or OSError for data that cannot be read in place, in one line.
    """
    format, options = formats.guess(entry.path), _options(entry)
    _check(entry, format)
    units = shards.importer(format).plan(entry.path, split, options)
    path = entry.path if files.is_remote(entry.path) else os.path.abspath(entry.path)
    mark = json.dumps([format, path, split, entry.image_field, _files(units)])
    folder = cache_folder.folder() / "indexes"
    folder.mkdir(mode=0o700, exist_ok=True)
    out = folder / hashlib.blake2b(mark.encode(), digest_size=16).hexdigest()
    with open(folder / f"{out.name}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may evaluate
        _make(entry, split, str(out))
    return str(out)


def splits_of(entry: Entry) -> list[str]:
    """The splits that data which are not prepared tell; [] for none."""
    return splits.splits_of(formats.guess(entry.path), entry.path)


def _options(entry: Entry) -> Options:
    return Options(image_field=entry.image_field, in_place=True)


def _files(units: list[Unit]) -> list[tuple[str, int, str, str]]:
    """Name, size, checksum (of a bucket; else '') and time of each file that units read."""
    found: list[tuple[str, int, str, str]] = []
    above = ""  # a folder below it is among its files
    for path in sorted({unit.path.rstrip("/") + "/" for unit in units}):
        if above and path.startswith(above):
            continue
        system, plain = files.filesystem(path.rstrip("/"))
        about = system.info(plain)
        if about["type"] == "directory":
            above = path
            inside = system.find(plain, detail=True)
            found += [_about(name, inside[name]) for name in sorted(inside) if _is_read(name)]
        else:
            found.append(_about(path.rstrip("/"), about))
    return found


def _about(path: str, info: Mapping[str, Any]) -> tuple[str, int, str, str]:
    checksum = str(info.get("ETag") or info.get("etag") or "")
    return path, int(info.get("size") or 0), checksum, "" if checksum else str(info.get("mtime"))


def _is_read(name: str) -> bool:
    """Whether a file in a folder of pictures is one of them, or a text of one."""
    return name.lower().endswith((*formats.MEDIA, *formats.SIDECARS))


def state(format: str, out: str, units: list[Unit]) -> str:
    """What tells whether the files of some units have changed since `out` was written, short enough
    to be kept there: a digest of what they are, and behind a '-' one that has their times too,
    which a copy on another machine changes. '' for those that are not files here or in a bucket, or
    where `out` lies in a folder of theirs, which it changes itself."""
    if format not in in_place.FORMATS or not all(references.is_place(u.path) for u in units):
        return ""
    above = tuple(f"{unit.path.rstrip('/')}/" for unit in units)
    if (out if files.is_remote(out) else os.path.abspath(out)).startswith(above):
        return ""
    found = _files(units)
    return f"{_digest([file[:3] for file in found])}-{_digest(found)}"


def _digest(told: Any) -> str:
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def state_of_input(
    format: str, input: str, out: str, options: Options, read_split: str = ""
) -> str:
    """`state` of an input, or of a split of it. Raises as `plan`."""
    if format not in in_place.FORMATS:  # of which some have no split ''
        return ""
    return state(format, out, shards.importer(format).plan(input, read_split, options))


def refuse_changed(input: str, out: str, now: str) -> None:
    """Raises ValueError where `out` holds an index or copy of an input of another state than `now`;
    of other times alone it says so. Those that were made before the state was kept pass."""
    for split in metadata.read_manifest(out)["splits"].values():
        before = split.get("state", now)
        if now and metadata.have_changed(before, now):
            raise ValueError(
                f"{input} has changed since its index was made in {out}; use a new --workdir, "
                f"restore it, or name {out} in its place to go on without the change"
            )
        if now and before != now:
            print(
                f"{input}: its files have other times than when its index was made in {out}, and "
                "the same names and sizes; if they were corrected, use a new --workdir",
                file=sys.stderr,
            )
            return


def _check(entry: Entry, format: str) -> None:
    if format not in in_place.FORMATS:
        raise ValueError(
            f"data source {entry.path}: --format={format} cannot be read in place; give what "
            "`coca-jax prepare` makes of it"
        )


def _make(entry: Entry, split: str, out: str) -> None:
    """Writes the index of a split, or what is left of it."""
    format = formats.guess(entry.path)
    _check(entry, format)
    options = _options(entry)
    line = f"{entry.path} is read in place, as {format}: making an index of it in {out}"
    if files.is_remote(out) and not files.is_remote(entry.path):
        options = dataclasses.replace(options, in_place=False)
        line = f"{entry.path} lies on this machine: importing it into {out}"
    if not files.exists(files.join(out, manifest.FILE)):
        print(line, file=sys.stderr, flush=True)
    keep = functools.partial(state, format, out)
    splits.prepare(format, entry.path, out, split=split, options=options, state=keep)
