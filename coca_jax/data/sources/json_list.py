"""Lists of image files with their texts as one JSON value: an array of objects as lines of JSON
are, COCO's captions, or Karpathy's lists."""

from __future__ import annotations

import contextlib
import csv
import functools
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from coca_jax.data.sources import files, formats, image_folder, rows
from coca_jax.data.sources.fields import only
from coca_jax.data.sources.items import Item, Options, Unit, split_units
from coca_jax.runtime import bounded_json

PATTERNS = formats.PATTERNS["json"]
_MAX_BYTES = 1 << 30  # of a list, which is read as a whole
_LOOK_AT = 20  # rows, of which one names a picture that is there
_KINDS = (
    'an array of objects as lines of .jsonl have them, COCO\'s captions {"images": [{id, '
    'file_name}], "annotations": [{image_id, caption}]}, or Karpathy\'s {"images": [{filename, '
    "sentences}]}"
)
_Row: TypeAlias = dict[str, Any] | csv.Error


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of the lists: ranges of rows.

    Raises:
        FileNotFoundError: no such file, or a folder without a list of captions for `split`.
        ValueError: a file that is no such list, or no row has a field that is named.
    """
    units, root = [], formats.root_of(path)
    lists = list(_lists(path, split))
    rows.check(path, (row for file in lists for row in _objects(file)), options)
    for file in lists:
        rows.refuse_urls(file, _objects(file), options)
        units += split_units(file, len(_parsed(file)), image_folder.ROWS_PER_UNIT, root)
    return units


def splits(path: str) -> list[str]:
    """The splits that the names of a folder's lists tell, [] where they tell none."""
    if not _is_folder(path):
        return files.splits_told(path, PATTERNS)
    return sorted({_split_of(file) for file in formats.caption_lists(path)} - {""})


def _lists(path: str, split: str) -> list[str]:
    """The lists of an input for a split."""
    if not _is_folder(path):
        return files.find(path, PATTERNS, split)
    found = formats.caption_lists(path)
    if split and any(map(_split_of, found)):
        wanted = files.SPLITS.get(split.lower(), split)
        found = [file for file in found if _split_of(file) == wanted]
    if not found:
        of_split = f" for split {split!r}" if split else ""
        raise FileNotFoundError(
            f"{path}: no JSON list of captions{of_split} in it or next to it. Give the list: "
            f"{path}/NAME.json."
        )
    return found


def _is_folder(path: str) -> bool:
    system, plain = files.filesystem(path)
    return not files.is_pattern(path) and system.isdir(plain)


def _split_of(file: str) -> str:
    """The split that a list's name tells, as captions_train2017.json does; '' for none."""
    words = re.findall("[a-z]+", posixpath.basename(file).lower())
    return next((files.SPLITS[word] for word in words if word in files.SPLITS), "")


def _objects(file: str) -> list[dict[str, Any]]:
    return [row for row in _parsed(file) if isinstance(row, dict)]


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of rows."""
    for found in located(unit, options):
        yield found.load(unit, options)


def located(unit: Unit, options: Options) -> Iterator[image_folder.Located]:
    """The items of a range of rows without their images."""
    mark = files.mark(unit.path)
    rows, folder = _rows(unit.path, mark), _folder(unit.path, unit.root, mark)
    for number in range(unit.start, min(unit.stop, len(rows))):
        fields = rows[number]
        own = fields if isinstance(fields, csv.Error) else dict(fields)  # of which some are taken
        yield image_folder.row(unit, number, own, options, folder)
    if unit.stop >= len(rows):
        _rows.cache_clear()  # it is large, and a run that reads it here has no use for it


@functools.lru_cache(maxsize=1)
def _rows(path: str, mark: str) -> Sequence[_Row]:
    """`_parsed`, kept for the next range of rows."""
    return _parsed(path)


def _parsed(path: str) -> Sequence[_Row]:
    """The rows of a list; errors in the place of those that are none. Raises ValueError where the
    file is no list."""
    try:
        found = bounded_json.loads(files.read_bounded(path, _MAX_BYTES).decode("utf-8-sig"))
    except files.TooLarge as error:
        raise ValueError(f"{error}; write an object a line, as .jsonl") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON in UTF-8 ({error}); lines of JSON are called .jsonl, or read by "
            "`coca-jax prepare --format=jsonl`"
        ) from None
    if isinstance(found, list):
        return [_object(one) for one in found]
    listed = found.get("images") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        there = f"an object of {', '.join(sorted(found)[:8])}" if isinstance(found, dict) else found
        raise ValueError(f"{path} holds {str(there)[:200]}; give {_KINDS}")
    images = [_with_file_name(_object(one)) for one in listed]
    annotations = found.get("annotations")
    return _with_captions(path, images, annotations) if annotations else images


def _object(value: Any) -> _Row:
    if isinstance(value, dict):
        return value
    return csv.Error(f"not a JSON object, but a {type(value).__name__}")


def _with_file_name(image: _Row) -> _Row:
    """An image of Karpathy's lists, which has its folder and name apart, under COCO's name."""
    if isinstance(image, csv.Error) or not isinstance(image.get("filename"), str):
        return image
    rest = {k: v for k, v in image.items() if k not in ("filename", "filepath")}
    folder = image.get("filepath")
    name = posixpath.join(folder if isinstance(folder, str) else "", image["filename"])
    return {"file_name": name} | rest


def _with_captions(path: str, images: Sequence[_Row], annotations: Any) -> list[_Row]:
    """COCO's images, each with the captions that name its id. Raises ValueError where none is."""
    captions: dict[str, list[Any]] = {}
    bad: list[_Row] = []
    for number, one in enumerate(annotations if isinstance(annotations, list) else ()):
        if isinstance(one, dict) and one.get("caption"):
            captions.setdefault(str(one.get("image_id")), []).append(one["caption"])
        else:
            bad.append(csv.Error(f"annotation {number} is no object with a caption"))
    if not captions:
        raise ValueError(f"{path}: none of its annotations has a caption; give captions_*.json")
    for image in images:
        if isinstance(image, dict):
            image |= {"caption": captions.pop(str(image.get("id")), [])}
    lost = [csv.Error(f"no image has the id {name}, which captions name") for name in captions]
    return [*images, *bad, *lost]


@functools.lru_cache(maxsize=1)
def _folder(path: str, root: str, mark: str) -> str:
    """The folder from which a list names its pictures: its own, that of its split as COCO has it
    (train2017 of captions_train2017.json), or else the root."""
    told = posixpath.splitext(posixpath.basename(path))[0].rpartition("_")[2]
    rows = [dict(row) for row in _rows(path, mark)[:_LOOK_AT] if not isinstance(row, csv.Error)]
    names = [only(row[formats.image_field(row)]) for row in rows if formats.image_field(row)]
    named = [name for name in names if isinstance(name, str)]
    within = [name for name in named if not posixpath.isabs(name) and "://" not in name]
    for folder in (posixpath.dirname(path) or ".", files.join(root, told)):
        with contextlib.suppress(ValueError):  # a name that cannot be a path
            if any(files.exists(files.join(folder, name)) for name in within):
                return folder
    return root
