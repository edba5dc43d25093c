"""An index in place of a copy: what may be read where it lies, and the references to it.

An index is made as a copy is, by the same reading, checks and quarantine, so that it holds the
records that a copy would hold; only the bytes of the images stay where they are.
"""

from __future__ import annotations

import os
import posixpath

from coca_jax.data import files, named_files, references
from coca_jax.data.records import Record
from coca_jax.files import local_files
from coca_jax.importers import tar_members
from coca_jax.importers.items import Item, Options, Unit

FORMATS = (
    *("webdataset", "imagefolder", "sidecars", "csv", "jsonl", "json", "parquet", "tfrecord"),
)


def obstacle(format: str, units: list[Unit], options: Options) -> str:
    """Why data cannot be read in place; '' where they can be, as far as that is seen at once."""
    if format == "prepared":
        return "the data are prepared already, and taken as they are"
    if format not in FORMATS:
        return f"--format={format} cannot be read in place"
    if units and not references.is_place(units[0].path):
        return f"{units[0].path} is neither a local file nor in a bucket, to be read in place"
    if options.max_side:
        return f"--max_side={options.max_side} encodes images again, which lie nowhere then"
    if format != "webdataset" or not units:
        return ""
    named = [unit.path for unit in units if not unit.path.lower().endswith(".tar")]
    if named:
        return f"{named[0]} is compressed and cannot be read in place"
    with files.open_binary(units[0].path) as file:
        packed = tar_members.is_packed(file.read(6))
    return f"{units[0].path} is compressed and cannot be read in place" if packed else ""


def check(format: str, units: list[Unit], options: Options) -> None:
    """Raises ValueError where the options ask for an index and data cannot be read in place."""
    if options.in_place and (why := obstacle(format, units, options)):
        raise ValueError(f"{why}; `coca-jax prepare` without --in_place makes a copy")


def root_of(input: str) -> str:
    """The folder or URL below which an index names files: absolute where it is here."""
    found = named_files.root_of(input)
    return found if files.is_remote(found) else os.path.realpath(local_files.plain(found))


def told_root(root: str, out: str) -> str:
    """The root as the manifest in `out` says it: relative to `out` where that lies in the data's
    folder, so that both may move together."""
    if files.is_remote(root) or files.is_remote(out):
        start = root.rstrip("/") + "/"
        if not out.startswith(start):
            return root
        return posixpath.join(*[".."] * len(out[len(start) :].strip("/").split("/")))
    inside = os.path.realpath(out).startswith(root.rstrip(os.sep) + os.sep)
    return os.path.relpath(root, os.path.realpath(out)) if inside else root


def referring(record: Record, item: Item, root: str) -> Record | None:
    """The record with references in the place of its images; None where one lies nowhere by
    itself, as in a compressed archive."""
    if item.span is None or (record.second and item.second_span is None):
        return None
    image = references.dump(item.span, record.image, root)
    if not record.second or item.second_span is None:
        return record._replace(image=image)
    second = references.dump(item.second_span, record.second, root)
    return record._replace(image=image, second=second)
