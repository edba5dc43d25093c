"""Evaluators: one file a metric family, each a class whose `run` yields (name, value).

They know nothing of the model: they call a `Predictor`, such as `coca_jax.load(...)` returns.
Records are dicts with `image` (uint8 [S, S, 3], preprocessed), `text` (one caption or several),
`labels` (class names) and for drawn scenes `scene`; each evaluator says which it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Record = Mapping[str, Any]


class Predictor(Protocol):
    """What an evaluator asks of a model; N is at most the evaluator's batch size."""

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, S, S, 3] -> float32 [N, E], unit length."""

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """N texts -> float32 [N, E], unit length."""

    def caption(self, images: np.ndarray) -> list[str]:
        """uint8 [N, S, S, 3] -> N captions."""

    def caption_log_likelihood(
        self, images: np.ndarray, texts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (sum of log probabilities in nats [N], number of predicted tokens [N])."""


def in_batches(records: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` records, the last one shorter."""
    batch: list[Any] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def stack_images(records: Sequence[Record]) -> np.ndarray:
    """Returns uint8 [N, S, S, 3]; ValueError names a record whose image differs in shape."""
    shape = np.shape(records[0]["image"])
    for record in records:
        if np.shape(record["image"]) != shape:
            name, found = record.get("key", "?"), np.shape(record["image"])
            raise ValueError(
                f"image of {name} is {found}, others are {shape}: preprocess to one size"
            )
    return np.stack([np.asarray(r["image"], np.uint8) for r in records])


def encode_texts(predict: Predictor, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Returns float32 [N, E], encoded in batches; ValueError when a value is not finite."""
    parts = [predict.encode_text(batch) for batch in in_batches(texts, batch_size)]
    return check_finite(np.concatenate(parts).astype(np.float32, copy=False), "text")


def check_finite(embeddings: np.ndarray, what: str) -> np.ndarray:
    """Returns the embeddings; a NaN would compare as never better and look like a perfect rank."""
    bad = int((~np.isfinite(embeddings).all(-1)).sum())
    if bad:
        raise ValueError(
            f"{what} embeddings: {bad} of {len(embeddings)} are not finite; "
            "the training diverged or the checkpoint is damaged"
        )
    return embeddings
