"""Retrieval ranks among millions of candidates, computed in tiles of the similarity matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

TIE = 1e-6  # scores closer than this are equal: float32 products differ by about 1e-7
_NO_MESH = Mesh(np.empty((), object), ())  # each tile is on a single device


def retrieval_ranks(
    images: np.ndarray, texts: np.ndarray, pairs: np.ndarray, *, chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rank (0: first) of the best match of each image [N] and of each text [M], int64.

    The rank is the number of non-matching candidates whose score is at least that of the best
    match, so ties count against the model. Only tiles of `chunk` x `chunk` of the similarity matrix
    are in memory. Processes and their devices share the tiles; every process passes the same
    arguments and gets all ranks.

    Args:
      images: float32 [N, E].
      texts: float32 [M, E], distinct texts.
      pairs: int [P, 2], (image, text) indices of the matches. An image or text without a match gets
        rank -1.
      chunk: side of a tile.
    """
    n, m = len(images), len(texts)
    pairs = np.unique(np.asarray(pairs, np.int64).reshape(-1, 2), axis=0)
    best_of_image, best_of_text = _best_scores(images, texts, pairs, chunk)
    has_image, has_text = np.isfinite(best_of_image), np.isfinite(best_of_text)

    side_n, side_m = min(chunk, n), min(chunk, m)
    blocks = -(-m // side_m)
    image_ranks, text_ranks = np.zeros(n, np.int64), np.zeros(m, np.int64)
    tile_of = (pairs[:, 0] // side_n) * blocks + pairs[:, 1] // side_m
    order = np.argsort(tile_of, kind="stable")
    tile_of, pairs = tile_of[order], pairs[order]
    # Each process handles a share of the rows of tiles, one row per device at a time. The counts of
    # a tile are fetched while the next one runs.
    devices = jax.local_devices()
    starts = range(0, n, side_n)[jax.process_index() :: jax.process_count()]
    with jax.set_mesh(_NO_MESH):
        for group in range(0, len(starts), len(devices)):
            left = []
            for device, start_n in zip(devices, starts[group : group + len(devices)]):
                rows = slice(start_n, min(start_n + side_n, n))
                limits = _pad(best_of_image[rows] - TIE, side_n, np.inf)
                tile = jax.device_put((_pad(images[rows], side_n, 0.0), limits), device)
                left.append((device, rows, tile))
            running: list = []
            for start_m in range(0, m, side_m):
                columns = slice(start_m, min(start_m + side_m, m))
                tile_texts = _pad(texts[columns], side_m, 0.0)
                column_limits = _pad(best_of_text[columns] - TIE, side_m, np.inf)
                launched = []
                for device, rows, tile in left:
                    number = (rows.start // side_n) * blocks + start_m // side_m
                    low, high = np.searchsorted(tile_of, [number, number + 1])
                    inside = _inside(pairs[low:high], rows.start, start_m, side_n + side_m)
                    others = (tile_texts, column_limits, inside)
                    sizes = (rows.stop - rows.start, columns.stop - columns.start)
                    counts = _count_tile(*tile, *jax.device_put(others, device), *sizes)
                    launched.append((rows, columns, counts))
                _collect(running, image_ranks, text_ranks)
                running = launched
            _collect(running, image_ranks, text_ranks)
    image_ranks, text_ranks = _over_processes(image_ranks, text_ranks)
    return np.where(has_image, image_ranks, -1), np.where(has_text, text_ranks, -1)


def _best_scores(
    images: np.ndarray, texts: np.ndarray, pairs: np.ndarray, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the score of the best match of each image [N] and text [M]; -inf without a match."""
    score = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), chunk):
        i, j = pairs[start : start + chunk].T
        score[start : start + chunk] = np.einsum("pe,pe->p", images[i], texts[j])
    best_of_image = np.full(len(images), -np.inf, np.float32)
    best_of_text = np.full(len(texts), -np.inf, np.float32)
    np.maximum.at(best_of_image, pairs[:, 0], score)
    np.maximum.at(best_of_text, pairs[:, 1], score)
    return best_of_image, best_of_text


def _inside(pairs: np.ndarray, row: int, column: int, beyond: int) -> np.ndarray:
    """Returns the matches in a tile relative to its corner (row, column): int32 [P', 2], padded
    with `beyond`, which is out of range and ignored."""
    inside = (pairs - [row, column]).astype(np.int32)
    # Pad to a power of two to compile few shapes.
    return _pad(inside, max(1024, 1 << len(pairs).bit_length()), beyond)


def _collect(launched: list, image_ranks: np.ndarray, text_ranks: np.ndarray) -> None:
    """Adds the counts of the launched tiles to the ranks; waits for tiles that still run."""
    for rows, columns, (by_row, by_column) in launched:
        image_ranks[rows] += np.asarray(by_row)[: rows.stop - rows.start]
        text_ranks[columns] += np.asarray(by_column)[: columns.stop - columns.start]


def _over_processes(
    image_ranks: np.ndarray, text_ranks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums the counts over processes."""
    if jax.process_count() == 1:
        return image_ranks, text_ranks
    both = np.concatenate([image_ranks, text_ranks]).astype(np.int32)
    both = multihost_utils.process_allgather(both).sum(0, dtype=np.int64)
    return both[: len(image_ranks)], both[len(image_ranks) :]


def _pad(x: np.ndarray, length: int, value: float) -> np.ndarray:
    missing = length - len(x)
    if not missing:
        return x
    return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=value)


@jax.jit
def _count_tile(
    images: jax.Array,
    row_limits: jax.Array,
    texts: jax.Array,
    column_limits: jax.Array,
    matches: jax.Array,
    num_rows: int,
    num_columns: int,
) -> tuple[jax.Array, jax.Array]:
    """Counts, per row and per column, the non-matching scores that reach the limits."""
    # By default, accelerators multiply float32 at lower precision, which would change ranks.
    scores = jnp.einsum("ne,me->nm", images, texts, precision="highest")
    real = (jnp.arange(scores.shape[0]) < num_rows)[:, None] & (
        jnp.arange(scores.shape[1]) < num_columns
    )
    # Exclude padding and matches from the counts.
    scores = jnp.where(real, scores, -jnp.inf)
    scores = scores.at[matches[:, 0], matches[:, 1]].set(-jnp.inf, mode="drop")
    by_row = jnp.isfinite(scores) & (scores >= row_limits[:, None])
    by_column = jnp.isfinite(scores) & (scores >= column_limits[None, :])
    return by_row.sum(1), by_column.sum(0)
