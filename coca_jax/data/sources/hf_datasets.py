"""Datasets of Hugging Face's `datasets`: its Arrow files, read in place.

`resolve` turns hf://OWNER/NAME[/CONFIG][:SPLIT] into the folder of Arrow files that `datasets` (the
extra of that name) builds in its cache; what `save_to_disk` wrote has the same files. Images are
read from those files by their byte range, so a row is as cheap to read as one of a tar. Only
`resolve` needs the package; the rest is pyarrow.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epy

from coca_jax.data.sources import files, parquet
from coca_jax.data.sources.items import Item, Options, Unit, guarded, split_units
from coca_jax.data.sources.references import UNKNOWN, Span
from coca_jax.data.sources.registry import Format

with epy.lazy_imports():
    import pyarrow as pa

ROWS_PER_UNIT = 4096
PATTERNS = ("*.arrow",)
# NAME-SPLIT.arrow or NAME-SPLIT-00000-of-00002.arrow in the cache, SPLIT/data-00000-of-00001.arrow
# of save_to_disk.
_IN_CACHE = re.compile(r".+-([\w.]+?)(?:-\d{5}-of-\d{5})?\.arrow")
_SHARDS = "*-{}-?????-of-?????.arrow"
_SAVED = re.compile(r"data-\d{5}-of-\d{5}\.arrow")
_URL = re.compile(r"hf://(?!datasets/)([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.-]+))?")


def resolve(path: str) -> str:
    """The folder of the Arrow files of hf://OWNER/NAME[/CONFIG][:SPLIT], or a glob of those of a
    named split. The first call downloads.

    Raises:
        ValueError: `datasets` cannot load such a dataset, or it has no such split.
    """
    found = _URL.fullmatch(path)
    if not found:
        raise ValueError(f"{path}: write hf://OWNER/NAME[/CONFIG][:SPLIT]")
    name, config, split = found.groups()
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config)
        builder.download_and_prepare()
    except Exception as error:  # it has types of its own, and the hub's
        why = " ".join(str(error).split())[:400]
        raise ValueError(f"{path}: `datasets` cannot load it: {why}") from error
    folder = str(builder.cache_dir)
    if split is None:
        return folder
    if split not in (splits(folder) or [split]):
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(splits(folder))}")
    alone = f"*-{split}.arrow"  # and not *-{split}*: 'train_sft' is another split than 'train'
    return f"{folder}/{alone if glob.glob(alone, root_dir=folder) else _SHARDS.format(split)}"


def _split_of(file: str) -> str:
    """The split that a file's name tells, '' for none."""
    folder, name = posixpath.split(file)
    if _SAVED.fullmatch(name):
        saved = folder.removesuffix("/")
        several = os.path.exists(posixpath.join(posixpath.dirname(saved), "dataset_dict.json"))
        return posixpath.basename(saved) if several else ""
    found = _IN_CACHE.fullmatch(name)
    return found[1] if found else ""


def _files(path: str) -> list[str]:
    if files.is_remote(path):
        raise ValueError(
            f"{path}: Arrow files are read from a local disk; copy them, or give hf://"
        )
    found = files.find(path, PATTERNS)
    # What `map` and `filter` of datasets left beside them are other rows.
    return [f for f in found if not posixpath.basename(f).startswith(("cache-", "tmp"))]


def splits(path: str) -> list[str]:
    """The splits that the names of the files tell, sorted; [] where they tell none."""
    return sorted({_split_of(file) for file in _files(path)} - {""})


class _Table:
    """An Arrow file, mapped into memory. Raises pa.ArrowInvalid for a damaged one."""

    def __init__(self, path: str):
        with pa.memory_map(path) as source:
            self.whole = source.read_buffer()
        self.is_file = self.whole.size > 6 and self.whole[:6].to_pybytes() == b"ARROW1"
        self.schema = self._open().schema
        self.classes = parquet.class_names(self.schema)

    def _open(self) -> Any:
        return pa.ipc.open_file(self.whole) if self.is_file else pa.ipc.open_stream(self.whole)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All batches, without a copy."""
        reader = self._open()
        if self.is_file:
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader

    def image_column(self, options: Options) -> str:
        """The column that holds the images: the one asked for, one of the usual names, or the only
        one of the type Image; '' for none."""
        names = self.schema.names
        wanted = options.image_field.partition(",")[0]
        if wanted or (usual := [name for name in parquet.IMAGE_FIELDS if name in names]):
            return wanted or usual[0]
        try:
            schema_info = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
            features = dict(schema_info["info"]["features"])
        except (ValueError, KeyError, TypeError):  # none, or damaged, which `class_names` reports
            return ""
        images = [
            name
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "Image"
        ]
        return images[0] if len(images) == 1 else ""

    def span(self, path: str, column: pa.Array, row: int) -> Span | None:
        """Where the bytes of an image lie in the file; None where they do not lie there as they
        are: an image that is a path, or a compressed file."""
        if pa.types.is_struct(column.type):
            if column.type.get_field_index("bytes") < 0 or not column[row].is_valid:
                return None
            column = column.field("bytes")
        large = pa.types.is_large_binary(column.type)
        if not (large or pa.types.is_binary(column.type)) or not column[row].is_valid:
            return None
        _, offsets, values = column.buffers()
        ends = np.frombuffer(offsets, np.int64 if large else np.int32)
        start, stop = ends[column.offset + row : column.offset + row + 2].tolist()
        place = values.address + start - self.whole.address
        if not 0 <= place <= self.whole.size - (stop - start):
            return None
        return Span(path, self.whole.size, place, stop - start)


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of Arrow files: ranges of rows.

    Raises:
        FileNotFoundError: no Arrow file.
        ValueError: a damaged one, or no such column.
    """
    units = []
    every = _files(path)
    split_of = {file: _split_of(file) for file in every}
    in_folder = os.path.isdir(path)  # a file or glob, as of hf://...:SPLIT, is what was asked for
    for file in every:
        if in_folder and split and any(split_of.values()) and split_of[file] != split:
            continue
        try:
            table = _Table(file)
            rows = sum(batch.num_rows for batch in table.batches())
            columns = table.schema.names
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file}: not an Arrow file: {error}") from None
        for field in (*options.image_field.split(","), options.text_field, options.label_field):
            if field and field not in columns:
                raise ValueError(f"{file}: no column {field!r}; it has {columns}")
        if not table.image_column(options):
            raise ValueError(f"{file}: which column holds images? --image_field of {columns}")
        units += split_units(file, rows, ROWS_PER_UNIT, _root_of(file))
    if not units and split:
        raise FileNotFoundError(f"{path}: no split {split!r}; it has {', '.join(splits(path))}")
    return units


def _root_of(file: str) -> str:
    """The folder below which rows may name image files: of files in the cache of `datasets` the
    whole cache, where its downloads lie."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")
    inside = os.path.realpath(file).startswith(os.path.realpath(cache) + os.sep)
    return os.path.realpath(cache) if inside else posixpath.dirname(file)


def declared_classes(unit: Unit, options: Options) -> list[str]:
    """The names of a ClassLabel column, in order."""
    found = _Table(unit.path).classes
    wanted = (options.label_field,) if options.label_field else parquet.LABEL_FIELDS
    return next((found[name] for name in wanted if name in found), list(options.class_names))


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of rows."""
    base = posixpath.basename(unit.path)
    table = _Table(unit.path)
    name = table.image_column(options)
    images = name if options.image_field else ""
    if not images and name not in parquet.IMAGE_FIELDS:
        options = dataclasses.replace(options, image_field=name)
    pairs = "," in options.image_field
    first = 0

    def item(key: str, batch: pa.RecordBatch, row: int) -> Item:
        one, span = batch.slice(row, 1), None
        if options.in_place:
            span = table.span(unit.path, batch.column(name), row)
        if options.unread and span and not pairs:
            fields = parquet.fields(one.drop_columns([name]))
            found = parquet.described(key, fields, options, table.classes)
            found.span = span._replace(crc=UNKNOWN)
            return found
        found = parquet.row_item(key, one, unit, options, table.classes)
        if found.image and not found.span:
            found.span = span
        if found.second and not found.second_span and options.in_place:
            other = batch.column(options.image_field.partition(",")[2])
            found.second_span = table.span(unit.path, other, row)
        return found

    batches = table.batches()
    while first < unit.stop:
        try:
            if (batch := next(batches, None)) is None:
                return
            if first + batch.num_rows > unit.start:
                # Offsets that lead out of a buffer would end the process, not raise.
                batch.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            where = f"{base}#{max(first, unit.start)}"
            yield Item(where, problem="damaged_archive", detail=f"{type(error).__name__}: {error}")
            return
        for row in range(max(unit.start - first, 0), min(batch.num_rows, unit.stop - first)):
            key = f"{base}#{first + row}"
            yield guarded(key, lambda: item(key, batch, row))  # noqa: B023
        first += batch.num_rows


FORMATS = (
    Format(
        *("arrow", plan, read, PATTERNS, 3),
        package=("pyarrow", "parquet"),
        splits=splits,
        declared_classes=declared_classes,
    ),
)
