"""Datasets of tensorflow-datasets (TFDS) by name, as prepared there; images keep their bytes.

Training (`dict(tfds=NAME)` in config.data.sources) reads datasets in the random-access format
`array_record`; `prepare` and `evaluate` read those of any format, in order. The one file that
imports tensorflow-datasets, the extra 'tfds'.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

from coca_jax.config import Entry
from coca_jax.data.sources import files
from coca_jax.data.sources.fields import LABEL_FIELDS, LISTED_TEXTS, names, plain_json, strings
from coca_jax.data.sources.items import Item, Options, Unit, guarded, split_units
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.registry import Format
from coca_jax.data.sources.source import Indices, Source
from coca_jax.runtime import extras

ROWS_PER_UNIT = 4096
_OWN = "tensorflow_datasets.core.features."


def package() -> Any:
    """The module tensorflow_datasets, with its TensorFlow kept off GPUs.

    Raises:
        ValueError: it is not installed; the text names the extra.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(
            f"data of tensorflow-datasets needs that package ({error}): {extras.remedy('tfds')}"
        ) from None
    try:
        import tensorflow

        # TensorFlow would take nearly all memory of every GPU at its first operation.
        tensorflow.config.set_visible_devices([], "GPU")
    except ImportError:  # datasets in array_record are read without it
        pass
    except RuntimeError as error:  # this process has already used TensorFlow
        logging.warning("TensorFlow may hold memory of the GPUs: %s", error)
    return tensorflow_datasets


class _Dataset(NamedTuple):
    """A prepared dataset, the names of its image, text and label features ('': none), and the names
    of its integer labels."""

    builder: Any
    image: str
    text: str
    label: str
    classes: Sequence[str]

    def examples(self, split: str) -> Any:
        """The examples of a split such as 'train[0:10]': a sequence in the format array_record,
        else an iterable."""
        tfds = package()
        decoders = {self.image: tfds.decode.SkipDecoding()}
        if self.random_access:
            return self.builder.as_data_source(split, decoders=decoders)
        return tfds.as_numpy(self.builder.as_dataset(split, decoders=decoders, shuffle_files=False))

    @property
    def random_access(self) -> bool:
        return self.builder.info.file_format == package().core.FileFormat.ARRAY_RECORD

    def item(self, key: str, example: dict[str, Any]) -> Item:
        """An example as an item. Other images and their masks are left out."""
        values = {
            name: _plain(value)
            for name, value in example.items()
            if name != self.image and getattr(value, "ndim", 0) < 3
        }
        item = Item(key, bytes(example[self.image]), strings(values.pop(self.text, None)))
        try:
            item.labels = names(values.pop(self.label, None), self.classes)
        except ValueError as error:
            item.problem, item.detail = "bad_label", str(error)
        item.extra = values
        return item


def _builder(name: str, data_dir: str = "") -> Any:
    """Raises ValueError: there is no such dataset."""
    tfds = package()
    name = name.removeprefix("tfds:")
    folder = ("/" in name and name.startswith((".", "/"))) or "://" in name
    folder = folder or os.path.exists(os.path.join(name, "features.json"))
    if folder:
        _check_features(name)
    elif "/" in name and os.path.isdir(name):
        raise ValueError(f"tfds:{name} is a folder without the features.json of a TFDS dataset")
    try:
        if folder:
            return tfds.builder_from_directory(name)
        return tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # TFDS has a type for each way to be absent
        # The first line says what is wrong; below it TFDS lists all datasets that it knows.
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :.")
        raise ValueError(f"tfds:{name}: tensorflow-datasets has no such dataset: {why}") from None


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


def _dataset(builder: Any, image: str, text: str, label: str, classes: Sequence[str]) -> _Dataset:
    """Raises ValueError: no such feature, or none that is an image."""
    features = builder.info.features

    def chosen(wanted: str, usual: Sequence[str]) -> str:
        if wanted and wanted not in features:
            raise ValueError(f"tfds:{builder.name}: no field {wanted!r}; it has {list(features)}")
        return wanted or next((name for name in usual if name in features), "")

    image, text, label = (
        chosen(image, ("image", "img")),
        chosen(text, LISTED_TEXTS),
        chosen(label, LABEL_FIELDS),
    )
    if not image:
        raise ValueError(
            f"tfds:{builder.name}: which feature is the image? --image_field of {list(features)}"
        )
    feature = features[label] if label else None
    feature = getattr(feature, "feature", feature)  # of a sequence of labels
    return _Dataset(builder, image, text, label, getattr(feature, "names", None) or classes)


def _of_unit(unit: Unit, options: Options) -> tuple[_Dataset, str]:
    """The dataset and the split of a unit."""
    name, _, split = unit.path.rpartition("@")
    fields = (options.image_field, options.text_field, options.label_field)
    return _dataset(_builder(name), *fields, options.class_names), split


def data_path(name: str, data_dir: str = "") -> str:
    """The folder of a prepared dataset, or its name where the folder is the usual one."""
    return str(_builder(name, data_dir).data_path) if data_dir else name


def splits(path: str) -> list[str]:
    """The names of a dataset's splits."""
    return sorted(_builder(path).info.splits)


def plan(path: str, split: str, options: Options) -> list[Unit]:
    """Units of a split: ranges of its examples. `path`: a name, or a folder of a prepared dataset.

    Raises:
        ValueError: no such dataset, or it has no such split.
    """
    builder = _builder(path)
    if split not in builder.info.splits:
        raise ValueError(f"--split={split}: tfds:{path} has {sorted(builder.info.splits)}")
    units = split_units(path, builder.info.splits[split].num_examples, ROWS_PER_UNIT)
    return [Unit(f"{path}@{split}", unit.start, unit.stop, unit.rows) for unit in units]


def declared_classes(unit: Unit, options: Options) -> list[str]:
    """The class names of the label feature, in order."""
    return list(_of_unit(unit, options)[0].classes)


def read(unit: Unit, options: Options) -> Iterator[Item]:
    """The items of a range of a split."""
    dataset, split = _of_unit(unit, options)
    examples = iter(dataset.examples(f"{split}[{unit.start}:{unit.stop}]"))
    for number in range(unit.start, unit.stop):
        key = f"{split}#{number}"
        try:
            example = next(examples)
        except Exception as error:  # TensorFlow and array_record have types of their own
            detail = f"{type(error).__name__}: {error}"
            yield Item(key, problem="damaged_archive", detail=detail)
            return
        yield guarded(key, lambda: dataset.item(key, example))  # noqa: B023


def open_entry(entry: Entry, split: str) -> Source:
    """The source of an entry dict(tfds=...) of config.data.sources.

    Raises:
        ValueError: not prepared, prepared in another format than array_record, without such fields,
            or tensorflow-datasets is not installed.
    """
    where = f"data source tfds={entry.tfds!r} [{split}]"
    try:
        builder = _builder(entry.tfds, entry.data_dir)
        fields = (entry.image_field, entry.text_field, entry.label_field)
        dataset = _dataset(builder, *fields, ())
        if split not in builder.info.splits:
            raise ValueError(f"no such split; it has {sorted(builder.info.splits)}")
        if not dataset.random_access:
            raise ValueError(f"its files are {builder.info.file_format.value}, not array_record")
        examples = dataset.examples(split)
    except Exception as error:  # TFDS has its own types
        hint = "use `coca-jax prepare --format=tfds --input=NAME --out=DIR` and --data=DIR"
        raise ValueError(f"{where}: {error}; {hint}") from None

    def read_indices(indices: Indices) -> list[Record]:
        rows = [int(index) for index in indices]
        found = []
        for row, example in zip(rows, examples.__getitems__(rows), strict=True):
            item = dataset.item(str(row), example)
            if item.problem:
                raise ValueError(f"{where}: record {row}: {item.detail}")
            texts, labels = tuple(item.texts), tuple(item.labels)
            found.append(Record(item.image, texts, labels, item.key, plain_json(item.extra)))
        return found

    return Source(f"tfds {entry.tfds} [{split}]", len(examples), read_indices, applied_fields=True)


def _plain(value: Any) -> Any:
    """A feature's value with texts for bytes and lists for arrays, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


FORMATS = (
    Format(
        *("tfds", plan, read, (), 0),
        in_place=False,
        splits=splits,
        declared_classes=declared_classes,
    ),
)
