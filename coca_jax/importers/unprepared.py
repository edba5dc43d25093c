"""Data as it lies there, for evaluation: imagefolders, and TFDS sets in any file format.

Training wants random access and reads prepared data (data/sources.py); evaluation goes through a
split once, in order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from coca_jax.data import files, mixture, prepared, sources, tfds_source, views
from coca_jax.data.random_access import Indices, Source
from coca_jax.data.records import Record
from coca_jax.importers import imagefolder, items, tfds_name
from coca_jax.importers.items import Item, Options, Unit

_ROWS_PER_UNIT = 1024  # of TFDS examples held at a time


def open_source(entry: Mapping[str, Any], split: str) -> Source:
    """Opens an entry as `data.sources.open_source` does, and what is not prepared besides.

    path may be an imagefolder (metadata.jsonl or .csv, or one folder a class; a subfolder of the
    split's name is taken where there is one), and tfds any set that the user has.

    Raises:
        ValueError, FileNotFoundError: what is wrong with it, in one line.
    """
    split = entry.get("split") or split
    if entry.get("tfds"):
        return views.narrow(_tfds(entry, split), entry)
    if _is_plain_folder(entry):
        return views.narrow(_folder(entry, split), entry)
    return sources.open_source(entry, split)


def class_names(entry: Mapping[str, Any], split: str) -> list[str]:
    """The class names of a data set: those it declares, else those that its records have."""
    split = entry.get("split") or split
    if entry.get("tfds"):
        units = tfds_name.plan(_tfds_path(entry), split, _options(entry))
        declared = tfds_name.declared_classes(units[0], _options(entry))
        if declared:
            return declared
    elif not _is_plain_folder(entry):
        return mixture.class_names(entry, split)
    found = open_source(entry, split)
    return sorted({label for record in found for label in record.labels})


def splits(entry: Mapping[str, Any]) -> list[str]:
    """The splits of a data set; [] for a plain folder without folders of such names."""
    if entry.get("tfds"):
        return tfds_name.splits(_tfds_path(entry))
    if _is_plain_folder(entry):
        return imagefolder.splits(str(entry["path"]))
    return sorted(prepared.read_manifest(str(entry["path"]))["splits"])


def choose_split(entry: Mapping[str, Any]) -> str:
    """The split to evaluate on where nobody names one: 'test', else validation, else the only one.

    Raises ValueError where the data have several and none of these.
    """
    found = splits(entry)
    usual = [split for split in ("test", *files.VALIDATION) if split in found]
    if not found or usual:
        return usual[0] if usual else "test"
    if len(found) > 1:
        where = entry.get("path") or entry.get("tfds")
        raise ValueError(f"data {where}: give --split, one of {', '.join(found)}")
    return found[0]


def counts(entry: Mapping[str, Any]) -> dict[str, int]:
    """{'caption': examples that have one, 'label': examples that have one} of `entry`'s split; {}
    where that is not known without going through the images, or not at once."""
    if entry.get("tfds") or entry.get("builtin") or entry.get("where"):
        return {}
    if _is_plain_folder(entry):
        found = open_source(dict(entry, kind="caption"), "test")
        texts = found.read_texts(range(len(found)))
        return dict(
            caption=sum(bool(r.texts) for r in texts), label=sum(bool(r.labels) for r in texts)
        )
    if entry.get("text_field") or entry.get("label_field"):
        return {}
    there = prepared.read_manifest(str(entry["path"]))["splits"].get(entry.get("split", "test"))
    return dict(caption=there["with_text"], label=there["with_label"]) if there else {}


def _options(entry: Mapping[str, Any]) -> Options:
    return Options(
        text_field=str(entry.get("text_field") or ""),
        label_field=str(entry.get("label_field") or ""),
        image_field=str(entry.get("image_field") or ""),
    )


def _is_plain_folder(entry: Mapping[str, Any]) -> bool:
    path = str(entry.get("path") or "")
    if not os.path.isdir(path) or files.exists(files.join(path, prepared.MANIFEST)):
        return False
    try:
        return bool(imagefolder.plan(path, "", Options()))
    except FileNotFoundError:
        return False


def _folder(entry: Mapping[str, Any], split: str) -> Source:
    path, options = str(entry["path"]), _options(entry)
    found = [
        (one, unit)
        for unit in imagefolder.plan(path, split, options)
        for one in imagefolder.located(unit, options)
    ]
    bad = [one.item for one, _ in found if one.item.problem]
    if bad:
        raise ValueError(
            f"data {path}: {len(bad)} of {len(found)} rows cannot be used, the first {bad[0].key} "
            f"({bad[0].problem}: {bad[0].detail}); prepare leaves such out and lists them"
        )

    def read(indices: Indices) -> list[Record]:
        wanted = (found[int(i)] for i in indices)
        return [_record(one.load(unit, options), path) for one, unit in wanted]

    return Source(
        f"{path} [{split}]",
        len(found),
        read,
        lambda indices: [_record(found[int(i)][0].item, path) for i in indices],
        applied_fields=True,
    )


def _tfds_path(entry: Mapping[str, Any]) -> str:
    if not entry.get("data_dir"):
        return str(entry["tfds"])
    tfds = tfds_source.package()
    try:
        return str(tfds.builder(entry["tfds"], data_dir=entry["data_dir"]).data_path)
    except Exception as error:  # TFDS has a type for each way to be absent
        raise ValueError(f"data tfds={entry['tfds']}: {error}") from None


def _tfds(entry: Mapping[str, Any], split: str) -> Source:
    """Reads units of the split one after the other and holds the last one."""
    path, options = _tfds_path(entry), _options(entry)
    whole = tfds_name.plan(path, split, options)
    rows = sum(unit.rows for unit in whole)
    units = items.split_units(whole[0].path, rows, _ROWS_PER_UNIT)
    held: dict[int, list[Record]] = {}

    def unit_records(number: int) -> list[Record]:
        if number not in held:
            held.clear()
            unit: Unit = units[number]
            held[number] = [_record(item, path) for item in tfds_name.read(unit, options)]
        return held[number]

    def read(indices: Indices) -> list[Record]:
        places = [divmod(int(i), _ROWS_PER_UNIT) for i in indices]
        return [unit_records(number)[row] for number, row in places]

    return Source(f"tfds {entry['tfds']} [{split}]", rows, read, applied_fields=True)


def _record(item: Item, path: str) -> Record:
    if item.problem:
        raise ValueError(f"data {path}: {item.key}: {item.problem}: {item.detail}")
    extra = items.plain_json(item.extra)
    return Record(item.image, tuple(item.texts), tuple(item.labels), item.key, extra)
