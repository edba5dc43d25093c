"""A second look at what retrieval found: the captioner orders the first candidates anew.

Embeddings are compared with everything, which is cheap and coarse; the decoder looks at an image
and a text together, which is fine and dear. So the first `count` candidates of each query are
ordered by both: the sum of the contrastive logit, log p(text | image) among a batch up to a
constant, and the captioner's log p(text | image).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coca_jax.evaluators import LIKELIHOOD_TIE

_ROWS = 1024  # queries whose scores exist at a time


def shortlists(queries: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest candidates of each query, the nearest first, equal ones by number.

    queries, candidates: float32 [N, E], [M, E], unit length. Returns int64 [N, min(count, M)].
    """
    count = min(count, len(candidates))
    lists = []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.T
        some = np.sort(np.argpartition(-scores, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(scores, some, 1), axis=1, kind="stable")
        lists.append(np.take_along_axis(some, order, 1))
    return np.concatenate(lists).astype(np.int64)


class PairScores:
    """Scores of some pairs of an image and a text, each pair once.

    Args:
        images: number of images N.
        pairs: int [P, 2], (image, text), in any order and with repeats.
    """

    def __init__(self, images: int, pairs: np.ndarray):
        self._pairs = np.unique(np.asarray(pairs, np.int64).reshape(-1, 2), axis=0)
        self._first = np.searchsorted(self._pairs[:, 0], np.arange(images + 1))
        self._scores = np.zeros(len(self._pairs), np.float32)

    def texts(self, image: int) -> np.ndarray:
        """The texts of an image's pairs, int64, ascending."""
        return self._pairs[self._first[image] : self._first[image + 1], 1]

    def put(self, image: int, scores: np.ndarray) -> None:
        """Keeps the scores of `texts(image)`."""
        self._scores[self._first[image] : self._first[image + 1]] = scores

    def get(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """float32 [...], of the pairs (images[...], texts[...]), which must be among them."""
        width = int(self._pairs[:, 1].max(initial=0)) + 1
        keys = self._pairs[:, 0] * width + self._pairs[:, 1]
        return self._scores[np.searchsorted(keys, images * width + texts)]


def reranked(
    ranks: np.ndarray, lists: np.ndarray, scores: np.ndarray, matches: Sequence[set[int]]
) -> np.ndarray:
    """Ranks (0: first) of each query's best match once its shortlist is ordered by scores.

    Args:
        ranks: int64 [N], before; they stay where no match is in the shortlist.
        lists, scores: [N, K], the shortlist of each query and its scores, in nats.
        matches: for each query, the candidates that match.

    Returns:
        int64 [N]. Ties count against the model, as those of likelihoods do elsewhere.
    """
    found = ranks.copy()
    for query, (some, score) in enumerate(zip(lists, scores)):
        right = np.asarray([candidate in matches[query] for candidate in some.tolist()])
        if right.any():
            found[query] = int((~right & (score >= score[right].max() - LIKELIHOOD_TIE)).sum())
    return found
