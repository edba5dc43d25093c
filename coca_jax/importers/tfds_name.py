"""Data sets of tensorflow-datasets by name, as prepared there; images keep their bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from coca_jax.data import files, tfds_source
from coca_jax.importers.items import (
    LABEL_FIELDS,
    LISTED_TEXTS,
    Item,
    Options,
    Unit,
    guarded,
    names,
    split_units,
    strings,
)

ROWS_PER_UNIT = 4096
_OWN = "tensorflow_datasets.core.features."


def _builder(name: str) -> Any:
    tfds = tfds_source.package()
    name = name.removeprefix("tfds:")
    folder = "/" in name and name.startswith((".", "/")) or "://" in name
    folder = folder or os.path.exists(os.path.join(name, "features.json"))
    if folder:
        _check_features(name)
    try:
        if folder:
            return tfds.builder_from_directory(name)
        return tfds.builder(name)
    except Exception as error:  # TFDS has a type for each way to be absent
        why = tfds_source.why(error, name)
        raise ValueError(f"tfds:{name}: tensorflow-datasets has no such data: {why}") from None


def _check_features(folder: str) -> None:
    """Raises ValueError for a folder whose features would import modules that are not TFDS's own:
    importing a module runs it."""
    path = files.join(folder, "features.json")
    try:
        left = [json.loads(files.read(path))] if files.exists(path) else []
        while left:
            node = left.pop()
            name = node.get("pythonClassName", "") if isinstance(node, dict) else ""
            if not isinstance(name, str) or (name and not name.startswith(_OWN)):
                raise ValueError(f"a feature of class {name!r}; only {_OWN}* are read")
            values = node.values() if isinstance(node, dict) else node
            left += [value for value in values if isinstance(value, (dict, list))]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of a split: ranges of its examples. `path`: a name, or a folder of a prepared set.

    Raises:
        ValueError: no such data set, or it has no such split.
    """
    builder = _builder(path)
    if split not in builder.info.splits:
        raise ValueError(f"--split={split}: tfds:{path} has {sorted(builder.info.splits)}")
    units = split_units(path, builder.info.splits[split].num_examples, ROWS_PER_UNIT)
    return [Unit(f"{path}@{split}", unit.start, unit.stop, unit.rows) for unit in units]


def splits(path: str) -> list[str]:
    """The splits of a data set, by their names there."""
    return sorted(_builder(path).info.splits)


def _field(features: Any, wanted: str, usual: tuple[str, ...]) -> str:
    return wanted or next((name for name in usual if name in features), "")


def _names(features: Any, label: str, options: Options) -> Sequence[str]:
    feature = features[label] if label in features else None
    feature = getattr(feature, "feature", feature)  # of a sequence of labels
    return getattr(feature, "names", None) or options.class_names


def declared_classes(unit: Unit, options: Options) -> list[str]:
    """The class names of the label feature, in order."""
    features = _builder(unit.path.rpartition("@")[0]).info.features
    return list(_names(features, _field(features, options.label_field, LABEL_FIELDS), options))


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of a split."""
    tfds = tfds_source.package()
    name, _, split = unit.path.rpartition("@")
    builder = _builder(name)
    features = builder.info.features
    image = _field(features, options.image_field, ("image", "img"))
    text = _field(features, options.text_field, LISTED_TEXTS)
    label = _field(features, options.label_field, LABEL_FIELDS)
    if image not in features:
        raise ValueError(
            f"tfds:{name}: which feature is the image? --image_field of {list(features)}"
        )
    classes = _names(features, label, options)
    decoders = {image: tfds.decode.SkipDecoding()}
    part = f"{split}[{unit.start}:{unit.stop}]"
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        examples = builder.as_data_source(part, decoders=decoders)
    else:
        examples = tfds.as_numpy(builder.as_dataset(part, decoders=decoders, shuffle_files=False))
    number, left = unit.start, iter(examples)
    while number < unit.stop:
        key = f"{split}#{number}"
        try:
            example = next(left)
        except Exception as error:  # TensorFlow and array_record have types of their own
            detail = f"{type(error).__name__}: {error}"
            yield Item(key, problem="damaged_archive", detail=detail)
            return
        yield guarded(key, lambda: _item(key, example, (image, text, label), classes))  # noqa: B023
        number += 1


def _item(
    key: str, example: dict[str, Any], fields: tuple[str, str, str], classes: Sequence[str]
) -> Item:
    image, text, label = fields
    values = {
        name: _plain(value)
        for name, value in example.items()
        if name != image and getattr(value, "ndim", 0) < 3  # no other image, nor its mask
    }
    item = Item(key, bytes(example[image]), strings(values.pop(text, None)))
    try:
        item.labels = names(values.pop(label, None), classes)
    except ValueError as error:
        item.problem, item.detail = "bad_label", str(error)
    item.extra = values
    return item


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return _plain_list(value.tolist()) if hasattr(value, "tolist") else value


def _plain_list(value: Any) -> Any:
    return [_plain_list(v) for v in value] if isinstance(value, list) else _plain(value)
