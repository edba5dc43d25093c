"""Evaluators: one file per family of metrics, each a class whose `run` yields (name, value).

Evaluators depend only on the `Predictor` interface, which models from `coca_jax.load` implement.
Records are dicts with `image` (encoded bytes or uint8 [S, S, 3]), `text` (one caption or several),
`labels` (class names) and, for synthetic scenes, `scene`; each evaluator declares which it needs.
All processes of a run call `run` with the same records and get the same values.
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
    """Interface between evaluators and models; N is at most the evaluator's batch size.

    Images are uint8 [N, S, T, 3], or a list of N images from records. resize: how images are fitted
    to image_size, a value of data.resize. max_len: maximum number of tokens of a text, including
    the start and end tokens.
    """

    resize: str
    image_size: Size
    max_len: int

    @property
    def scale(self) -> float:
        """Logit scale: the factor between cosine similarities and logits."""

    def encode_image(self, images: Any) -> np.ndarray:
        """Encodes N images to float32 [N, E], unit length."""

    def encode_text(self, texts: Sequence[str], *, labels: bool = False) -> np.ndarray:
        """Encodes N texts to float32 [N, E], unit length. labels: texts are class prompts."""

    def tokenize_with_mask(
        self, texts: Sequence[str], *, labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 and padding mask bool, both [N, max_len]; longer texts are cut."""

    def caption(self, images: Any, **how: Any) -> list[str]:
        """Generates a caption per image; how: decoding options."""

    def caption_log_likelihood(
        self, images: Any, texts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (log likelihood of each text in nats [N], number of predicted tokens [N])."""

    def score(self, images: Any, texts: Sequence[str], *, labels: bool = False) -> np.ndarray:
        """Returns the log probability of text j for image i in nats, float32 [N, M]."""

    def score_some(
        self, images: Any, texts: Sequence[str], chosen: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Returns, for each image i, the log probabilities of texts[chosen[i]] in nats."""

    def num_tokens(self, texts: Sequence[str], *, labels: bool = False) -> np.ndarray:
        """Returns the number of tokens that `score` predicts for each text, int [M]."""

    def explain(self, images: Any, texts: Sequence[str]) -> list[Explanation]:
        """Returns the words of each text with their attention over the resized image."""


def warn(name: str, line: str) -> None:
    """Logs a warning of the evaluator `name` on process 0; all processes see the same data."""
    import jax  # keeps `--help` fast

    if jax.process_index() == 0:
        logging.warning("%s: %s", name, line)


def notify(line: str) -> None:
    """Prints a line to standard error."""
    print(line, file=sys.stderr)


def in_batches(records: Iterable[Any], size: int, *, show: str = "") -> Iterator[list[Any]]:
    """Yields lists of `size` records; the last one may be shorter.

    show: title of the progress bar on standard error; '': no bar.
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
    """Returns uint8 [N, S, S, 3], or a list if the images are encoded.

    Raises ValueError if the shapes differ.
    """
    if not all(isinstance(record["image"], np.ndarray) for record in records):
        return [record["image"] for record in records]
    shape = np.shape(records[0]["image"])
    for record in records:
        if np.shape(record["image"]) != shape:
            name, found = record.get("key", "?"), np.shape(record["image"])
            raise ValueError(
                f"record {name}: its image is {found}, others are {shape}. Resize images to one size."
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
    """Encodes texts in batches: float32 [N, E]. Raises ValueError if a value is not finite."""
    parts = [
        predict.encode_text(batch, labels=labels)
        for batch in in_batches(texts, batch_size, show=show)
    ]
    return check_finite(np.concatenate(parts).astype(np.float32), "text embeddings")


def record_texts(record: Record, name: str) -> list[str]:
    """Returns the captions of a record as a list. Raises ValueError if it has none. name: evaluator
    that needs them."""
    texts = record["text"]
    texts = [texts] if isinstance(texts, str) else list(texts or ())
    if not texts:
        raise ValueError(f"record {record.get('key', '?')}: no text, which {name} needs.")
    return texts


def check_finite(values: np.ndarray, name: str) -> np.ndarray:
    """Returns model outputs [N, ...]. Raises ValueError if any is not finite; `name` describes
    them. Without this check, NaN scores would never beat the correct one and look like rank 0."""
    bad = int((~np.isfinite(values).all(tuple(range(1, values.ndim)))).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {len(values)} are not finite. "
            "Training diverged or the checkpoint is damaged."
        )
    return values
