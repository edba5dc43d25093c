"""TFRecord files of tf.train.Examples with encoded images, as img2dataset writes them."""

from __future__ import annotations

import contextlib
import posixpath
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from coca_jax.data.sources import files, formats, records
from coca_jax.data.sources.fields import LABEL_FIELDS, TEXT_FIELDS, names, strings, take
from coca_jax.data.sources.items import Item, Options, Unit, guarded
from coca_jax.data.sources.references import Span

IMAGE_FIELDS = ("jpg", "png", "webp", "image", "image/encoded", "image_raw")
_TEXTS = (*TEXT_FIELDS, "image/caption")
_LABELS = (*LABEL_FIELDS, "image/class/text", "image/class/label")
_MAX_RECORD = 1 << 31  # a length above this is damage, not a record
PATTERNS = formats.PATTERNS["tfrecord"]
_MAX_FIELDS = 16 << 20  # bytes of a record besides its image


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units: the files.

    Raises:
        FileNotFoundError: no .tfrecord file.
    """
    return [Unit(file) for file in files.find(path, PATTERNS, split)]


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a file, in its order. A file that is cut short ends with one problem item."""
    base = posixpath.basename(unit.path)
    number = 0
    with files.open_binary(unit.path) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        while head := file.read(12):
            key = f"{base}#{number}"
            size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else _MAX_RECORD
            large = options.max_image_bytes + _MAX_FIELDS < size < _MAX_RECORD
            if large:
                file.seek(size, 1)
            data = file.read(size) if size < _MAX_RECORD and not large else b""
            start, short = file.tell() - len(data), len(data) < size and not large
            if size >= _MAX_RECORD or short or len(file.read(4)) < 4:
                yield Item(key, problem="damaged_archive", detail="cut short")
                return
            if large:
                yield Item(key, problem="image_too_big", detail=f"a record of {size} bytes")
            else:
                item = guarded(key, lambda: _item(key, data, options))  # noqa: B023
                item.span = _span(unit.path, file_bytes, start, data, item.image)
                yield item
            number += 1


def _span(path: str, file_bytes: int, start: int, data: bytes, image: bytes) -> Span:
    """Where the image of a record that begins at `start` lies."""
    return Span(path, file_bytes, start + data.find(image), len(image))


def _item(key: str, data: bytes, options: Options) -> Item:
    item = Item(key)
    try:
        fields: dict[str, Any] = records.parse_example(data)
    except ValueError as error:
        item.problem, item.detail = "bad_record", str(error)
        return item
    image = take(fields, options.image_field, IMAGE_FIELDS)
    if not image or not isinstance(image[0], bytes):
        item.problem, item.detail = "missing_image", f"fields {sorted(fields)}"
        return item
    item.image = image[0]
    try:
        item.texts = strings(_decoded(take(fields, options.text_field, _TEXTS)))
        labels = _decoded(take(fields, options.label_field, _LABELS))
        item.labels = names(labels, options.class_names)
    except UnicodeDecodeError as error:
        item.problem, item.detail = "bad_utf8", str(error)
    except ValueError as error:
        item.problem, item.detail = "bad_label", str(error)
    for name, values in fields.items():
        with contextlib.suppress(UnicodeDecodeError):  # a mask, say, and no text
            found = _decoded(values)
            item.extra[name] = found[0] if len(found) == 1 else found
    return item


def _decoded(values: Sequence[Any] | None) -> list[Any]:
    """Texts of a feature's bytes, its numbers as they are. Raises UnicodeDecodeError."""
    return [v.decode() if isinstance(v, bytes) else v for v in values or ()]
