"""Image-text retrieval in both directions: R@1, R@5, R@10, mean recall, median rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.evaluators import (
    Predictor,
    Record,
    check_finite,
    encode_texts,
    in_batches,
    stack_images,
)
from coca_jax.evaluators.intervals import with_interval
from coca_jax.evaluators.results import encode_png, thumbnail

TIE = 1e-6  # scores closer than this are equal: float32 products differ by about 1e-7
_CUTOFFS = (1, 5, 10)
_KEPT_IMAGES = 1_000  # pictures that the report's text queries search


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
    memory grows with N + M, and a million images by a million texts fit.

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
    image_ranks, text_ranks = np.zeros(n, np.int64), np.zeros(m, np.int64)
    tile_of = (pairs[:, 0] // side_n) * -(-m // side_m) + pairs[:, 1] // side_m
    order = np.argsort(tile_of, kind="stable")
    tile_of, pairs = tile_of[order], pairs[order]
    for a, start_n in enumerate(range(0, n, side_n)):
        rows = slice(start_n, min(start_n + side_n, n))
        tile_images = jnp.asarray(_pad(images[rows], side_n, 0.0))
        row_limits = jnp.asarray(_pad(best_of_image[rows] - TIE, side_n, np.inf))
        for b, start_m in enumerate(range(0, m, side_m)):
            columns = slice(start_m, min(start_m + side_m, m))
            tile = a * -(-m // side_m) + b
            low, high = np.searchsorted(tile_of, [tile, tile + 1])
            inside = pairs[low:high] - [start_n, start_m]
            # A power of two of matches, so that few shapes are compiled; out of range is dropped.
            padded = _pad(inside, max(1024, 1 << int(high - low).bit_length()), side_n + side_m)
            by_row, by_column = _count_tile(
                tile_images,
                row_limits,
                jnp.asarray(_pad(texts[columns], side_m, 0.0)),
                jnp.asarray(_pad(best_of_text[columns] - TIE, side_m, np.inf)),
                jnp.asarray(padded, jnp.int32),
                rows.stop - rows.start,
                columns.stop - columns.start,
            )
            image_ranks[rows] += np.asarray(by_row)[: rows.stop - rows.start]
            text_ranks[columns] += np.asarray(by_column)[: columns.stop - columns.start]
    return np.where(has_image, image_ranks, -1), np.where(has_text, text_ranks, -1)


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

    Equal texts are one candidate, and each image that has the text is a right answer to it: data
    with repeated captions is not scored as if one copy were right and the other wrong.
    """

    def __init__(
        self,
        data_name: str,
        *,
        extra_texts: Sequence[str] = (),
        batch_size: int = 256,
        chunk: int = 4096,
        num_examples: int = 8,
    ):
        self.name = f"retrieval/{data_name}"
        self.extra_texts = list(extra_texts)
        self.batch_size, self.chunk, self.num_examples = batch_size, chunk, num_examples
        self.examples: dict[str, Any] = {}

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields image_to_text_r1 and so on, text_to_image_r1, mean_recall, and their intervals.

        A record needs `image` and `text`, one caption or several (any of them is right); one
        without raises ValueError. Every caption is a query of text-to-image. The intervals take
        queries as independent. Afterwards `examples` holds queries and what they found.
        """
        numbers: dict[str, int] = {}
        pairs: list[tuple[int, int]] = []
        parts: list[np.ndarray] = []
        kept: list[np.ndarray] = []
        count = 0
        for batch in in_batches(records, self.batch_size):
            images = stack_images(batch)
            parts.append(np.asarray(predict.encode_image(images), np.float32))
            for image, record in zip(images, batch):
                texts = record["text"]
                texts = [texts] if isinstance(texts, str) else list(texts or ())
                if not texts:
                    raise ValueError(
                        f"record {record.get('key', count)} has no text; {self.name} needs one"
                    )
                pairs.extend((count, numbers.setdefault(t, len(numbers))) for t in texts)
                if len(kept) < _KEPT_IMAGES:
                    kept.append(thumbnail(image))
                count += 1
        if not count:
            raise ValueError(f"{self.name} has no record; check the data set and its split")
        for text in self.extra_texts:
            numbers.setdefault(text, len(numbers))
        texts = list(numbers)
        image_embeddings = check_finite(np.concatenate(parts), "image")
        text_embeddings = encode_texts(predict, texts, self.batch_size)
        matches = np.asarray(pairs, np.int64)
        image_ranks, text_ranks = retrieval_ranks(
            image_embeddings, text_embeddings, matches, chunk=self.chunk
        )
        self.examples = self._examples(image_embeddings, text_embeddings, texts, matches, kept)
        query_ranks = text_ranks[matches[:, 1]]
        recalls = []
        for direction, ranks in (("image_to_text", image_ranks), ("text_to_image", query_ranks)):
            for k in _CUTOFFS:
                recalls.append(float((ranks < k).mean()))
                yield from with_interval(f"{self.name}/{direction}_r{k}", ranks < k)
            yield f"{self.name}/{direction}_median_rank", float(np.median(ranks)) + 1
        yield f"{self.name}/mean_recall", float(np.mean(recalls))
        yield f"{self.name}/num_images", float(count)
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
