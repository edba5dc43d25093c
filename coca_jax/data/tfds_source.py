"""TFDS data sets as sources. The one file that imports tensorflow-datasets, the extra 'tfds'."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from coca_jax import extras
from coca_jax.config import Entry
from coca_jax.console import quiet
from coca_jax.data.random_access import Indices, Source
from coca_jax.data.records import Record


def package() -> Any:
    """The module tensorflow_datasets, its TensorFlow kept off GPUs.

    Raises:
        ValueError: it is not installed; the text names the extra.
    """
    try:
        with quiet.importing():
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
        with quiet.importing():
            import tensorflow
    except ImportError:  # prepared data sets are read without it
        return
    try:
        tensorflow.config.set_visible_devices([], "GPU")
    except RuntimeError as error:  # somebody has used TensorFlow in this process before
        logging.warning("TensorFlow may hold memory of the GPUs: %s", error)


def why(error: Exception, name: str) -> str:
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
            f"data source tfds={name!r} [{split}]: {why(error, name)}; {hint}"
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
            labels = strings(value)
    texts = strings(example[text_field]) if text_field else ()
    return Record(bytes(example[image_field]), texts, labels, str(index))


def strings(value: Any) -> tuple[str, ...]:
    """A feature's value, one or an array of bytes, numbers or text, as texts but for blanks."""
    values = np.asarray(value).reshape(-1).tolist()
    texts = (v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values)
    return tuple(text for text in texts if text.strip())
