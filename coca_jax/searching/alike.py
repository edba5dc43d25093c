"""Pictures that look alike: duplicates by a threshold, clusters by k-means."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.cluster.vq
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
            later = index.embeddings[start:]  # pairs with earlier pictures were found from those
            blocks = [later[i : i + 16 * _ROWS] for i in range(0, len(later), 16 * _ROWS)]
            similar = np.concatenate([queries @ block.astype(np.float32).T for block in blocks], 1)
            i, j = np.nonzero(similar >= threshold)
            j = j + start
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
    """k-means of the embeddings, begun by k-means++ (Arthur and Vassilvitskii, 2007).

    Returns, the largest first: {"rows": the nearest to the centre first}.

    Raises:
        ValueError: fewer pictures than clusters.
    """
    x = index.embeddings.astype(np.float32)
    if not 1 <= count <= len(x):
        raise ValueError(f"--clusters={count} of {len(x)} pictures; give a number from 1 to that")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of clusters that lost all their pictures: they are left out
        centres, chosen = scipy.cluster.vq.kmeans2(x, count, iter=50, minit="++", seed=seed)
    centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    near = np.einsum("ne,ne->n", x, centres[chosen])
    found = []
    for number in range(count):
        rows = np.flatnonzero(chosen == number)
        found.append(dict(rows=rows[np.argsort(-near[rows], kind="stable")].tolist()))
    return sorted((one for one in found if one["rows"]), key=lambda one: -len(one["rows"]))
