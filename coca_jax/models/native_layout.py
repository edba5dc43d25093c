"""The layout of images of any shape as rows of patches, see native.py; without JAX."""

from __future__ import annotations

from collections.abc import Sequence

PLACE = 4  # numbers behind the pixels of a patch: row, column, rows, columns
MOST_SIDE = 255  # patches of a side: their places are bytes


def width(patch_size: int) -> int:
    """Numbers of a patch."""
    return patch_size * patch_size * 3 + PLACE


def is_packed(shape: Sequence[int]) -> bool:
    """Whether arrays of a shape hold packed images, [..., N, P * P * 3 + 4], and not squares."""
    return shape[-1] != 3
