"""Parquet tables with images: HF's image struct, raw bytes, or paths of image files."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coca_jax.data import files
from coca_jax.importers.imagefolder import load_image
from coca_jax.importers.items import (
    LABEL_FIELDS,
    TEXT_FIELDS,
    Item,
    Options,
    Unit,
    names,
    split_units,
    strings,
    take,
)

ROWS_PER_UNIT = 4096
IMAGE_FIELDS = ("image", "img", "jpg", "png", "bytes", "image_bytes", "filepath", "path")
PATTERNS = ("*.parquet",)  # of its files


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of parquet files: ranges of rows.

    Raises:
        FileNotFoundError: no parquet file.
        ValueError: one that cannot be read, or has no such column.
    """
    units = []
    for file in files.find(path, PATTERNS, split):
        with files.open_binary(file) as handle:
            try:
                table = pq.ParquetFile(handle)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file}: not a parquet file: {error}") from None
            columns = table.schema_arrow.names
            images = options.image_field.split(",")
            for field in (*images, options.text_field, options.label_field):
                if field and field not in columns:
                    raise ValueError(f"{file}: no column {field!r}; it has {columns}")
            if not options.image_field and not set(IMAGE_FIELDS) & set(columns):
                raise ValueError(f"{file}: which column holds images? --image_field of {columns}")
            units += split_units(file, table.metadata.num_rows, ROWS_PER_UNIT)
    return units


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the ClassLabel columns, from the schema metadata that HF datasets write."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata)["info"]["features"] if metadata else {}
    found = {}
    for column, feature in features.items():
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]  # a sequence of labels
        if isinstance(feature, list) and feature:
            feature = feature[0]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            if feature.get("names"):
                found[column] = list(feature["names"])
    return found


def declared_classes(unit: Unit, options: Options) -> list[str]:
    """The class names that the first file declares for the label column, in order."""
    with files.open_binary(unit.path) as handle:
        found = class_names(pq.ParquetFile(handle).schema_arrow)
    wanted = (options.label_field,) if options.label_field else LABEL_FIELDS
    return next((found[name] for name in wanted if name in found), list(options.class_names))


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of rows."""
    folder, base = posixpath.split(unit.path)
    with files.open_binary(unit.path) as handle:
        table = pq.ParquetFile(handle)
        classes = class_names(table.schema_arrow)
        for number, fields in _rows(table, unit.start, unit.stop):
            key = f"{base}#{number}"
            yield _item(key, folder, fields, options, classes)


def _rows(table: pq.ParquetFile, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if first < stop and first + rows > start:
            number = first
            for batch in table.iter_batches(256, row_groups=[group]):
                if number < stop and number + batch.num_rows > start:
                    for row, fields in enumerate(batch.to_pylist(), number):
                        if start <= row < stop:
                            yield row, fields
                number += batch.num_rows
        first += rows


def _item(
    key: str, folder: str, fields: dict, options: Options, classes: dict[str, list[str]]
) -> Item:
    first, _, second = options.image_field.partition(",")
    image, other = take(fields, first, IMAGE_FIELDS), take(fields, second, ())
    item = Item(key, texts=strings(take(fields, options.text_field, TEXT_FIELDS)))
    label_field = options.label_field or next((f for f in LABEL_FIELDS if f in fields), "")
    known = classes.get(label_field) or options.class_names
    try:
        item.labels = names(fields.pop(label_field, None), known)
    except ValueError as error:
        item.problem, item.detail = "bad_label", str(error)
        return item
    item.extra = {k: v for k, v in fields.items() if not isinstance(v, bytes)}
    _load(item, image, folder)
    if second and not item.problem:
        found = _load(Item(key), other, folder)
        item.second, item.problem, item.detail = found.image, found.problem, found.detail
    return item


def _load(item: Item, image: Any, folder: str) -> Item:
    """Puts an image into the item: HF's struct, bytes, or the path of a file."""
    if isinstance(image, dict):
        path = image.get("path")
        image = image.get("bytes") or (path and files.join(folder, path))
    if isinstance(image, bytes):
        item.image = image
    elif isinstance(image, str):
        load_image(item, files.join(folder, image))
    else:
        item.problem, item.detail = "missing_image", "the row has no image"
    return item
