"""The files of an input, written down when a work begins, which is made of what was there then."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import posixpath
from collections.abc import Iterable
from typing import Any

from coca_jax.data import files
from coca_jax.files import local_files, sealed_json
from coca_jax.importers import shards, sidecars, split_field, splits
from coca_jax.importers.items import Options, Unit
from coca_jax.recaptioning.request import Request

_FILE = "recaption/input.json"
_ASKED_AT_ONCE = 16  # files: a network's disk takes half a millisecond to answer for each


def refuse_inside(request: Request) -> None:
    """Raises ValueError for an output in its own input, of which the next run would read it."""
    places = [local_files.whole_path(one) for one in (request.out, request.input)]
    out, input = (one if "://" in one else os.path.realpath(one) for one in places)
    if out == input or out.startswith(posixpath.join(input, "")):
        raise ValueError(
            f"--out={request.out} lies in --input={request.input}: the next run would read what "
            "this one writes; give a folder beside it"
        )


def of_split(request: Request) -> tuple[str, Options]:
    """What is read: the split that names of files or folders tell ('': all of them), and the
    options, which select the rows of a split that a field tells.

    Raises:
        FileNotFoundError, ValueError: nothing to read; the input tells other splits than 'train'
            and none is asked for, or it does not tell the one that is.
    """
    input, split = request.input, request.split
    names, by_field = split_field.of_data(request.format, input, request.options)
    of_what = f"{', '.join(names)} by the field 'split'" if by_field else ", ".join(names)
    if not split and names not in ([], ["train"]):
        raise ValueError(
            f"--input={input} tells the splits {of_what}; give --split=NAME, the one to caption"
        )
    if by_field:
        return "", split_field.narrowed(input, by_field, split, request.options)
    if split and split_field.split_of(split) not in map(split_field.split_of, names):
        told = f"the splits {of_what}; give one of them" if names else "no splits; drop --split"
        raise ValueError(f"--split={split}: --input={input} tells {told}")
    splits.tell_of_no_split(shards.importer(request.format), input, {})
    return split or "".join(names), request.options


def kept_split(request: Request) -> tuple[str, Options]:
    """What `of_split` gave when the work began; all of the input where an older version did so."""
    path = files.join(request.out, _FILE)
    before = sealed_json.read(path) if files.exists(path) else {}
    where = tuple((field, tuple(values)) for field, values in before.get("where", ()))
    options = dataclasses.replace(request.options, where=where or request.options.where)
    return before.get("split", ""), options


def write(request: Request, units: Iterable[Unit], split: str, options: Options) -> None:
    """Writes down the files of the units of a plan, and what `of_split` gave."""
    told = dict(files=_told(request.format, units), split=split, where=options.where)
    sealed_json.write(files.join(request.out, _FILE), told)


def check(request: Request, done: bool) -> None:
    """Compares an input with what it was; a work of older versions does not know.

    done: the work is, and its input may be gone.

    Raises:
        FileNotFoundError: the input is not there.
        ValueError: it has other files than when the work began, or files of another size.
    """
    path = files.join(request.out, _FILE)
    if not files.exists(path):
        return
    before = sealed_json.read(path)["files"]
    try:
        units = shards.importer(request.format).plan(request.input, *kept_split(request))
    except FileNotFoundError:
        if not done:
            raise
        return
    now = json.loads(json.dumps(_told(request.format, units)))
    found = []
    for names, more, one in (
        (now.keys() - before.keys(), "more ", ("file", "files")),
        (before.keys() - now.keys(), "fewer ", ("file", "files")),
        ({n for n in before.keys() & now.keys() if not _same(before[n], now[n])}, "", ("",)),
    ):
        if names:
            first = posixpath.basename(min(names).rstrip("/")) + (", ..." if len(names) > 1 else "")
            kind = f"{more}{one[len(names) > 1]}" if more else "changed"
            found.append(f"{len(names)} {kind} ({first})")
    if found:
        raise ValueError(
            f"--input={request.input} has {' and '.join(found)} since --out={request.out} was "
            "begun; give another --out"
        )


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two entries of `_told` are of the same file; those of older versions tell nothing of
    what lies in a folder."""
    told = [before["read"], now["read"]]
    least = min((len(one) for some in told for one in some), default=0)
    first, second = ([one[:least] for one in some] for some in told)
    return before["size"] == now["size"] and first == second


def _told(format: str, units: Iterable[Unit]) -> dict[str, Any]:
    """{file: its size in bytes and what is read of it}. Of a folder of pictures, which has no size,
    also a digest of what is read: of names, and here of sizes; a bucket would be asked once a
    file."""
    found: dict[str, Any] = {}
    for unit in units:
        stamp = None if os.path.isdir(unit.path) else local_files.stamp(unit.path)
        told = found.setdefault(unit.path, dict(size=stamp and stamp[0], read=[]))
        inside = [_digest(format, unit)] if unit.names else []
        told["read"].append([unit.start, unit.stop, unit.rows, *inside])
    return found


def _digest(format: str, unit: Unit) -> str:
    """Of the names of a unit of a folder; of a local one with the texts beside them, and sizes."""
    told = hashlib.blake2b(digest_size=16)
    here = not files.is_remote(unit.path)
    names = sidecars.with_texts(unit) if here and format == "sidecars" else unit.names
    names = list(names)
    stamps = (
        _stamps([files.join(unit.path, name) for name in names]) if here else [None] * len(names)
    )
    for name, stamp in zip(names, stamps):
        told.update(f"{name!r} {stamp and stamp[0]}\n".encode())
    return told.hexdigest()


def _stamps(paths: list[str]) -> list[tuple[int, int] | None]:
    """`local_files.stamp` of each; all files of an input are asked for at every start of a work."""
    size = -(-len(paths) // _ASKED_AT_ONCE) or 1
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    with concurrent.futures.ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        found = pool.map(lambda part: [local_files.stamp(path) for path in part], parts)
        return [stamp for part in found for stamp in part]
