"""What the report shows of a retrieval: queries of both directions with the best that was found."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from coca_jax.evaluators.results import encode_png

BEST = 5


def examples(
    images: np.ndarray,
    kept: Sequence[np.ndarray],
    texts: Sequence[str],
    embeddings: np.ndarray,
    matches: np.ndarray,
    count: int,
) -> dict[str, Any]:
    """`count` images, spread over the kept ones, with the best texts, and a text of each with the
    best of the kept images. A right one that is not among the best follows them.

    images: embeddings [I, D]. kept: pictures of the first of them, uint8 [H, W, 3] each.
    embeddings: of the texts, [T, D]. matches: image and text of each pair, int64 [C, 2].
    """
    of_image: dict[int, set[int]] = {}
    for i, t in matches[matches[:, 0] < len(kept)].tolist():
        of_image.setdefault(i, set()).add(t)
    items, text_items = [], []
    for i in np.unique(np.linspace(0, len(kept) - 1, count).astype(int)).tolist():
        hits = _hits(embeddings @ images[i], of_image[i])
        found: list[dict[str, Any]] = [dict(text=texts[t], **hit) for t, hit in hits]
        truth = [texts[t] for t in sorted(of_image[i])]
        items.append(dict(image=encode_png(kept[i]), truth=truth, texts=found))
        query = min(of_image[i])
        owners = [j for j, own in of_image.items() if query in own]
        hits = _hits(images[: len(kept)] @ embeddings[query], owners)
        found = [dict(image=encode_png(kept[j]), **hit) for j, hit in hits]
        text_items.append(dict(text=texts[query], images=found))
    searched = f"{len(kept):,} of {len(images):,} images"
    return dict(kind="retrieval", items=items, text_items=text_items, searched=searched)


def _hits(scores: np.ndarray, right: Collection[int]) -> list[tuple[int, dict[str, Any]]]:
    """(number, dict(score, correct, rank)) of the best, rank 1 first, and of the best right one."""
    best = np.argsort(-scores, kind="stable")[:BEST].tolist()
    ranked = list(zip(best, range(1, BEST + 1)))
    if not set(best) & set(right):
        first = max(right, key=lambda number: float(scores[number]))
        ranked.append((first, int((scores >= scores[first]).sum())))  # as ties are counted
    return [
        (number, dict(score=float(scores[number]), correct=number in right, rank=rank))
        for number, rank in ranked
    ]
