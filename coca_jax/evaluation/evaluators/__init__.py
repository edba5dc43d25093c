"""Evaluators: one file a metric family, each a class whose `run` yields (name, value).

They know nothing of the model: they call a `Predictor`, such as `coca_jax.load(...)` returns.
Records are dicts with `image` (encoded bytes, or uint8 [S, S, 3]), `text` (one caption or several),
`labels` (class names) and for drawn scenes `scene`; each evaluator says which it needs. Every
process of a run calls `run` with the same records, and every one gets the same values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from absl import logging

from coca_jax.config.shapes import Size
from coca_jax.runtime import progress

if TYPE_CHECKING:
    from coca_jax.inference.explain import Explanation

Record = Mapping[str, Any]
LIKELIHOOD_TIE = 1e-4  # nats; log likelihoods closer than this are equal


class Predictor(Protocol):
    """What an evaluator asks of a model; N is at most the evaluator's batch size.

    Images are uint8 [N, S, T, 3], or a list of N images as the records hold them. resize: 'squash'
    or 'crop', how they come to the model's size, image_size. max_len: tokens that a text may have,
    begin and end included.
    """

    resize: str
    image_size: Size
    max_len: int

    @property
    def scale(self) -> float:
        """What cosine similarities are multiplied by as logits."""

    def encode_image(self, images: Any) -> np.ndarray:
        """N images -> float32 [N, E], unit length."""

    def encode_text(self, texts: Sequence[str], *, labels: bool = False) -> np.ndarray:
        """N texts -> float32 [N, E], unit length. labels: they are class names in prompts."""

    def tokenize_with_mask(
        self, texts: Sequence[str], *, labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """N texts -> ids int32 and padding mask bool, [N, max_len], cut where they are longer."""

    def caption(self, images: Any, **how: Any) -> list[str]:
        """N images -> N captions; how: options of decoding."""

    def caption_log_likelihood(
        self, images: Any, texts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (sum of log probabilities in nats [N], number of predicted tokens [N])."""

    def score(self, images: Any, texts: Sequence[str], *, labels: bool = False) -> np.ndarray:
        """Returns the log probability of text j for image i in nats, float32 [N, M]."""

    def score_some(
        self, images: Any, texts: Sequence[str], chosen: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Returns the log probability in nats of texts[chosen[i]] for image i, for each image."""

    def num_tokens(self, texts: Sequence[str], *, labels: bool = False) -> np.ndarray:
        """Returns the tokens that `score` predicts of each text, int [M]."""

    def explain(self, images: Any, texts: Sequence[str]) -> list[Explanation]:
        """N images, N texts -> the words of each, with attention over the image as `resize` has
        made it."""


def warn(name: str, line: str) -> None:
    """Says what an evaluator finds about the data or the model. name: of the evaluator. Every
    process of a run finds the same: the first says it."""
    import jax  # `--help` of a command that evaluates does without

    if jax.process_index() == 0:
        logging.warning("%s: %s", name, line)


def notify(line: str) -> None:
    """Says a line about the data on standard error."""
    print(line, file=sys.stderr)


def in_batches(records: Iterable[Any], size: int, *, show: str = "") -> Iterator[list[Any]]:
    """Yields lists of `size` records, the last one shorter.

    show: title of a progress bar with rate and time left on standard error; '': none.
    """
    total = len(records) if isinstance(records, Sized) else None
    batch: list[Any] = []
    with progress.Bar(total, "", show, shown=bool(show)) as bar:
        for record in records:
            batch.append(record)
            if len(batch) == size:
                yield batch
                bar.update(len(batch))
                batch = []
        if batch:
            yield batch
            bar.update(len(batch))


def stack_images(records: Sequence[Record]) -> Any:
    """Returns uint8 [N, S, S, 3], or a list where the images are encoded.

    Raises ValueError naming a record whose array differs in shape from the others.
    """
    if not all(isinstance(record["image"], np.ndarray) for record in records):
        return [record["image"] for record in records]
    shape = np.shape(records[0]["image"])
    for record in records:
        if np.shape(record["image"]) != shape:
            name, found = record.get("key", "?"), np.shape(record["image"])
            raise ValueError(
                f"image of {name} is {found}, others are {shape}: preprocess to one size"
            )
    return np.stack([np.asarray(r["image"], np.uint8) for r in records])


def encode_texts(
    predict: Predictor,
    texts: Sequence[str],
    batch_size: int,
    *,
    labels: bool = False,
    show: str = "",
) -> np.ndarray:
    """Returns float32 [N, E], encoded in batches; ValueError when a value is not finite."""
    parts = [
        predict.encode_text(batch, labels=labels)
        for batch in in_batches(texts, batch_size, show=show)
    ]
    return check_finite(np.concatenate(parts).astype(np.float32), "text embeddings")


def record_texts(record: Record, name: str) -> list[str]:
    """Returns the record's captions as a list; ValueError when it has none. name: who asks."""
    texts = record["text"]
    texts = [texts] if isinstance(texts, str) else list(texts or ())
    if not texts:
        raise ValueError(f"record {record.get('key', '?')} has no text; {name} needs one")
    return texts


def check_finite(values: np.ndarray, what: str) -> np.ndarray:
    """Returns what a model said of N things, [N, ...]; a NaN would compare as never better and look
    like a perfect rank. what: the name of the values in the ValueError."""
    bad = int((~np.isfinite(values).all(tuple(range(1, values.ndim)))).sum())
    if bad:
        raise ValueError(
            f"{what}: {bad} of {len(values)} are not finite; "
            "the training diverged or the checkpoint is damaged"
        )
    return values
