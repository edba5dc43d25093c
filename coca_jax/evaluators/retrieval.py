"""Image-text retrieval in both directions: R@1, R@5, R@10, mean recall, median rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from coca_jax.evaluators import (
    Predictor,
    Record,
    check_finite,
    encode_texts,
    in_batches,
    record_texts,
    stack_images,
)
from coca_jax.evaluators.intervals import limits, median_limits, resampled_sums, scored
from coca_jax.evaluators.results import encode_png, picture

TIE = 1e-6  # scores closer than this are equal: float32 products differ by about 1e-7
_CUTOFFS = (1, 5, 10)
_KEPT_IMAGES = 1_000  # pictures that the report's text queries search
_NO_MESH = Mesh(np.empty((), object), ())  # tiles belong to one device each


def retrieval_ranks(
    images: np.ndarray,
    texts: np.ndarray,
    pairs: np.ndarray,
    *,
    chunk: int = 4096,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rank (0: first) of the best match of each image and of each text, int64.

    A rank is the number of candidates that do not match and score no less than the best match, so
    ties count against the model. The similarity matrix exists only in tiles of `chunk` x `chunk`:
    memory grows with N + M, and a million images by a million texts fit. Tiles are shared among
    processes and their devices; every process needs the same arguments and gets all ranks.

    Args:
      images: float32 [N, E].
      texts: float32 [M, E], distinct texts.
      pairs: int [P, 2], (image, text) indices that match; all others do not. An image or text
        without a match gets rank -1.
      chunk: side of a tile.
    """
    n, m = len(images), len(texts)
    pairs = np.unique(np.asarray(pairs, np.int64).reshape(-1, 2), axis=0)
    score = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), chunk):
        i, j = pairs[start : start + chunk].T
        score[start : start + chunk] = np.einsum("pe,pe->p", images[i], texts[j])
    best_of_image = np.full(n, -np.inf, np.float32)
    best_of_text = np.full(m, -np.inf, np.float32)
    np.maximum.at(best_of_image, pairs[:, 0], score)
    np.maximum.at(best_of_text, pairs[:, 1], score)
    has_image, has_text = np.isfinite(best_of_image), np.isfinite(best_of_text)

    side_n, side_m = min(chunk, n), min(chunk, m)
    blocks = -(-m // side_m)
    image_ranks, text_ranks = np.zeros(n, np.int64), np.zeros(m, np.int64)
    tile_of = (pairs[:, 0] // side_n) * blocks + pairs[:, 1] // side_m
    order = np.argsort(tile_of, kind="stable")
    tile_of, pairs = tile_of[order], pairs[order]

    def collect(launched: list[tuple[slice, slice, tuple[jax.Array, jax.Array]]]) -> None:
        for rows, columns, (by_row, by_column) in launched:
            image_ranks[rows] += np.asarray(by_row)[: rows.stop - rows.start]
            text_ranks[columns] += np.asarray(by_column)[: columns.stop - columns.start]

    # Every process takes its share of the rows of tiles, each of its devices one at a time. A step
    # is one tile a device; its counts are fetched while the next one runs.
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
                    inside = (pairs[low:high] - [rows.start, start_m]).astype(np.int32)
                    # A power of two of matches, so that few shapes are compiled; out of range is
                    # dropped.
                    length = max(1024, 1 << int(high - low).bit_length())
                    others = (tile_texts, column_limits, _pad(inside, length, side_n + side_m))
                    sizes = (rows.stop - rows.start, columns.stop - columns.start)
                    counts = _count_tile(*tile, *jax.device_put(others, device), *sizes)
                    launched.append((rows, columns, counts))
                collect(running)
                running = launched
            collect(running)
    if jax.process_count() > 1:
        both = np.concatenate([image_ranks, text_ranks]).astype(np.int32)
        both = multihost_utils.process_allgather(both).sum(0, dtype=np.int64)
        image_ranks, text_ranks = both[:n], both[n:]
    return np.where(has_image, image_ranks, -1), np.where(has_text, text_ranks, -1)


def _digest(image: Any) -> bytes:
    """Tells images by content: encoded bytes, or an array."""
    data = image.tobytes() if isinstance(image, np.ndarray) else bytes(image)
    return hashlib.blake2b(data, digest_size=16).digest()


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
    """Counts by row and by column the scores at or over the limits, matches and padding apart."""
    # Accelerators multiply float32 at lower precision unless told otherwise; ranks need it exact.
    scores = jnp.einsum("ne,me->nm", images, texts, precision="highest")
    real = (jnp.arange(scores.shape[0]) < num_rows)[:, None] & (
        jnp.arange(scores.shape[1]) < num_columns
    )
    scores = jnp.where(real, scores, -jnp.inf)
    scores = scores.at[matches[:, 0], matches[:, 1]].set(-jnp.inf, mode="drop")
    by_row = jnp.isfinite(scores) & (scores >= row_limits[:, None])
    by_column = jnp.isfinite(scores) & (scores >= column_limits[None, :])
    return by_row.sum(1), by_column.sum(0)


class Retrieval:
    """Finds the text of an image and the image of a text.

    Args:
      data_name: of the data set, the second part of the metrics' names.
      extra_texts: candidates that belong to no image, e.g. all names a model might know.
      batch_size: images or texts at a time.
      chunk: side of a tile of the similarity matrix.
      num_examples: queries of each direction kept for the report.
      progress: shows bars.

    Equal texts are one candidate and images of equal content are one candidate: no model can tell
    copies apart, so each image that has the text is a right answer to it and the other way round.
    Candidates that differ but score within 1e-6 of the right one are ranked before it.
    """

    def __init__(
        self,
        data_name: str,
        *,
        extra_texts: Sequence[str] = (),
        batch_size: int = 256,
        chunk: int = 4096,
        num_examples: int = 8,
        progress: bool = False,
    ):
        self.name = f"retrieval/{data_name}"
        self.extra_texts = list(extra_texts)
        self.batch_size, self.chunk, self.num_examples = batch_size, chunk, num_examples
        self.progress = progress
        self.examples: dict[str, Any] = {}

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields image_to_text_r1 and so on, text_to_image_r1, mean_recall, and their intervals.

        A record needs `image` and `text`, one caption or several (any of them is right); one
        without raises ValueError. Every record is a query of image-to-text, every caption of every
        record one of text-to-image. The bootstrap draws records with all their captions, as those
        are not independent. Afterwards `examples` holds queries and what they found.
        """
        show = self.name if self.progress else ""
        text_numbers: dict[str, int] = {}
        image_numbers: dict[bytes, int] = {}
        image_of: list[int] = []  # of each record
        texts_of: list[list[int]] = []
        parts: list[np.ndarray] = []
        kept: list[np.ndarray] = []
        for batch in in_batches(records, self.batch_size, show=show and f"{show} images"):
            new = []
            for record in batch:
                texts = record_texts(record, self.name)
                texts_of.append([text_numbers.setdefault(t, len(text_numbers)) for t in texts])
                digest = _digest(record["image"])
                if digest not in image_numbers:
                    image_numbers[digest] = len(image_numbers)
                    new.append(record)
                image_of.append(image_numbers[digest])
            if new:
                parts.append(np.asarray(predict.encode_image(stack_images(new)), np.float32))
            for record in new[: max(_KEPT_IMAGES - len(kept), 0)]:
                kept.append(picture(record["image"]))
        if not image_of:
            raise ValueError(f"{self.name} has no record; check the data set and its split")
        for text in self.extra_texts:
            text_numbers.setdefault(text, len(text_numbers))
        texts = list(text_numbers)
        image_embeddings = check_finite(np.concatenate(parts), "image")
        text_embeddings = encode_texts(
            predict, texts, self.batch_size, show=show and f"{show} texts"
        )
        counts = np.asarray([len(numbers) for numbers in texts_of])
        record_of = np.repeat(np.arange(len(counts)), counts)  # of each caption
        caption = np.concatenate([np.asarray(numbers, np.int64) for numbers in texts_of])
        matches = np.stack([np.asarray(image_of)[record_of], caption], 1)
        image_ranks, text_ranks = retrieval_ranks(
            image_embeddings, text_embeddings, matches, chunk=self.chunk
        )
        self.examples = self._examples(image_embeddings, text_embeddings, texts, matches, kept)
        by_direction = dict(
            image_to_text=(image_ranks[image_of], np.arange(len(counts))),
            text_to_image=(text_ranks[caption], record_of),
        )
        # What each record adds to: hits at each cut-off in each direction, and queries.
        hits = np.stack(
            [
                np.bincount(owner, ranks < k, minlength=len(counts))
                for ranks, owner in by_direction.values()
                for k in _CUTOFFS
            ],
            1,
        )
        stats = np.concatenate([hits, np.ones((len(counts), 1)), counts[:, None]], 1)
        drawn = resampled_sums(stats)
        shares = [
            np.concatenate([s[:, :3] / s[:, 6:7], s[:, 3:6] / s[:, 7:8]], 1)
            for s in (stats.sum(0, keepdims=True), drawn)
        ]
        names = [f"{direction}_r{k}" for direction in by_direction for k in _CUTOFFS]
        queries = [len(counts)] * 3 + [len(caption)] * 3
        for column, (metric, number) in enumerate(zip(names, queries)):
            value = shares[0][0, column]
            interval = limits(shares[1][:, column])
            yield from scored(f"{self.name}/{metric}", value, interval, number)
        for direction, (ranks, _) in by_direction.items():
            low, high = median_limits(ranks)
            metric = f"{self.name}/{direction}_median_rank"
            yield from scored(metric, np.median(ranks) + 1, (low + 1, high + 1), len(ranks))
        means = [s.mean(1) for s in shares]
        yield from scored(
            f"{self.name}/mean_recall", means[0][0], limits(means[1]), len(counts) + len(caption)
        )
        yield f"{self.name}/num_images", float(len(image_embeddings))
        yield f"{self.name}/num_texts", float(len(texts))

    def _examples(
        self,
        image_embeddings: np.ndarray,
        text_embeddings: np.ndarray,
        texts: list[str],
        matches: np.ndarray,
        kept: list[np.ndarray],
    ) -> dict[str, Any]:
        of_image: dict[int, set[int]] = {}
        for i, t in matches[matches[:, 0] < len(kept)].tolist():
            of_image.setdefault(i, set()).add(t)
        spread = np.unique(np.linspace(0, len(kept) - 1, self.num_examples).astype(int))
        items, text_items = [], []
        for i in spread.tolist():
            scores = text_embeddings @ image_embeddings[i]
            found = [
                dict(text=texts[t], score=float(scores[t]), correct=t in of_image[i])
                for t in np.argsort(-scores, kind="stable")[:5].tolist()
            ]
            truth = [texts[t] for t in sorted(of_image[i])]
            items.append(dict(image=encode_png(kept[i]), truth=truth, texts=found))
            query = min(of_image[i])
            scores = image_embeddings[: len(kept)] @ text_embeddings[query]
            images = [
                dict(
                    image=encode_png(kept[j]), score=float(scores[j]), correct=query in of_image[j]
                )
                for j in np.argsort(-scores, kind="stable")[:5].tolist()
            ]
            text_items.append(dict(text=texts[query], images=images))
        searched = f"{len(kept):,} of {len(image_embeddings):,} images"
        return dict(kind="retrieval", items=items, text_items=text_items, searched=searched)
