"""Pictures that look alike: duplicates by a threshold, clusters by k-means."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from coca_jax.searching.index import Index
from coca_jax.searching.nearest import Exact

_ROWS = 1024  # compared at a time
_NEIGHBOURS = 32  # of each picture that a graph is asked for


def duplicates(index: Index, threshold: float) -> list[list[int]]:
    """Groups of rows that a chain of pairs of cosine similarity >= threshold joins, the largest
    first; a picture without any is in none. Exact, or among each picture's nearest in a graph.

    Raises:
        ValueError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold={threshold}: a cosine similarity above 0, at most 1")
    count = len(index.embeddings)
    left, right = [], []
    for start in range(0, count, _ROWS):
        queries = index.embeddings[start : start + _ROWS].astype(np.float32)
        if isinstance(index.nearest, Exact):
            # The products of a pair are the same from both sides: half of them would do.
            rows = [index.embeddings[i : i + 16 * _ROWS] for i in range(0, count, 16 * _ROWS)]
            similar = np.concatenate([queries @ block.astype(np.float32).T for block in rows], 1)
            i, j = np.nonzero(similar >= threshold)
        else:
            similar, near = index.nearest(queries, _NEIGHBOURS)
            i, place = np.nonzero(similar >= threshold)
            j = near[i, place]
        left.append(i + start)
        right.append(j)
    if not count:
        return []
    i, j = np.concatenate(left), np.concatenate(right)
    pairs = scipy.sparse.coo_matrix((np.ones(len(i), bool), (i, j)), (count, count))
    _, label = scipy.sparse.csgraph.connected_components(pairs, directed=False)
    order = np.argsort(label, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    found: list[list[int]] = [group.tolist() for group in groups if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group[0]))


def clusters(index: Index, count: int, seed: int) -> list[dict[str, Any]]:
    """k-means on the sphere (Dhillon and Modha, 2001): each step gives a picture to its nearest
    centre and makes the centre the mean of its pictures, L2-normalised.

    Returns, the largest first: {"rows": the nearest to the centre first}.

    Raises:
        ValueError: fewer pictures than clusters.
    """
    x = index.embeddings.astype(np.float32)
    if not 1 <= count <= len(x):
        raise ValueError(f"--clusters={count} of {len(x)} pictures; give a number from 1 to that")
    centres = x[_spread(x, count, np.random.default_rng(seed))]
    chosen = np.full(len(x), -1)
    for _ in range(100):
        now = np.argmax(x @ centres.T, axis=1)
        if np.array_equal(now, chosen):
            break
        chosen = now
        sums = np.zeros_like(centres)
        np.add.at(sums, chosen, x)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centres)
    near = np.einsum("ne,ne->n", x, centres[chosen])
    found = []
    for number in range(count):
        rows = np.flatnonzero(chosen == number)
        found.append(dict(rows=rows[np.argsort(-near[rows], kind="stable")].tolist()))
    return sorted((one for one in found if one["rows"]), key=lambda one: -len(one["rows"]))


def _spread(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows to begin from, far from each other (k-means++, Arthur and Vassilvitskii, 2007)."""
    rows = [int(rng.integers(len(x)))]
    distance = np.full(len(x), np.inf, np.float32)
    for _ in range(count - 1):
        distance = np.minimum(distance, np.maximum(1 - x @ x[rows[-1]], 0))
        total = float(distance.sum())
        share = distance / total if total > 0 else np.full(len(x), 1 / len(x))
        rows.append(int(rng.choice(len(x), p=share / share.sum())))
    return np.array(rows)
