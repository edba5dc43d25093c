"""A map of pictures: their embeddings on the two axes along which they differ most."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from coca_jax.evaluators.results import Spread, picture

POINTS = 240  # of a map; more would hide each other
SIZE = 40  # pixels of a side of a thumbnail
_COLUMNS = 16


class PictureMap:
    """Collects pictures evenly spread over a stream, for a map of them.

    Args:
      count: the most that are kept; 0: none.
    """

    def __init__(self, count: int = POINTS):
        self._kept = Spread(count)

    def add(
        self,
        images: Sequence[Any],
        embeddings: np.ndarray,
        texts: Sequence[str],
        right: Sequence[bool],
    ) -> None:
        """Takes images as records hold them, their embeddings float [N, E], what they show, and
        whether the model found it."""
        for image, row, text, good in zip(images, embeddings, texts, right):
            self._kept.offer(functools.partial(_kept, image, row, text, good))

    def found(self) -> dict[str, Any]:
        """dict(points, texts, right, sheet, columns, size, share) for the report; {} of fewer than
        three pictures, or of pictures that are all the same to the model.

        points: [x, y] of each, 0 to 1000, along the first two principal components, drawn to one
        scale; share: of the variance that each of both axes holds. sheet: base64 JPEG of the
        thumbnails, `columns` a row, each `size` pixels a side.
        """
        kept = self._kept.items()
        if len(kept) < 3:
            return {}
        pictures, rows, texts, right = zip(*kept)
        places, share = principal(np.stack(rows).astype(np.float64))
        if not share[0] > 0:
            return {}
        low, high = places.min(0), places.max(0)
        scaled = 500 + 1000 * (places - (low + high) / 2) / (high - low).max()
        return dict(
            points=scaled.round().astype(int).tolist(),
            texts=list(texts),
            right=[bool(good) for good in right],
            sheet=_sheet(pictures),
            columns=_COLUMNS,
            size=SIZE,
            share=[round(float(s), 4) for s in share],
        )


def _kept(image: Any, row: np.ndarray, text: str, good: bool) -> tuple[Any, ...]:
    return picture(image), np.array(row), text, good


def principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components (Pearson 1901) of float [N, E], N and E at least 2: places
    [N, 2], and the share of the variance of each axis [2], zeros where nothing varies. The sign of
    an axis is that which makes its largest place positive."""
    left, sizes, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    places = left[:, :2] * sizes[:2]
    places = places * np.where(places.max(0) >= -places.min(0), 1, -1)
    whole = float((sizes**2).sum())
    # What is left of equal rows is rounding.
    varies = whole > 1e-12 * max(float((rows**2).sum()), 1e-30)
    return places, sizes[:2] ** 2 / whole if varies else np.zeros(2)


def _sheet(pictures: Sequence[np.ndarray]) -> str:
    lines = -(-len(pictures) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * SIZE, lines * SIZE), "white")
    for number, pixels in enumerate(pictures):
        small = Image.fromarray(pixels).convert("RGB")
        small.thumbnail((SIZE, SIZE))
        line, column = divmod(number, _COLUMNS)
        x, y = column * SIZE + (SIZE - small.width) // 2, line * SIZE + (SIZE - small.height) // 2
        sheet.paste(small, (x, y))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
