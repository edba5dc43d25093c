"""Detects a collapsed captioner, which writes the same captions for all images. Four metrics:

distinct     number of different captions (ignoring case and punctuation) per caption
same_start   fraction of captions that start with the most common first three words
self_bleu    mean BLEU-4 of each caption with the others as references (Zhu et al. 2018)
image_gain   mean gain in log probability of a caption with its own image instead of another one, in
             nats per token
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from coca_jax.evaluation.evaluators import Record, check_finite, stack_images
from coca_jax.evaluation.metrics import captions

TRIED = 64  # captions that are also scored with another image
APART = 7  # distance to the other image in the dataset: neighbors are often similar
LEAST = 32  # no warning for fewer captions
LEAST_DISTINCT = 0.2  # relative to the references
START_WORDS = 3
MOST_SAME_START = 0.25  # more is allowed if the references also start alike
LEAST_GAIN = 0.01  # nats per token
MOST = 2000  # maximum number of captions for self-BLEU


class Scorer(Protocol):
    """A model that computes the log likelihood of captions."""

    def caption_log_likelihood(self, images: Any, texts: Sequence[str]) -> Any:
        """(log probability of text i for image i, number of predicted tokens), each [N]."""


def distinct(texts: Sequence[str]) -> np.ndarray:
    """Returns 1 / (number of equal texts) for each text, float64 [N]; the mean is the number of
    different texts divided by N."""
    normalized = [" ".join(captions.tokenize(text)) for text in texts]
    counts = collections.Counter(normalized)
    return np.array([1 / counts[text] for text in normalized])


def start_of(text: str) -> str:
    """The first three words of a text in lower case; '' for a shorter text."""
    words = captions.tokenize(text)[:START_WORDS]
    return " ".join(words) if len(words) == START_WORDS else ""


def same_start(texts: Sequence[str]) -> tuple[str, np.ndarray]:
    """Returns the most common `start_of` the texts, and bool [N]: the texts that start with it."""
    starts = [start_of(text) for text in texts]
    counts = collections.Counter(start for start in starts if start)
    most_common = counts.most_common(1)[0][0] if counts else ""
    return most_common, np.array([bool(start) and start == most_common for start in starts])


def begin_alike(captions: float, references: float) -> bool:
    """Whether too many captions start with the same words, given the fractions of captions and of
    references that do."""
    # References may start alike, too ("a photo of"); then a model that does so is not collapsed.
    return captions > max(MOST_SAME_START, 2 * references + 0.1)


def self_bleu(texts: Sequence[str]) -> np.ndarray:
    """Returns BLEU-4 of each of the first MOST texts with the others as references, float64 [N].
    A text of fewer than four words, whose BLEU-4 is always near 0, gets 1 if another text is equal.
    """
    tokens = [captions.tokenize(text) for text in texts[:MOST]]
    if len(tokens) < 2:
        return np.zeros(len(tokens))
    rows = np.zeros((len(tokens), 10))
    for n in range(1, 5):
        counts = [collections.Counter(zip(*(text[i:] for i in range(n)))) for text in tokens]
        # The clip for a text is the highest count of the n-gram in any other text: the highest of
        # all, or the second highest if the text itself has the highest. One pass finds both.
        most: dict[tuple, tuple[int, int]] = {}
        for found in counts:
            for gram, number in found.items():
                first, second = most.get(gram, (0, 0))
                most[gram] = (max(first, number), max(second, min(first, number)))
        for row, found in zip(rows, counts):
            for gram, number in found.items():
                first, second = most[gram]
                row[n - 1] += min(number, second if number == first else first)
            row[n + 3] = found.total()
    lengths = sorted(len(text) for text in tokens)
    for row, text in zip(rows, tokens):
        row[8], row[9] = len(text), _closest(lengths, len(text))
    scores: np.ndarray = captions.bleu(rows)[:, 3]
    same = collections.Counter(map(tuple, tokens))
    short = [len(text) < 4 and same[tuple(text)] > 1 for text in tokens]
    return np.where(short, 1.0, scores)


def _closest(lengths: Sequence[int], own: int) -> int:
    """The length among the other texts that is closest to `own`; the shorter of two."""
    at = bisect.bisect_left(lengths, own)
    neighbors = [lengths[i] for i in (at - 1, at + 1) if 0 <= i < len(lengths)]
    return min(neighbors, key=lambda length: (abs(length - own), length))


def gains(
    model: Scorer, images: Any, others: Any, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log probability of text i with image i minus that with others[i], in nats,
    float64 [N], and its number of tokens, int [N]. Raises ValueError for NaN."""
    right, tokens = model.caption_log_likelihood(images, texts)
    wrong, _ = model.caption_log_likelihood(others, texts)
    gain = np.asarray(right, np.float64) - np.asarray(wrong, np.float64)
    return check_finite(gain, "caption likelihoods"), np.asarray(tokens, np.int64)


def first_gains(
    model: Scorer, recent: Sequence[Record], batch: Sequence[Record], texts: Sequence[str], at: int
) -> list[tuple[float, float] | None]:
    """Returns (gain, tokens) for the captions of the last records of a batch, or None for records
    that are not among the first `TRIED` of the dataset. The other image is the one `APART` records
    earlier, or the first record, which itself has no gain.

    recent: the last `APART` records before the batch; texts: captions of the last records of the
    batch; at: index in the dataset of the first of these.
    """
    line = [*recent, *batch]
    start = len(line) - len(texts)
    chosen = [i for i in range(len(texts)) if 0 < at + i < TRIED]
    found: list[tuple[float, float] | None] = [None] * len(texts)
    if not chosen:
        return found
    own = stack_images([line[start + i] for i in chosen])
    others = stack_images([line[max(0, start + i - APART)] for i in chosen])
    for i, gain, tokens in zip(chosen, *gains(model, own, others, [texts[i] for i in chosen])):
        found[i] = (float(gain), float(tokens))
    return found


def warning(
    figures: Mapping[str, float],
    count: int,
    of_references: float = 1.0,
    *,
    start: str = "",
    start_of_references: float = 0.0,
) -> str:
    """Returns a warning about `count` captions with these metrics; '' if they look normal.

    of_references: `distinct` of the references. start: the three words of `same_start`;
    start_of_references: fraction of the references that start with them.
    """
    if count < LEAST:
        return ""
    problems = []
    same_start = figures.get("same_start", 0.0)
    if begin_alike(same_start, start_of_references):
        problems.append(
            f"{same_start:.0%} of {count} captions start with the same three words ({start!r}; "
            f"{start_of_references:.0%} of the references do)"
        )
    least = LEAST_DISTINCT * of_references
    if figures["distinct"] < least:
        problems.append(
            f"captions repeat: {figures['distinct']:.1%} of {count} captions are distinct "
            f"(threshold: {least:.1%})"
        )
    if "image_gain" in figures and figures["image_gain"] < LEAST_GAIN:
        problems.append(
            "captions hardly depend on the image: their own image adds "
            f"{figures['image_gain']:.4f} nats per token compared with another image (threshold: "
            f"{LEAST_GAIN})"
        )
    return "; ".join(problems)
