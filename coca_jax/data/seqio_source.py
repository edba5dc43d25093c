"""A seqio Task that the user has registered, as a source: read once, then by index."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from coca_jax.config import Entry
from coca_jax.data import images
from coca_jax.data.sources import array_record, records
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import Reader, Source

IMAGES, TEXTS, LABELS = (
    ("image", "img"),
    ("text", "texts", "caption", "captions"),
    ("label", "labels"),
)


def open_entry(entry: Entry, split: str) -> Source:
    """An entry dict(seqio='name', module='my.tasks') of config.data.sources.

    A Task yields examples one after another, and training wants any of them at any time: the Task
    is read through once, in its own order (not shuffled), into a temporary file that is gone with
    the source; below prepared.HOLD_BYTES what was read stays in memory.

    Its features: `image` (encoded bytes, or uint8 or float [h, w, 1, 3 or 4]), `text` and `label`
    (a string or several; tokens are decoded by the vocabulary of the feature), under these names or
    those of image_field, text_field and label_field. All that is left, where it can be written as
    JSON, is `extra`, for `where`.

    Raises:
        ValueError: the extra 'seqio' is not installed, no module or Task of this name, a Task
            without such a split or features, or without any example.
    """
    task = _task(entry)
    if split not in task.splits:
        raise ValueError(
            f"data source seqio={task.name!r}: no split {split!r}; it has {sorted(task.splits)}"
        )
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    fields = _fields(task.name, list(dataset.element_spec), entry)
    folder = tempfile.TemporaryDirectory(prefix="coca_jax-seqio-")
    path = os.path.join(folder.name, "examples.array_record")
    print(f"reading the seqio Task {task.name} [{split}] once", file=sys.stderr, flush=True)
    examples = enumerate(dataset.as_numpy_iterator())
    count, texts, labels = _write(
        path, (_record(e, number, fields, task) for number, e in examples)
    )
    if not count:
        raise ValueError(f"data source seqio={task.name!r} [{split}]: it yields no example")
    read: Reader = array_record.ArrayRecordFiles([path], [count])
    if os.path.getsize(path) < array_record.HOLD_BYTES:
        read = array_record.Held(read, count, array_record.HOLD_BYTES)
    weakref.finalize(read, folder.cleanup)
    return Source(
        f"seqio {task.name} [{split}]",
        count,
        read,
        every=[has for has, some in (("text", texts), ("label", labels)) if some == count],
        applied_fields=True,
    )


def _task(entry: Entry) -> Any:
    """The Task that an entry names. Raises ValueError: there is none."""
    from coca_jax.data import seqio_tasks  # TensorFlow, for nobody else

    seqio, name = seqio_tasks.seqio, entry.seqio
    if entry.module:
        if os.getcwd() not in sys.path:  # as `python -m` has it; to stay: it may import more later
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(entry.module)
        except ImportError as error:
            raise ValueError(
                f"data source seqio={name!r}: module={entry.module!r}, which registers it, "
                f"cannot be imported ({error}); it is looked for in the current folder and in "
                "those of PYTHONPATH"
            ) from None
    if name in seqio.MixtureRegistry.names():
        raise ValueError(
            f"data source seqio={name!r} is a Mixture; name each of its Tasks as a source, with a "
            "weight"
        )
    if name not in seqio.TaskRegistry.names():
        known = ", ".join(sorted(seqio.TaskRegistry.names())) or "none"
        raise ValueError(
            f"data source seqio={name!r}: no such Task; registered are: {known}. "
            "module='my.tasks' names the module that registers it"
        )
    return seqio.TaskRegistry.get(name)


def _fields(name: str, features: list[str], entry: Entry) -> dict[str, str]:
    """Which feature is the image, the text and the label; '' for none."""
    found = {}
    for what, usual in (("image", IMAGES), ("text", TEXTS), ("label", LABELS)):
        wanted = getattr(entry, f"{what}_field")
        if wanted and wanted not in features:
            raise ValueError(
                f"data source seqio={name!r}: no feature {wanted!r} ({what}_field); it has "
                f"{sorted(features)}"
            )
        found[what] = wanted or next((feature for feature in usual if feature in features), "")
    if not found["image"]:
        raise ValueError(
            f"data source seqio={name!r}: which of its features {sorted(features)} is the image? "
            "give image_field"
        )
    return found


def _write(path: str, examples: Iterator[Record]) -> tuple[int, int, int]:
    """How many examples there are, how many with a text, how many with a label."""
    counts = np.zeros(3, np.int64)
    with records.writing(path):
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
    try:
        for record in examples:
            counts += (1, bool(record.texts), bool(record.labels))
            with records.writing(path):
                writer.write(records.serialize(record))
    finally:
        with records.writing(path):
            writer.close()
    count, texts, labels = counts.tolist()
    return count, texts, labels


def _record(
    example: Mapping[str, Any], number: int, fields: Mapping[str, str], task: Any
) -> Record:
    def strings(what: str) -> tuple[str, ...]:
        feature = fields[what]
        if not feature:
            return ()
        value = np.asarray(example[feature])
        vocabulary = getattr(task.output_features.get(feature), "vocabulary", None)
        if what == "text" and value.dtype.kind in "iu" and vocabulary is not None:
            return tuple(filter(None, [vocabulary.decode(value.reshape(-1).tolist())]))
        plain = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v)
                 for v in value.reshape(-1).tolist()]  # fmt: skip
        return tuple(filter(None, plain))

    extra = {
        name: found
        for name, value in example.items()
        if name not in fields.values() and (found := _plain(value)) is not None
    }
    image = _encoded(np.asarray(example[fields["image"]]))
    key = f"{task.name}#{number}"
    return Record(image, strings("text"), strings("label"), key, json.dumps(extra))


def _encoded(image: np.ndarray) -> bytes:
    """A feature as the bytes of an image: as they are, or pixels as PNG."""
    if image.dtype.kind in "SO":
        return bytes(image.item())
    out = io.BytesIO()
    Image.fromarray(images.decode(image)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _plain(value: Any) -> Any:
    """A feature as JSON has it; None for arrays of more than 64 values."""
    array = np.asarray(value)
    if array.size > 64:
        return None
    found = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v
             for v in array.reshape(-1).tolist()]  # fmt: skip
    return found[0] if array.ndim == 0 else found
