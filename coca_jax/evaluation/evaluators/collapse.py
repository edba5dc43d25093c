"""Does a captioner say the same of everything? Four figures, and when they are a warning.

distinct     share of the captions that differ from all others (after case and punctuation)
same_start   share of the captions that begin with the same three words, the most common ones
self_bleu    BLEU-4 of each caption with the others as its references, the mean (Zhu et al. 2018)
image_gain   how much more probable captions are with their own images than with others' images:
             nats a token, the mean
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from coca_jax.evaluation.evaluators import Record, check_finite, stack_images
from coca_jax.evaluation.metrics import captions

TRIED = 64  # captions that an evaluation scores with another image too
APART = 7  # places between an image and that other one: neighbours in a set are often alike
LEAST = 32  # captions below which nothing is warned of
LEAST_DISTINCT = 0.2  # of the share that the references have, or of 1 without references
START_WORDS = 3
MOST_SAME_START = 0.25  # share of captions; more is allowed where references begin so, too
LEAST_GAIN = 0.01  # nats a token
MOST = 2000  # captions that self-BLEU looks at


class Scorer(Protocol):
    """What gives log likelihoods: a loaded model, or an evaluator's predictor."""

    def caption_log_likelihood(self, images: Any, texts: Sequence[str]) -> Any:
        """(Log probabilities of text i for image i, numbers of predicted tokens), each [N]."""


def distinct(texts: Sequence[str]) -> np.ndarray:
    """One over the number of texts that say the same, float64 [N]: the mean is the share of
    different texts."""
    normalized = [" ".join(captions.tokenize(text)) for text in texts]
    counts = collections.Counter(normalized)
    return np.array([1 / counts[one] for one in normalized])


def start_of(text: str) -> str:
    """The first three words of a text in lower case; '' of a shorter one."""
    words = captions.tokenize(text)[:START_WORDS]
    return " ".join(words) if len(words) == START_WORDS else ""


def same_start(texts: Sequence[str]) -> tuple[str, np.ndarray]:
    """The most common `start_of` the texts, and bool [N], whether each text begins with it."""
    starts = [start_of(text) for text in texts]
    counts = collections.Counter(start for start in starts if start)
    most_common = counts.most_common(1)[0][0] if counts else ""
    return most_common, np.array([bool(start) and start == most_common for start in starts])


def begin_alike(captions: float, references: float) -> bool:
    """Whether too many captions begin with the same words, by the shares of captions and references
    that do. People's captions may begin alike ("a photo of"); then a model is right to do so."""
    return captions > max(MOST_SAME_START, 2 * references + 0.1)


def self_bleu(texts: Sequence[str]) -> np.ndarray:
    """BLEU-4 of each text with all others as references, float64 [N], of the first MOST texts; 0
    of one text alone. Of fewer than four words, where BLEU-4 is near 0 whatever they are: 1 where
    another text is the same.

    The most that another text has of an n-gram is the most of all, or the second most where the
    text itself has the most: one pass for all.
    """
    tokens = [captions.tokenize(text) for text in texts[:MOST]]
    if len(tokens) < 2:
        return np.zeros(len(tokens))
    rows = np.zeros((len(tokens), 10))
    for n in range(1, 5):
        counts = [collections.Counter(zip(*(one[i:] for i in range(n)))) for one in tokens]
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
    lengths = sorted(len(one) for one in tokens)
    for row, one in zip(rows, tokens):
        row[8], row[9] = len(one), _closest(lengths, len(one))
    scores: np.ndarray = captions.bleu(rows)[:, 3]
    same = collections.Counter(map(tuple, tokens))
    short = [len(one) < 4 and same[tuple(one)] > 1 for one in tokens]
    return np.where(short, 1.0, scores)


def _closest(lengths: Sequence[int], own: int) -> int:
    """The length nearest to `own` among the others, the shorter of two; `own` is one of them."""
    at = bisect.bisect_left(lengths, own)
    beside = [lengths[i] for i in (at - 1, at + 1) if 0 <= i < len(lengths)]
    return min(beside, key=lambda length: (abs(length - own), length))


def gains(
    model: Scorer, images: Any, others: Any, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """What image_gain is made of: nats by which text i is more probable with image i than with
    others[i], float64 [N], and its number of tokens, int [N]. Raises ValueError for NaN."""
    right, tokens = model.caption_log_likelihood(images, texts)
    wrong, _ = model.caption_log_likelihood(others, texts)
    gain = np.asarray(right, np.float64) - np.asarray(wrong, np.float64)
    return check_finite(gain, "caption likelihoods"), np.asarray(tokens, np.int64)


def first_gains(
    model: Scorer, recent: Sequence[Record], batch: Sequence[Record], texts: Sequence[str], at: int
) -> list[tuple[float, float] | None]:
    """(gain, tokens) of the caption of each of the batch's last records, None beyond the first
    `TRIED` of the set: beside the image `APART` places before, or the first; the first has none.

    recent: the last `APART` records before the batch, so that it does not matter how long that is;
    texts: of the last records of the batch; at: the place in the set of the first of them.
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
    """What to tell of `count` captions with these figures; '' where nothing is wrong.

    of_references: the distinct share of what people say of the same images. start: the three words
    of `same_start`; start_of_references: the share of the references that begin with them.
    """
    if count < LEAST:
        return ""
    problems = []
    same_start = figures.get("same_start", 0.0)
    if begin_alike(same_start, start_of_references):
        problems.append(
            f"{same_start:.0%} of {count} captions begin with the same three words ({start!r}; "
            f"{start_of_references:.0%} of the references do)"
        )
    least = LEAST_DISTINCT * of_references
    if figures["distinct"] < least:
        problems.append(
            f"the model says the same of everything: {figures['distinct']:.1%} of {count} captions "
            f"are distinct (warned of below {least:.1%})"
        )
    if "image_gain" in figures and figures["image_gain"] < LEAST_GAIN:
        problems.append(
            "the model hardly looks at its images: captions are "
            f"{figures['image_gain']:.4f} nats a token more probable with their own than with "
            f"others (warned of below {LEAST_GAIN})"
        )
    return "; ".join(problems)
