"""Baselines: the scores of a model that does not look at the images.

A score `NAME` may have two companions: `NAME_chance`, the score of random guesses, and
`NAME_majority`, the score of always giving the most common answer.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence

import numpy as np

from coca_jax.evaluation.evaluators.caption_match import canonical_text, score_references


def among_first(count: int, right: Iterable[int], k: int) -> float:
    """Probability that a correct candidate is among the first k of `count` candidates in random
    order, averaged over the queries. right: number of correct candidates of each query."""
    # With m correct candidates: 1 - C(count - m, k) / C(count, k).
    first = min(k, count)
    several, times = np.unique(np.fromiter(right, np.int64), return_counts=True)
    whole = math.comb(count, first)
    missed = [math.comb(count - m, first) / whole for m in several.tolist()]
    return 1 - float(np.average(missed, weights=times))


def most_common_caption(references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """(exact match, word F1) of a model that always outputs the most common reference.

    references: the captions of each image.
    """
    counts = collections.Counter(canonical_text(t) for several in references for t in several)
    caption = counts.most_common(1)[0][0]
    found = [score_references(caption, dict(text=list(several))) for several in references]
    exact, f1 = np.mean(found, axis=0).tolist()
    return exact, f1
