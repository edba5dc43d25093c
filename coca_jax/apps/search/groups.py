"""Pictures that look alike: duplicates by a threshold, clusters by k-means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.cluster.vq
import scipy.sparse
import scipy.sparse.csgraph

from coca_jax.apps.search.index import Index
from coca_jax.apps.search.nearest import Exact
from coca_jax.runtime import progress as bars

_ROWS = 1024  # compared at a time
_ROUNDING = 1e-6  # of the similarity of two equal vectors
_NEIGHBOURS = 32  # of each picture that a graph is asked for
_ROUNDS = 50  # of k-means at most
_DISTANCES = 1 << 22  # of pictures from centres that are in memory


def duplicates(index: Index, threshold: float, *, progress: bool = False) -> list[list[int]]:
    """Groups of rows that a chain of pairs of cosine similarity >= threshold joins, the largest
    first; a picture without any is in none. Exact, or among each picture's nearest in a graph.

    progress: a bar counts the pictures whose pairs are found.

    Raises:
        ValueError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold={threshold}: a cosine similarity above 0, at most 1")
    count = len(index.embeddings)
    groups = _Groups(count)
    with bars.Bar(count, "pictures", "duplicates", shown=progress) as bar:
        for i, j in _pairs(index, threshold - _ROUNDING, bar.update):
            groups.join(i, j)
    label = groups.labels()
    order = np.argsort(label, kind="stable")
    edges = np.flatnonzero(np.diff(label[order], prepend=-1, append=count))
    several = np.flatnonzero(np.diff(edges) > 1)  # of millions of pictures most are alone
    found = [order[edges[n] : edges[n + 1]].tolist() for n in several]
    return sorted(found, key=lambda group: (-len(group), group[0]))


def similarities(index: Index, rows: list[int]) -> list[float]:
    """Of each picture of a group of duplicates, the cosine to the most similar other one."""
    x, found = _unit(index.embeddings[rows]), []
    for start in range(0, len(x), _ROWS):
        scores = x[start : start + _ROWS] @ x.T
        own = np.arange(len(scores))
        scores[own, own + start] = -1.0  # with itself
        found.append(scores.max(1))
    return [round(float(score), 4) for score in np.concatenate(found)]


def name_clusters(
    index: Index, found: list[dict[str, Any]], model: Any, labels: list[str]
) -> list[str]:
    """The label that is nearest to each cluster's mean, compared with the other clusters' means:
    a label that is near to all pictures names none."""
    means = np.stack([index.embeddings[one["rows"]].astype(np.float32).mean(0) for one in found])
    scores = _unit(means) @ model.encode_text(labels).T  # [clusters, labels]
    return [labels[place] for place in (scores - scores.mean(0)).argmax(1)]


class _Groups:
    """Rows 0 to count - 1, each alone at first. Pairs that are new are kept until they are as many
    as the rows, as to join some goes through all rows."""

    def __init__(self, count: int):
        self._label = np.arange(count, dtype=np.int32)  # of each row its group's, so far
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []

    def join(self, i: np.ndarray, j: np.ndarray) -> None:
        """Pairs of rows, int [n] each, are of one group."""
        i, j = self._label[i], self._label[j]
        new = i != j
        if new.any():
            self._pending.append((i[new], j[new]))
        if sum(len(one) for one, _ in self._pending) >= len(self._label):
            self._merge()

    def labels(self) -> np.ndarray:
        """int32 [count]: equal for rows of one group, from 0 to count - 1."""
        self._merge()
        return self._label

    def _merge(self) -> None:
        if self._pending:
            i, j = (np.concatenate(one) for one in zip(*self._pending))
            self._pending = []
            shape = len(self._label), len(self._label)
            joined = scipy.sparse.coo_matrix((np.ones(len(i), bool), (i, j)), shape)
            of_label = scipy.sparse.csgraph.connected_components(joined, directed=False)[1]
            self._label = of_label[self._label]


def _pairs(
    index: Index, least: float, report: Callable[[int], Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of similar pairs, some at a time: of pictures that are all alike there are N^2. report:
    given the numbers of pictures that were compared."""
    x = index.embeddings
    for start in range(0, len(x), _ROWS):
        queries = _unit(x[start : start + _ROWS])
        if isinstance(index.nearest, Exact):
            for later in range(start, len(x), _ROWS):  # earlier pairs were found from the other row
                i, j = np.nonzero(queries @ _unit(x[later : later + _ROWS]).T >= least)
                yield i + start, j + later
        else:
            near = index.nearest(queries, _NEIGHBOURS)[1]
            i, place = np.nonzero(np.einsum("qe,qke->qk", queries, _unit(x[near])) >= least)
            yield i + start, near[i, place]
        report(len(queries))


def _unit(x: np.ndarray) -> np.ndarray:
    """float16 [..., E], whose length is rounded too, to float32 of length 1."""
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def clusters(index: Index, count: int, seed: int) -> list[dict[str, Any]]:
    """k-means of the embeddings, begun by k-means++ (Arthur and Vassilvitskii, 2007).

    Returns, the largest first: {"rows": the nearest to the centre first}.

    Raises:
        ValueError: fewer pictures than clusters.
    """
    x = index.embeddings.astype(np.float32)
    if not 1 <= count <= len(x):
        raise ValueError(f"--clusters={count} of {len(x)} pictures; give a number from 1 to that")
    centres = _first_centres(x, count, seed)
    chosen = np.full(len(x), -1)
    for _ in range(_ROUNDS):
        before, chosen = chosen, _nearest_centres(x, centres)
        if np.array_equal(before, chosen):
            break
        centres = _means(x, chosen, centres)
    centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    near = np.einsum("ne,ne->n", x, centres[chosen])
    found = []
    for number in range(count):
        rows = np.flatnonzero(chosen == number)
        found.append(dict(rows=rows[np.argsort(-near[rows], kind="stable")].tolist()))
    return sorted((one for one in found if one["rows"]), key=lambda one: -len(one["rows"]))


def _nearest_centres(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Of each row of float32 [N, E] the nearest of float32 [count, E], int [N]. Some rows at a
    time: SciPy holds the distances of all that it is given from all centres."""
    rows = max(_DISTANCES // len(centres), 1)
    found = [
        scipy.cluster.vq.vq(x[start : start + rows], centres)[0] for start in range(0, len(x), rows)
    ]
    return np.concatenate(found)


def _means(x: np.ndarray, chosen: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """float32 [count, E]: of the rows that chose each centre; of none the centre as it was."""
    ones = np.ones(len(x), np.float32)
    shape = len(centres), len(x)
    sums = scipy.sparse.csr_matrix((ones, (chosen, np.arange(len(x)))), shape) @ x
    counts = np.bincount(chosen, minlength=len(centres))[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), centres).astype(np.float32)


def _first_centres(x: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The rows of float32 [N, E] that k-means++ begins with, float32 [count, E]: each drawn by its
    squared distance from the nearest of those before. SciPy draws the same ones, but measures all
    of those before anew for each: count^2 / 2 passes over the pictures in place of count."""
    rng = np.random.RandomState(seed)
    squares = np.einsum("ne,ne->n", x, x)
    chosen, far = [int(rng.randint(len(x)))], np.full(len(x), np.inf)
    while len(chosen) < count:
        last = chosen[-1]
        distance = squares + squares[last] - 2 * (x @ x[last])
        distance[distance < 2 * _ROUNDING] = 0  # of equal pictures it is rounding
        far = np.minimum(far, distance)
        drawn = rng.uniform() * far.sum()
        chosen.append(min(int(np.searchsorted(far.cumsum(), drawn)), len(x) - 1))
    return x[chosen]
