"""Querybank normalisation: candidates that are near every query are put back.

Some candidates, hubs, are among the nearest of most queries (Radovanovic et al., 2010). A bank of
queries that are no test tells which: instead of the cosine, a candidate is scored by the log of its
part in the softmax over the bank's queries, up to a constant (inverted softmax, Smith et al., 2017,
1702.03859; as querybank normalisation, Bogolin et al., CVPR 2022, 2112.12777). With the scale of
the contrastive loss this is the other half of that loss, which was trained and is not used else.
"""

from __future__ import annotations

import numpy as np

_TILE = 4096  # queries by candidates whose scores exist at a time


def hubness(bank: np.ndarray, candidates: np.ndarray, scale: float) -> np.ndarray:
    """log(mean over the bank's queries q of exp(scale * q . c)) / scale, of each candidate c.

    bank, candidates: float32 [Q, E], [M, E], unit length, Q > 0; scale: what cosines are multiplied
    by as logits. Returns float32 [M], as cosines: between the mean and the largest one.
    """
    found = np.empty(len(candidates), np.float32)
    for start in range(0, len(candidates), _TILE):
        some = candidates[start : start + _TILE].T
        total = np.full(some.shape[1], -np.inf)
        for first in range(0, len(bank), _TILE):
            logits = scale * (bank[first : first + _TILE] @ some).astype(np.float64)
            most = logits.max(0)
            total = np.logaddexp(total, most + np.log(np.exp(logits - most).sum(0)))
        found[start : start + _TILE] = (total - np.log(len(bank))) / scale
    return found


def normalised(
    queries: np.ndarray, candidates: np.ndarray, bank: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings whose products are the cosines less the candidates' `hubness`.

    queries: float32 [N, E]; the others as there. Returns float32 [N, E + 1] and [M, E + 1].
    """
    less = -hubness(bank, candidates, scale)
    ones = np.ones((len(queries), 1), np.float32)
    return np.concatenate([queries, ones], 1), np.concatenate([candidates, less[:, None]], 1)
