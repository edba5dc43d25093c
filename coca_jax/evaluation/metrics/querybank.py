"""Querybank normalization: lowers the scores of candidates that are close to every query (hubs).

A bank of queries from outside the test set identifies the hubs (Radovanovic et al., 2010). Instead
of the cosine, a candidate's score is the log of its softmax over the queries of the bank, up to a
constant (inverted softmax, Smith et al., 2017, arXiv:1702.03859; querybank normalization, Bogolin
et al., CVPR 2022, arXiv:2112.12777).
"""

from __future__ import annotations

import numpy as np

_TILE = 4096  # side of the tile of scores in memory


def hubness(bank: np.ndarray, candidates: np.ndarray, scale: float) -> np.ndarray:
    """Returns log(mean over queries q of exp(scale * q . c)) / scale per candidate c: float32 [M].

    bank, candidates: float32 [Q, E], [M, E], unit length, Q > 0; scale: logit scale. The result is
    between the mean and the maximum cosine.
    """
    found = np.empty(len(candidates), np.float32)
    for start in range(0, len(candidates), _TILE):
        some = candidates[start : start + _TILE].T
        total = np.full(some.shape[1], -np.inf)
        for first in range(0, len(bank), _TILE):
            logits = scale * (bank[first : first + _TILE] @ some).astype(np.float64)
            most = logits.max(0)  # keeps exp from overflowing
            total = np.logaddexp(total, most + np.log(np.exp(logits - most).sum(0)))
        found[start : start + _TILE] = (total - np.log(len(bank))) / scale
    return found


def normalised(
    queries: np.ndarray, candidates: np.ndarray, bank: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns embeddings float32 [N, E + 1] and [M, E + 1] whose dot products are the cosines minus
    the candidates' `hubness`. queries: float32 [N, E]; the other arguments as in `hubness`."""
    less = -hubness(bank, candidates, scale)
    ones = np.ones((len(queries), 1), np.float32)
    return np.concatenate([queries, ones], 1), np.concatenate([candidates, less[:, None]], 1)
