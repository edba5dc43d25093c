"""Which records are of one image: a list may name an image once a caption, question or region."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from coca_jax.importers import dedup


def content_digest(image: Any) -> bytes:
    """Tells images by content: encoded bytes, or an array."""
    return dedup.content_hash(image.tobytes() if isinstance(image, np.ndarray) else bytes(image))


def firsts(digests: Iterable[bytes]) -> np.ndarray:
    """The place of the first with the same digest as each, int [N]."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(one, place) for place, one in enumerate(digests)], np.int64)


def numbered(digests: Iterable[bytes]) -> np.ndarray:
    """Which image each digest is of, int [N]: 0, 1, ... as they first occur."""
    return np.unique(firsts(digests), return_inverse=True)[1].astype(np.int64)
