"""Indexes of data that are named where prepared data may be: as sources of a run, in its workdir;
to be evaluated on, in the cache folder."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from coca_jax import cache_folder
from coca_jax.config import Config, Entry
from coca_jax.data import files, formats, manifest
from coca_jax.importers import in_place, own_data, shards, splits
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
    names = own_data.folder_names([sources[number].path for number in numbers])
    for number, name in zip(numbers, names):
        entry, out = sources[number], files.join(workdir, f"data/{name}")
        split = entry.split or "train"
        if main_process:
            _make(entry, split, out)
        while split not in (manifest.read(out) or {"splits": {}})["splits"]:
            time.sleep(1)
        sources[number] = dataclasses.replace(entry, path=out, split=split, image_field="")
    if not numbers:
        return config
    return config.change({"data.sources": tuple(source.to_dict() for source in sources)})


def cached(entry: Entry, split: str) -> str:
    """The folder of an index of a split, made now where the cache folder has none of these files.

    Raises ValueError or OSError for data that cannot be read in place, in one line.
    """
    format, options = formats.guess(entry.path), _options(entry)
    _check(entry, format)
    units = shards.importer(format).plan(entry.path, split, options)
    path = entry.path if files.is_remote(entry.path) else os.path.abspath(entry.path)
    mark = json.dumps([format, path, split, entry.image_field, _state(units)])
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


def _state(units: list[Unit]) -> list[tuple[str, int, str]]:
    """What tells whether files have changed since: names, sizes and times. Of a folder, whose own
    time tells nothing of a text that was edited in it, a checksum of those of all that is in it."""
    found: list[tuple[str, int, str]] = []
    above = ""  # a folder below it is in its checksum
    for path in sorted({unit.path.rstrip("/") + "/" for unit in units}):
        if above and path.startswith(above):
            continue
        system, plain = files.filesystem(path.rstrip("/"))
        about = system.info(plain)
        if about["type"] == "directory":
            above = path
            inside = system.find(plain, detail=True)
            told = [_about(name, inside[name]) for name in sorted(inside) if _is_read(name)]
            digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()
            found.append((path, len(told), digest))
        else:
            found.append(_about(path.rstrip("/"), about))
    return found


def _about(path: str, info: Mapping[str, Any]) -> tuple[str, int, str]:
    """Name, size and time of a file."""
    when = next((info[key] for key in ("ETag", "etag", "mtime") if info.get(key)), "")
    return path, int(info.get("size") or 0), str(when)


def _is_read(name: str) -> bool:
    """Whether a file in a folder of pictures is one of them, or a text of one."""
    return name.lower().endswith((*formats.MEDIA, *formats.SIDECARS))


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
    splits.prepare(format, entry.path, out, split=split, options=options)
