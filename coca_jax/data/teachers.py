"""Embeddings of a teacher that `recaption --embeddings` wrote into the data."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy as np

from coca_jax.data.records import Record


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
        if '"image_emb"' not in record.extra:
            continue
        extra = json.loads(record.extra)
        made = extra.get("recaption")
        if not isinstance(made, dict) or not {"originals", "captions"} <= made.keys():
            continue  # fields of the data's own that have these names
        texts = [one["text"] for one in made["originals"] + made["captions"]]
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
