"""Nearest pictures: exact for some hundred thousand, by a graph (HNSW, usearch) for millions."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any, Protocol

import numpy as np
from absl import logging

from coca_jax.runtime import extras, storage
from coca_jax.runtime import progress as bars

EXACT_BELOW = 100_000  # pictures: every one is compared, in some 10 ms
FILE = "nearest.usearch"
_ROWS = 16_384  # converted at a time
_SCORES = 1 << 24  # similarities in memory
_FLOAT32_BYTES = 1 << 31  # of float32 embeddings in memory
_CONNECTIVITY, _EXPANSION_ADD = 32, 128  # M and efConstruction of Malkov and Yashunin, 2018
_EXPANSION_SEARCH = 2048  # efSearch: neighbours that the walk through the graph keeps in mind
_CANDIDATES = 4  # times k that the walk finds, of which exact comparison takes k
_MOST = _EXPANSION_SEARCH // _CANDIDATES  # pictures that a walk is asked for
_ISLAND = 2 * _CONNECTIVITY  # pictures nearly alike that have all their links among themselves
_ALIKE = 0.98  # cosine from which on pictures may make an island; seen from 0.985 on
_LARGEST = 6.0  # of a component that 8 bits hold, in root mean squares of a unit vector's
_ADDED = 50_000  # vectors at a time
_COMPARED = 1000  # vectors that tell whether a graph belongs to the first rows of an index


class Nearest(Protocol):
    """Finds the pictures of the highest cosine similarity."""

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [Q, E], L2-normalised -> (similarities float32 [Q, k], rows int64 [Q, k]), the
        most similar first; fewer than k where there are fewer pictures."""


class Exact:
    """Every picture is compared. embeddings: float16 or float32 [N, E], L2-normalised."""

    def __init__(self, embeddings: np.ndarray):
        self.embeddings = embeddings

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        size = max(1, _SCORES // max(len(self.embeddings), 1))
        best, rows = [], []
        for start in range(0, max(len(queries), 1), size):
            scores = self._scores(queries[start : start + size])
            rows.append(_highest(scores, k))
            best.append(np.take_along_axis(scores, rows[-1], 1))
        return np.concatenate(best), np.concatenate(rows)

    def _scores(self, queries: np.ndarray) -> np.ndarray:
        if self._float32 is not None:
            return (self._float32 @ queries.T).T
        x = self.embeddings
        blocks = [x[start : start + _ROWS] for start in range(0, len(x), _ROWS)]
        return np.concatenate([queries @ block.astype(np.float32).T for block in blocks], 1)

    @functools.cached_property
    def _float32(self) -> np.ndarray | None:
        """Converting float16 takes ten times as long as comparing: it is done once, where it fits."""
        fits = 4 * self.embeddings.size <= _FLOAT32_BYTES
        return self.embeddings.astype(np.float32) if fits else None


def _highest(values: np.ndarray, k: int) -> np.ndarray:
    """The places of the k highest of each row of float32 [Q, N], int64 [Q, k or N], the highest
    first; of equal values the earlier comes first. A whole sort takes ten times as long: it is left
    to rows with more of the k-th value than there is room for, as of pictures that are there
    twice."""
    if values.shape[1] <= k or not k:
        return np.argsort(-values, axis=1, kind="stable")[:, :k]
    least = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]
    there = values >= least
    plain = there.sum(1) == k
    places = np.empty((len(values), k), np.int64)
    places[plain] = np.nonzero(there[plain])[1].reshape(-1, k)
    places[plain] = np.take_along_axis(
        places[plain],
        np.argsort(-np.take_along_axis(values[plain], places[plain], 1), axis=1, kind="stable"),
        1,
    )
    places[~plain] = np.argsort(-values[~plain], axis=1, kind="stable")[:, :k]
    return places


class OfOthers(ValueError):
    """A graph is of other pictures than those of the index."""


class Graph:
    """A walk through a graph of near pictures, its finds compared exactly.

    The graph holds the embeddings in 8 bits: that halves what the walk reads, and of four times k
    pictures that it finds the exact comparison takes k. The whole of it is in memory: NumPy asks
    for huge pages there, and a walk, which looks at some 20,000 places of a graph of gigabytes,
    takes a fifth less than over a mapped file. Where a walk ends with fewer pictures than it was to
    find, as among many equal ones, every picture is compared; also where more than _MOST are asked
    for, as a walk that gives all that it keeps in mind misses some, and where it found an island
    (`_leaves_island`). So are those behind the graph's last row: while an index grows, and where
    that was stopped, it has more pictures than its graph.

    embeddings: as of `Exact`; folder: of the index, where the graph lies (`build`).

    Raises OfOthers, and ValueError for a damaged file.
    """

    def __init__(self, embeddings: np.ndarray, folder: str):
        self.embeddings = embeddings
        path = pathlib.Path(folder) / FILE
        self._bytes = np.fromfile(path, np.uint8)  # the graph looks into it
        self._graph = _opened(path, embeddings, self._bytes)
        if self._graph is None:
            raise OfOthers(f"{path} does not belong to these pictures")
        self._graph.expansion_search = _EXPANSION_SEARCH

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if k > _MOST:
            return Exact(self.embeddings)(queries, k)
        count = len(self._graph)
        best, rows = self._of_graph(queries, min(k, count))
        if count == len(self.embeddings):
            return best, rows
        more, beyond = Exact(self.embeddings[count:])(queries, k)
        best = np.concatenate([best, more], 1)
        rows = np.concatenate([rows, beyond + count], 1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)

    def _of_graph(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As a call, of the pictures of the graph; k: so many at most."""
        held = self.embeddings[: len(self._graph)]
        wanted = min(_CANDIDATES * k, len(held))
        found = self._graph.search(_coarse(queries), wanted)
        # Of one query usearch gives what there is, of several it fills up with the row 0.
        counts = found.counts if len(queries) > 1 else np.array([len(found.keys)])
        best, rows = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
        whole = counts == wanted
        if whole.any():
            keys = np.atleast_2d(np.asarray(found.keys, np.int64))[whole]
            near = held[keys].astype(np.float32)  # [Q, 4k, E]
            similar = np.einsum("qe,qke->qk", queries[whole], near)
            order = np.argsort(-similar, axis=1, kind="stable")
            best[whole] = np.take_along_axis(similar, order[:, :k], 1)
            rows[whole] = np.take_along_axis(keys, order[:, :k], 1)
            if k > _ISLAND:
                left = [_leaves_island(one[places], k) for one, places in zip(near, order)]
                whole[whole] = ~np.array(left)
        if not whole.all():
            best[~whole], rows[~whole] = Exact(held)(queries[~whole], k)
        return best, rows


def _leaves_island(found: np.ndarray, k: int) -> bool:
    """Whether k pictures are more than what a walk found of many that are nearly alike, of which
    there may be more. Thousands of such pictures are linked to each other alone, in islands of some
    150 to 600: a walk sees no other one, and fills up with what is far less similar.

    found: float32 [n, E], what the walk found, the most similar to the query first, which places
    those that are nearly alike side by side.
    """
    alike = np.einsum("ne,ne->n", found[1:], found[:-1]) >= _ALIKE
    return int(alike.sum()) >= _ISLAND and not bool(alike[: k - 1].all())


def build(embeddings: np.ndarray, folder: str, *, progress: bool = False) -> None:
    """Writes the graph of float16 [N, E] into the folder of an index. Where it has the graph of the
    first rows, the others are added to that.

    Raises:
        ValueError: usearch is not installed, or the folder is in a bucket.
    """
    if storage.is_remote(folder):
        raise ValueError(f"--out={folder}: the graph of a large index is read from a local folder")
    path = pathlib.Path(folder) / FILE
    graph = _opened(path, embeddings) if path.exists() else None
    if graph is None:
        graph = _usearch().Index(
            ndim=embeddings.shape[1],
            metric="ip",
            dtype="i8",
            connectivity=_CONNECTIVITY,
            expansion_add=_EXPANSION_ADD,
        )
    if len(graph) == len(embeddings):
        return  # of this very index
    with bars.Bar(len(embeddings) - len(graph), "pictures", "graph", shown=progress) as bar:
        for start in range(len(graph), len(embeddings), _ADDED):
            rows = np.arange(start, min(start + _ADDED, len(embeddings)))
            graph.add(rows, _coarse(embeddings[rows]))
            bar.update(len(rows))
    new = path.with_suffix(".new")
    graph.save(str(new))
    os.replace(new, path)


def _coarse(embeddings: np.ndarray) -> np.ndarray:
    """Unit vectors [N, E] in 8 bits. usearch's own cast makes 1.0 the largest value, which leaves
    a component of 512 some ten steps."""
    scale = 127 * embeddings.shape[-1] ** 0.5 / _LARGEST
    return np.clip(np.rint(np.float32(embeddings) * scale), -127, 127).astype(np.int8)


def _opened(path: pathlib.Path, embeddings: np.ndarray, held: np.ndarray | None = None) -> Any:
    """The graph of a file; None for one of another kind, or of other embeddings. held: the file's
    bytes, uint8 [n], into which a graph that is only read looks: they must outlive it."""
    usearch = _usearch()
    try:
        graph = usearch.Index.restore(str(path) if held is None else held, view=held is not None)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it and run the same `search index` again"
        ) from None
    width = embeddings.shape[1]
    if graph is None or (graph.dtype, graph.ndim) != (usearch.ScalarKind.I8, width):
        return None
    if not 0 < len(graph) <= len(embeddings):
        return None
    rows = np.unique(np.linspace(0, len(graph) - 1, _COMPARED).astype(int))
    there = graph.contains(rows).all() and graph.get(rows)
    same = there is not False and np.array_equal(there, _coarse(embeddings[rows]))
    return graph if same else None


def _usearch() -> Any:
    try:
        import usearch.index

        return usearch.index
    except ImportError:
        raise ValueError(
            f"an index of more than {EXACT_BELOW} pictures: {extras.remedy('search')}"
        ) from None


def open_nearest(embeddings: np.ndarray, folder: str) -> Nearest:
    """The graph where the folder has one, else exact: also where that is of the rows from before
    some were dropped, and not built anew yet."""
    if not (storage.place(folder) / FILE).exists():
        return Exact(embeddings)
    try:
        return Graph(embeddings, folder)
    except OfOthers as error:
        logging.warning(
            "%s: each of them is compared with a query, until the same `search index` ends", error
        )
        return Exact(embeddings)
