"""TFDS data sets as sources. The one file that imports tensorflow-datasets, the extra 'tfds'."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from coca_jax.config import Entry
from coca_jax.data.sources import files
from coca_jax.data.sources.items import (
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
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import Indices, Source
from coca_jax.runtime import extras


def package() -> Any:
    """The module tensorflow_datasets, its TensorFlow kept off GPUs.

    Raises:
        ValueError: it is not installed; the text names the extra.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(
            f"data of tensorflow-datasets needs that package ({error}): {extras.remedy('tfds')}"
        ) from None
    _keep_tensorflow_off_gpus()
    return tensorflow_datasets


def _keep_tensorflow_off_gpus() -> None:
    """TensorFlow would take nearly all memory of every GPU at its first operation; JAX needs it."""
    try:
        import tensorflow
    except ImportError:  # prepared data sets are read without it
        return
    try:
        tensorflow.config.set_visible_devices([], "GPU")
    except RuntimeError as error:  # somebody has used TensorFlow in this process before
        logging.warning("TensorFlow may hold memory of the GPUs: %s", error)


def explain(error: Exception, name: str) -> str:
    """What an error of TFDS for a name says in its first line; below stand all data sets that it
    knows. Of the path of a folder it would speak of the part before the first slash alone."""
    if "/" in name and os.path.isdir(name):
        return f"{name} is a folder without the features.json of one"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" :.")


def open_entry(entry: Entry, split: str) -> Source:
    """An entry dict(tfds=...) of config.data.sources: a TFDS data set that is already prepared in
    the random-access format `array_record`.

    Raises:
        ValueError: not prepared, prepared in another format, without such fields, or
            tensorflow-datasets is not installed.
    """
    tfds = package()
    name, image_field = entry.tfds, entry.image_field or "image"
    text_field, label_field = entry.text_field, entry.label_field or "label"
    hint = "use `coca-jax prepare --format=tfds --input=NAME --out=DIR` and path=DIR"
    try:
        builder = tfds.builder(name, data_dir=entry.data_dir or None)
        data = builder.as_data_source(
            split=split, decoders={image_field: tfds.decode.SkipDecoding()}
        )
    except Exception as error:  # TFDS raises its own kinds for each way to be absent
        raise ValueError(
            f"data source tfds={name!r} [{split}]: {explain(error, name)}; {hint}"
        ) from None
    features = builder.info.features
    for field in (image_field, text_field, label_field):
        if field and field not in features and field != "label":
            raise ValueError(
                f"data source tfds={name!r}: no field {field!r}; it has {list(features)}"
            )
    names = getattr(features[label_field], "names", None) if label_field in features else None

    def read(indices: Indices) -> list[Record]:
        found = data.__getitems__([int(i) for i in indices])
        return [
            _record(e, i, image_field, text_field, label_field, names)
            for i, e in zip(indices, found)
        ]

    return Source(f"tfds {name} [{split}]", len(data), read, applied_fields=True)


def _record(
    example: Mapping[str, Any],
    index: int,
    image_field: str,
    text_field: str,
    label_field: str,
    names: Sequence[str] | None,
) -> Record:
    labels: tuple[str, ...] = ()
    if label_field in example:
        value = example[label_field]
        if names is not None:
            labels = tuple(names[i] for i in np.asarray(value).reshape(-1) if i >= 0)
        else:
            labels = feature_strings(value)
    texts = feature_strings(example[text_field]) if text_field else ()
    return Record(bytes(example[image_field]), texts, labels, str(index))


def feature_strings(value: Any) -> tuple[str, ...]:
    """A feature's value, one or an array of bytes, numbers or text, as texts but for blanks."""
    values = np.asarray(value).reshape(-1).tolist()
    texts = (v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values)
    return tuple(text for text in texts if text.strip())


# Data sets of tensorflow-datasets by name, as prepared there; images keep their bytes.


ROWS_PER_UNIT = 4096
_OWN = "tensorflow_datasets.core.features."


def _builder(name: str) -> Any:
    tfds = package()
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
        why = explain(error, name)
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
    tfds = package()
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
