"""Nearest pictures: exact for some hundred thousand, by a graph (HNSW, usearch) for millions."""

from __future__ import annotations

import os
import pathlib
from typing import Any, Protocol

import numpy as np

from coca_jax import extras, storage

EXACT_BELOW = 100_000  # pictures: every one is compared, in some 10 ms
FILE = "nearest.usearch"
_ROWS = 16_384  # compared at a time
_CONNECTIVITY, _EXPANSION_ADD = 32, 128  # M and efConstruction of Malkov and Yashunin, 2018
_EXPANSION_SEARCH = 384  # efSearch: neighbours that the walk through the graph keeps in mind


class Nearest(Protocol):
    """Finds the pictures of the highest cosine similarity."""

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [Q, E], L2-normalised -> (similarities float32 [Q, k], rows int64 [Q, k]), the
        most similar first; fewer than k where there are fewer pictures."""


class Exact:
    """Every picture is compared. embeddings: float16 [N, E], L2-normalised."""

    def __init__(self, embeddings: np.ndarray):
        self.embeddings = embeddings

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        best = np.zeros((len(queries), 0), np.float32)
        rows = np.zeros((len(queries), 0), np.int64)
        for start in range(0, len(self.embeddings), _ROWS):
            block = self.embeddings[start : start + _ROWS].astype(np.float32)
            numbers = np.arange(start, start + len(block))
            best = np.concatenate([best, queries @ block.T], 1)
            rows = np.concatenate([rows, np.broadcast_to(numbers, (len(rows), len(block)))], 1)
            # Stable: of equal similarities the earlier picture comes first.
            order = np.argsort(-best, axis=1, kind="stable")[:, :k]
            best = np.take_along_axis(best, order, 1)
            rows = np.take_along_axis(rows, order, 1)
        return best, rows


class Graph:
    """A walk through a graph of near pictures, its finds compared exactly.

    embeddings: as of `Exact`; folder: of the index, where the graph lies (`build`).
    """

    def __init__(self, embeddings: np.ndarray, folder: str):
        self.embeddings = embeddings
        path = pathlib.Path(folder) / FILE
        self._graph = _usearch().Index.restore(str(path), view=True)
        if self._graph is None or len(self._graph) != len(embeddings):
            raise ValueError(f"{path} does not belong to these pictures; run `search index` again")
        self._graph.expansion_search = _EXPANSION_SEARCH

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        k = min(k, len(self.embeddings))
        found = self._graph.search(
            np.asarray(queries, np.float16), min(2 * k, len(self.embeddings))
        )
        rows = np.atleast_2d(np.asarray(found.keys, np.int64))
        near = self.embeddings[rows].astype(np.float32)  # [Q, 2k, E]
        similar = np.einsum("qe,qke->qk", queries, near)
        order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(similar, order, 1), np.take_along_axis(rows, order, 1)


def build(embeddings: np.ndarray, folder: str, *, progress: bool = False) -> None:
    """Writes the graph of float16 [N, E] into the folder of an index.

    Raises:
        ValueError: usearch is not installed, or the folder is in a bucket.
    """
    if storage.is_remote(folder):
        raise ValueError(f"--out={folder}: the graph of a large index is read from a local folder")
    graph = _usearch().Index(
        ndim=embeddings.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
    )
    graph.add(np.arange(len(embeddings)), embeddings, log="graph" if progress else False)
    path = pathlib.Path(folder) / FILE
    new = path.with_suffix(".new")
    graph.save(str(new))
    os.replace(new, path)


def _usearch() -> Any:
    try:
        import usearch.index

        return usearch.index
    except ImportError:
        raise ValueError(
            f"an index of more than {EXACT_BELOW} pictures: {extras.remedy('search')}"
        ) from None


def open_nearest(embeddings: np.ndarray, folder: str) -> Nearest:
    """The graph where the folder has one, else exact."""
    place = storage.place(folder) / FILE
    return Graph(embeddings, folder) if place.exists() else Exact(embeddings)
