"""Images that keep their aspect ratio, as rows of patches (models/image_encoder.py says how they lie)."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from coca_jax.config import Data, Model, shapes
from coca_jax.data import images


def budget(model: Model, data: Data) -> int:
    """Maximum number of patches per image: data.max_patches, or that of a square image."""
    return data.max_patches or shapes.patches(model.image_size, model.patch_size)


def patch_size(model: Model) -> int:
    """The side of a patch. Raises ValueError for patches that are not square."""
    size = model.patch_size
    if not isinstance(size, int):
        raise ValueError(f"model.patch_size={size}: data.resize='native' goes with square patches")
    return size


def grid(height: int, width: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches of an image of height x width pixels.

    The largest scale is taken at which they are `most` together, where a side that is no whole
    number of patches is stretched to the next one, by less than a patch.
    """

    def across(side: int, along: int, count: int) -> int:
        return min(max(-(-side * count // along), 1), shapes.MOST_SIDE)

    counts = range(1, min(most, shapes.MOST_SIDE) + 1)
    rows = bisect.bisect_right(counts, most, key=lambda n: n * across(width, height, n))
    columns = bisect.bisect_right(counts, most, key=lambda n: n * across(height, width, n))
    if rows and (rows * width >= columns * height or not columns):
        return rows, across(width, height, rows)
    return across(height, width, columns), columns


def is_packed(image: Any, patch_size: int, most: int) -> bool:
    """Whether it is one packed image, or several [n, N, P * P * 3 + 4], and no picture."""
    shape = (most, shapes.width(patch_size))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[-2:] != shape:
        return False
    first = image[..., 0, -shapes.PLACE :]  # of a patch in the corner of its image
    area = first[..., 2].astype(int) * first[..., 3]
    return bool((first[..., :2] == 0).all() and (area > 0).all() and (area <= most).all())


def fitted(image: np.ndarray, patch_size: int, most: int) -> np.ndarray:
    """The resizing of evaluation: uint8 [h, w, 3] -> packed [N, P * P * 3 + 4], N being `most`."""
    height, width = image.shape[:2]
    rows, columns = grid(height, width, most)
    size = (rows * patch_size, columns * patch_size)
    if image.shape[:2] != size:
        image = images.bilinear(image, size)
    return pack(image, patch_size, most)


def pack(image: np.ndarray, patch_size: int, most: int) -> np.ndarray:
    """uint8 [rows * P, columns * P, 3] -> packed uint8 [N, P * P * 3 + 4], N being `most`."""
    rows, columns = (side // patch_size for side in image.shape[:2])
    packed = np.zeros((most, shapes.width(patch_size)), np.uint8)
    parts = image.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2)
    here = packed[: rows * columns]
    here[:, : -shapes.PLACE] = parts.reshape(rows * columns, -1)
    at = np.indices((rows, columns)).reshape(2, -1)
    here[:, -shapes.PLACE :] = np.stack([*at, *np.full_like(at, [[rows], [columns]])], 1)
    return packed
