"""HF imagefolder: images with a metadata.jsonl or metadata.csv, or one folder per class."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator

from coca_jax.data import files
from coca_jax.data.formats import IMAGE_COLUMNS, MEDIA, METADATA
from coca_jax.importers.items import (
    LABEL_FIELDS,
    TEXT_FIELDS,
    Item,
    Options,
    Unit,
    names,
    strings,
    take,
)

ROWS_PER_UNIT = 2048


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of an imagefolder: ranges of its metadata, or of its list of images.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
    """
    if not files.is_remote(path) and not files.exists(path):
        raise FileNotFoundError(f"--input={path}: no such folder")
    root, inner = path, files.join(path, split)
    if split in splits(path) or (split not in files.SPLITS and files.exists(inner)):
        root = inner
    found = _metadata(root)
    units = []
    for metadata in found:
        if metadata.endswith(".jsonl"):
            units += _line_units(metadata)
        else:
            rows = sum(1 for _ in _csv_rows(metadata))
            units += [
                Unit(metadata, start, min(start + ROWS_PER_UNIT, rows), min(ROWS_PER_UNIT, rows))
                for start in range(0, rows, ROWS_PER_UNIT)
            ]
    if found:
        return units
    listed = _images(root)
    return [
        Unit(root, start, start + ROWS_PER_UNIT, min(ROWS_PER_UNIT, len(listed) - start))
        for start in range(0, len(listed), ROWS_PER_UNIT)
    ]


def splits(path: str) -> list[str]:
    """The splits of an imagefolder that has a folder for each, under their own names, else [].

    A folder is a split by its name, unless other folders of images stand beside it: then it is a
    class, such as "train" among vehicles. Metadata that stands above the folders alone names the
    images of them all and leaves them one split.
    """
    system, plain = files.filesystem(path)
    if not system.isdir(plain):
        return []
    inside = (
        entry["name"] for entry in system.ls(plain, detail=True) if entry["type"] == "directory"
    )
    names = sorted(posixpath.basename(name.rstrip("/")) for name in inside)
    found = [name for name in names if name in files.SPLITS]
    rest = [name for name in names if name not in files.SPLITS and not name.startswith(".")]
    if not found or any(_has_media(files.join(path, name)) for name in rest):
        return []
    if any(files.exists(files.join(path, name)) for name in METADATA):
        return found if any(_metadata(files.join(path, name)) for name in found) else []
    return found


def _has_media(folder: str) -> bool:
    system, plain = files.filesystem(folder)
    return any(name.lower().endswith(MEDIA) for _, _, names in system.walk(plain) for name in names)


def _metadata(root: str) -> list[str]:
    """The metadata files of a folder, at its top or below."""
    found = []
    for name in METADATA:
        try:
            found += files.find(root, (name, f"*/{name}"))
        except FileNotFoundError:
            continue
    return found


def _images(root: str) -> list[str]:
    return files.find(root, tuple(f"*{s}" for s in MEDIA) + tuple(f"*{s.upper()}" for s in MEDIA))


def _line_units(path: str) -> list[Unit]:
    """Byte ranges of a file of lines."""
    units, start, position, rows = [], 0, 0, 0
    with files.open_binary(path) as file:
        for line in file:
            position += len(line)
            rows += bool(line.strip())
            if rows == ROWS_PER_UNIT:
                units.append(Unit(path, start, position, rows))
                start, rows = position, 0
    if rows:
        units.append(Unit(path, start, position, rows))
    return units


def _csv_rows(path: str) -> Iterator[dict]:
    text = files.read(path).decode("utf-8", "replace")
    return csv.DictReader(io.StringIO(text, newline=""))  # type: ignore[return-value]


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a unit, in the order of the metadata."""
    for item, path in located(unit, options):
        yield item if item.problem else load_image(item, path)


def located(unit: Unit, options: Options) -> Iterator[tuple[Item, str]]:
    """The items of a unit without their images, each with the path of its image."""
    if unit.path.endswith(".jsonl"):
        with files.open_binary(unit.path) as file:
            file.seek(unit.start)
            lines = file.read(unit.stop - unit.start).split(b"\n")
        folder = posixpath.dirname(unit.path)
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode())
                if not isinstance(fields, dict):
                    raise ValueError("not a JSON object")
            except ValueError as error:  # UnicodeDecodeError is one as well
                bad = isinstance(error, UnicodeDecodeError)
                where = f"{posixpath.basename(unit.path)}@{unit.start}+{number}"
                yield Item(where, problem="bad_utf8" if bad else "bad_json", detail=str(error)), ""
                continue
            yield _located(folder, fields, options)
    elif unit.path.endswith(".csv"):
        folder = posixpath.dirname(unit.path)
        for number, fields in enumerate(_csv_rows(unit.path)):
            if unit.start <= number < unit.stop:
                yield _located(folder, dict(fields), options)
    else:
        plain = files.filesystem(unit.path)[1]
        for path in _images(unit.path)[unit.start : unit.stop]:
            name = posixpath.relpath(files.filesystem(path)[1], plain)
            label = posixpath.dirname(name).replace("_", " ").replace("/", ", ")
            yield Item(name, labels=strings(label)), path


def from_fields(folder: str, fields: dict, options: Options) -> Item:
    """An item of one row: a file name, and a text or label."""
    item, path = _located(folder, fields, options)
    second = options.image_field.partition(",")[2]
    if second and not item.problem:
        other = fields.pop(second, None)
        if not isinstance(other, str) or not other:
            item.problem, item.detail = "missing_image", f"the row names no {second!r}"
            return item
        found = load_image(Item(other), files.join(folder, other))
        item.second, item.problem, item.detail = found.image, found.problem, found.detail
        item.key = f"{item.key}+{other}#{item.texts[0] if item.texts else ''}"
    return item if item.problem else load_image(item, path)


def _located(folder: str, fields: dict, options: Options) -> tuple[Item, str]:
    first = options.image_field.partition(",")[0]
    name = take(fields, first, IMAGE_COLUMNS)
    if not isinstance(name, str) or not name:
        return Item(str(name), problem="missing_image", detail="the row names no image file"), ""
    path = files.join(folder, name)
    item = Item(name, texts=strings(take(fields, options.text_field, TEXT_FIELDS)))
    try:
        labels = take(fields, options.label_field, LABEL_FIELDS)
        item.labels = names(labels, options.class_names)
    except ValueError as error:
        item.problem, item.detail = "bad_label", str(error)
        return item, path
    item.extra = fields
    return item, path


def load_image(item: Item, path: str) -> Item:
    """Reads the item's image file into it."""
    try:
        item.image = files.read(path)
    except OSError as error:
        item.problem, item.detail = "missing_image", str(error)
    return item
