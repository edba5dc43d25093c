"""Embeddings of a teacher that `recaption --embeddings` wrote into the data."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from coca_jax.config import Entry, Loss
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import Source, read_all

_AT_ONCE = 256  # records of a source


def check(sources: Sequence[Source], entries: Sequence[Entry], loss: Loss) -> None:
    """Raises ValueError where a loss needs a teacher and no record of any source has embeddings of
    one of its texts. Reads texts, of the sources in turn, until it finds some; what is drawn or of
    TFDS has none. entries: of the sources."""
    if not loss.teacher_width:
        return
    able = [source for source, entry in zip(sources, entries) if entry.path]
    for start in range(0, max(map(len, able), default=0), _AT_ONCE):
        for source in able:
            rows = np.arange(start, min(start + _AT_ONCE, len(source)))
            records, unread = read_all(source, rows, texts=True)
            for number, (row, record) in enumerate(zip(rows.tolist(), records)):
                extra, texts = _taught(record)
                own = source.kind.vocabulary_texts(record, row) if extra else ()
                if number not in unread and not set(texts).isdisjoint(own):
                    return
    weights = dict(affinity_weight=loss.affinity_weight, imitation_weight=loss.imitation_weight)
    asked = " and ".join(f"loss.{key}={value:g}" for key, value in weights.items() if value)
    names = ", ".join(dict.fromkeys(source.name for source in sources))
    raise ValueError(
        f"{asked}: no record of {names} has a teacher's embeddings of its texts, so nothing would "
        "be learned from one; write data with `coca-jax recaption --embeddings --to=array_record` "
        "(those in tars and parquet are not read), or set 0, and loss.teacher_width=0"
    )


def _taught(record: Record) -> tuple[dict[str, Any], list[str]]:
    """The `extra` of a record that has a teacher's embeddings, and the texts that these are of;
    ({}, []) of another one."""
    if '"image_emb"' not in record.extra:
        return {}, []
    extra = json.loads(record.extra)
    made = extra.get("recaption")
    if not isinstance(made, dict) or not {"originals", "captions"} <= made.keys():
        return {}, []  # fields of the data's own that have these names
    return extra, [one["text"] for one in made["originals"] + made["captions"]]


def embeddings(
    records: Sequence[Record], chosen: Sequence[str], width: int
) -> dict[str, np.ndarray]:
    """The teacher's embeddings of images and of the texts chosen for them.

    Returns:
        teacher_image, teacher_text: float32 [N, width], L2-normalised; zeros where a record has
        none, or none of its text.

    Raises:
        ValueError: embeddings of another width.
    """
    found = np.zeros((2, len(records), width), np.float32)
    for row, (record, text) in enumerate(zip(records, chosen)):
        extra, texts = _taught(record)
        if text not in texts:
            continue
        image = _array(extra["image_emb"], 1, record, width)
        found[0, row] = image[0]
        found[1, row] = _array(extra["text_emb"], len(texts), record, width)[texts.index(text)]
    return dict(teacher_image=found[0], teacher_text=found[1])


def _array(packed: str, count: int, record: Record, width: int) -> np.ndarray:
    """float32 [count, width], L2-normalised, of base64 of float16."""
    values = np.frombuffer(base64.b64decode(packed), np.float16).astype(np.float32)
    if values.size != count * width:
        raise ValueError(
            f"{record.key!r} has embeddings of width {values.size // count}, not "
            f"loss.teacher_width={width}"
        )
    values = values.reshape(count, width)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)
