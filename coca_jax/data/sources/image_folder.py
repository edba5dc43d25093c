"""HF imagefolder: images with a metadata.jsonl or metadata.csv, or one folder per class."""

from __future__ import annotations

import copy
import csv
import itertools
import posixpath
from collections.abc import Iterator
from typing import Any

from coca_jax.data.sources import files, formats, rows
from coca_jax.data.sources import rows as lines
from coca_jax.data.sources.fields import (
    LABEL_FIELDS,
    LISTED_TEXTS,
    is_field,
    names,
    only,
    strings,
    take,
    text_column,
)
from coca_jax.data.sources.formats import MEDIA, METADATA
from coca_jax.data.sources.items import (
    Item,
    Options,
    Unit,
    guarded,
    load_image,
    named_units,
    split_units,
)
from coca_jax.runtime import bounded_json

ROWS_PER_UNIT = 2048
BYTES_PER_UNIT = 64 << 20
_MOST_PASSES = 1024  # through a packed list, which each unit unpacks from the beginning


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of an imagefolder: ranges of its metadata, or of its list of images.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        ValueError: two files of metadata in one folder, or fields are named that there are not;
            or the folders are splits, and none or several of them are this one.
    """
    if not files.is_remote(path) and not files.exists(path):
        raise FileNotFoundError(f"{path}: no such folder")
    system, plain = files.filesystem(path)
    if system.isfile(plain):
        raise ValueError(f"{path} is one file; --format=imagefolder reads a folder of pictures")
    root = _folder_of(path, split)
    found = _metadata(root)
    units, below = [], formats.root_of(path)
    if not found:
        _refuse_fields(path, options)
    for metadata in found:
        rows.refuse_urls(metadata, rows.rows_of([metadata]), options)
        if metadata.lower().endswith((".jsonl", *lines.PACKED)):
            units += line_units(metadata, below)
        else:
            units += csv_units(metadata, below)
    if found:
        rows.check(root, rows.rows_of(found), options)
        return units
    plain = files.filesystem(root)[1]
    found = _images(root)
    if files.is_remote(root):  # a local name may have '::', which stands for another thing in URLs
        found = [files.filesystem(path)[1] for path in found]
    start = plain.rstrip("/") + "/"
    listed = [
        p[len(start) :] if p.startswith(start) else posixpath.relpath(p, plain) for p in found
    ]
    return named_units(root, listed, ROWS_PER_UNIT, below)


def _refuse_fields(path: str, options: Options) -> None:
    """Raises ValueError where options name fields of pictures that have only their folders."""
    fields = ("text_field", "label_field", "image_field")
    named = next((field for field in fields if getattr(options, field)), "")
    if not named:
        return
    tables = [name for name in formats.tables(path) if not name.endswith(".json")]
    fix = "there is no table beside the pictures; add metadata.csv with the columns file_name, text"
    if tables:
        kind = "jsonl" if tables[0].lower().endswith(".jsonl") else "csv"
        fix = f"to read its table give --format={kind} --input={files.join(path, tables[0])}"
    raise ValueError(
        f"--{named}={getattr(options, named)}: {path} is read by its folder names, without fields; "
        + fix
    )


def splits(path: str) -> list[str]:
    """The splits of an imagefolder that has a folder for each, else []: 'train', 'test' and
    'validation', 'valid', 'val' or 'dev', as it says."""
    return sorted(_split_folders(path))


def _folder_of(path: str, split: str) -> str:
    """The folder with the images of a split; the whole for '', and where no folder is a split.

    Raises ValueError where folders are splits, and none or several of them are this one.
    """
    folders = _split_folders(path) if split else {}
    wanted = files.SPLITS.get(split.lower())
    names = [split] if split in folders else [n for n in folders if files.SPLITS[n] == wanted]
    same = sorted(folder for name in names for folder in folders[name])
    if len(same) == 1:
        return same[0]
    inner = files.join(path, split)
    if split and not wanted and files.exists(inner):
        return inner
    if folders:
        both = " and ".join(map(posixpath.basename, same))
        why = f"both {both}" if same else f"none of {', '.join(sorted(folders))}"
        fix = "" if len(names) == 1 else "--split one of them, or "  # which one name does not tell
        raise ValueError(
            f"{path}: the split {split!r} is {why}, which are its folders; give {fix}the folder to "
            "read as --input"
        )
    return path


def _split_folders(path: str, *, wrapped: bool = False) -> dict[str, list[str]]:
    """Split -> its folders, by their names in any case; {} where there are none. Of several, as
    "train" beside "Training", it is not known which is meant.

    A folder is no split where other folders of images stand beside it: then it is a class, such as
    "train" among vehicles. Metadata that stands above the folders alone names the images of them
    all and leaves them one split. The folders may lie in a single one that holds everything.

    wrapped: `path` is such a folder, and not the input.
    """
    system, plain = files.filesystem(path)
    if not system.isdir(plain):
        return {}
    entries = {posixpath.basename(e["name"].rstrip("/")): e for e in system.ls(plain, detail=True)}
    names = sorted(n for n in entries if not files.is_hidden(n))
    inside = [name for name in names if entries[name]["type"] == "directory"]
    found = [name for name in inside if name.lower() in files.SPLITS]
    rest = (n for n in inside if n not in found and _has_media(files.join(path, n)))
    others = list(itertools.islice(rest, 2))
    above = bool({*METADATA} & {*names})
    if not found and not wrapped and not above and len(others) == 1:
        alone = not any(name.lower().endswith(MEDIA) for name in names)
        return _split_folders(files.join(path, others[0]), wrapped=True) if alone else {}
    folders = {name: files.join(path, name) for name in found}
    if others or (above and not any(map(_metadata, folders.values()))):
        return {}
    told: dict[str, list[str]] = {}
    for name, folder in folders.items():
        told.setdefault(_own_name(name), []).append(folder)
    return told


def _own_name(folder: str) -> str:
    """What a folder calls its split, validation by any of its names."""
    name = folder.lower()
    return name if name in files.VALIDATION else files.SPLITS[name]


def _has_media(folder: str) -> bool:
    return any(name.lower().endswith(MEDIA) for names in files.walk(folder) for name in names)


def _metadata(root: str) -> list[str]:
    """The metadata files of a folder, at its top or below."""
    patterns = tuple(pattern for name in METADATA for pattern in (name, f"*/{name}"))
    try:
        found = files.find(root, patterns)
    except FileNotFoundError:
        return []
    found.sort(key=lambda one: METADATA.index(posixpath.basename(one).lower()))
    first: dict[str, str] = {}
    for one in found:
        folder = posixpath.dirname(one)
        if first.setdefault(folder, one) != one:
            both = f"{posixpath.basename(first[folder])} and {posixpath.basename(one)}"
            raise ValueError(
                f"{folder} has both {both}, which would give each picture twice; remove one, or "
                f"give the one to read, --input={one}"
            )
    return found


def _images(root: str) -> list[str]:
    return files.find(root, formats.PATTERNS["imagefolder"])


def line_units(path: str, root: str) -> list[Unit]:
    """Byte ranges of a file of lines; of a packed one ranges of its lines."""
    if path.lower().endswith(lines.PACKED):
        count = _count(path)
        return split_units(path, count, max(ROWS_PER_UNIT, -(-count // _MOST_PASSES)), root)
    units, start, first, position, rows = [], 0, 0, 0, 0
    with files.open_binary(path) as file:
        lines.refuse_utf16(path, file)
        for number, (line, size) in enumerate(lines.lines(file), 1):
            position += size
            rows += line is None or bool(line.strip())
            if rows == ROWS_PER_UNIT or position - start >= BYTES_PER_UNIT:
                units.append(Unit(path, start, position, rows, root, line=first))
                start, first, rows = position, number, 0
    if rows:
        units.append(Unit(path, start, position, rows, root, line=first))
    return units


def csv_units(path: str, root: str) -> list[Unit]:
    """Ranges of the rows of a table, each with the byte at which they begin."""
    units, start, offset, stop, behind = [], 0, 0, 0, 0
    for stop, (_, behind) in enumerate(lines.csv_places(path), 1):
        if stop - start >= ROWS_PER_UNIT and behind >= 0:
            units.append(Unit(path, start, stop, stop - start, root, offset=offset))
            start, offset = stop, behind
    if stop > start:
        units.append(Unit(path, start, stop, stop - start, root, offset=offset))
    return units


def csv_located(unit: Unit, options: Options) -> Iterator[Located]:
    """The items of a range of a table's rows without their images."""
    first = unit.start if unit.offset else 0
    rows = enumerate(lines.csv_places(unit.path, unit.offset), first)
    for number, (fields, _) in itertools.islice(rows, unit.start - first, unit.stop - first):
        yield row(unit, number, fields, options)


def _count(path: str) -> int:
    """The lines of a packed file, with one for the damage that ends it."""
    count = 0
    try:
        for _ in lines.packed_lines(path):
            count += 1
    except (OSError, ValueError):
        count += 1
    return count


class Located:
    """An item without its image, and the name of its image's file, relative to a folder; of a pair
    that of the other image as well."""

    def __init__(self, item: Item, folder: str = "", name: Any = "", second: Any = ""):
        self.item, self.folder, self.name, self.second = item, folder, name, second

    def load(self, unit: Unit, options: Options) -> Item:
        """The item with its image or images, unless it has a problem already."""
        item = copy.copy(self.item)
        if not item.problem:
            load_image(item, self.folder, self.name, unit, options)
        if self.second and not item.problem:
            other = load_image(Item(item.key), self.folder, self.second, unit, options)
            item.second, item.problem, item.detail = other.image, other.problem, other.detail
            item.second_span = other.span
        return item


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a unit, in the order of the metadata."""
    for found in located(unit, options):
        yield found.load(unit, options)


def located(unit: Unit, options: Options) -> Iterator[Located]:
    """The items of a unit without their images."""
    kind = unit.path.lower()
    if kind.endswith((".jsonl", *lines.PACKED)):
        yield from line_located(unit, options)
    elif kind.endswith(".csv"):
        yield from csv_located(unit, options)
    else:
        folder = files.absolute(unit.path)
        for name in unit.names:
            item, label = Item(name), posixpath.dirname(name).replace("_", " ").replace("/", ", ")
            try:
                item.labels = names(label, options.class_names)
            except ValueError as error:
                item.problem, item.detail = "bad_label", str(error)
            yield Located(item, unit.path, files.join(folder, name))


def line_located(unit: Unit, options: Options) -> Iterator[Located]:
    """The items of a range of lines, packed or not, without their images."""
    packed = unit.path.lower().endswith(lines.PACKED)
    yield from _packed_rows(unit, options) if packed else _json_rows(unit, options)


def _json_rows(unit: Unit, options: Options) -> Iterator[Located]:
    base, position = posixpath.basename(unit.path), unit.start
    with files.open_binary(unit.path) as file:
        file.seek(unit.start)
        for number, (line, size) in enumerate(lines.lines(file), unit.line + 1):
            position += size
            where = f"{base} line {number}"
            if line is None:
                detail = f"a line of more than {lines.MAX_ROW_BYTES} bytes"
                yield Located(Item(where, problem="bad_json", detail=detail))
            elif line.strip():
                yield _json_row(unit, where, line, options)
            if position >= unit.stop:
                return


def _packed_rows(unit: Unit, options: Options) -> Iterator[Located]:
    base, number = posixpath.basename(unit.path), -1
    try:
        for number, (line, _) in enumerate(lines.packed_lines(unit.path)):
            where = f"{base} line {number + 1}"
            if number >= unit.stop:
                return
            if number >= unit.start and line is None:
                detail = f"a line of more than {lines.MAX_ROW_BYTES} bytes"
                yield Located(Item(where, problem="bad_json", detail=detail))
            elif number >= unit.start and line is not None and line.strip():
                yield _json_row(unit, where, line, options)
    except (OSError, ValueError) as error:
        if unit.start <= number + 1 < unit.stop:  # else it is another unit's
            detail = f"{type(error).__name__}: {error}"
            where = f"{base} line {number + 2}"
            yield Located(Item(where, problem="damaged_archive", detail=detail))


def _json_row(unit: Unit, where: str, line: bytes, options: Options) -> Located:
    try:
        fields = bounded_json.parse(line)
    except ValueError as error:
        reason = "bad_utf8" if isinstance(error, UnicodeDecodeError) else "bad_json"
        detail = str(error) if reason == "bad_utf8" else lines.no_object(line, error)
        return Located(Item(where, problem=reason, detail=detail))
    return _located(where, posixpath.dirname(unit.path), fields, options)


def row(
    unit: Unit,
    number: int,
    fields: dict[str, Any] | csv.Error,
    options: Options,
    folder: str = "",
) -> Located:
    """One row of a list: its item, and the name of its image in a folder, by default the list's."""
    where = f"{posixpath.basename(unit.path)} row {number + 1}"
    if isinstance(fields, csv.Error):
        return Located(Item(where, problem="bad_record", detail=str(fields)))
    return _located(where, folder or posixpath.dirname(unit.path), fields, options)


def _located(where: str, folder: str, fields: dict[str, Any], options: Options) -> Located:
    first, _, other = options.image_field.partition(",")
    usual = (column for column in formats.IMAGE_COLUMNS if column in fields)
    column = first or formats.image_field(fields) or next(usual, "")
    is_there = is_field(fields, column)
    name = only(take(fields, column, ()))
    if not isinstance(name, str) or not name:
        there = ", ".join(sorted(map(str, fields)))
        detail = f"no column of an image file; give --image_field=NAME, one of {there}"
        if is_there and name in (None, ""):
            detail = f"its {column!r} is empty"
        elif isinstance(name, list):
            detail = f"its {column!r} has {len(name)} images, and an example has one"
        return Located(Item(where, problem="missing_image", detail=detail))
    second = fields.pop(other, None) if other else ""
    if other and (not isinstance(second, str) or not second):
        detail = f"the row names no {other!r}"
        return Located(Item(where, problem="missing_image", detail=detail))

    text = text_column(fields, options.text_field, LISTED_TEXTS)

    def make() -> Item:
        item = Item(name, texts=strings(take(fields, text, ())))
        if second:  # the same two images may stand beside several texts
            item.key = f"{name}+{second}#{item.texts[0] if item.texts else ''}"
        try:
            labels = take(fields, options.label_field, LABEL_FIELDS)
            item.labels = names(labels, options.class_names)
        except ValueError as error:
            item.problem, item.detail = "bad_label", str(error)
            return item
        item.extra = fields
        return item

    return Located(guarded(name, make), folder, name, second)
