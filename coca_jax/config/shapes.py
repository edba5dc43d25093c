"""Heights and widths: sizes of images and patches are one number of pixels, the side of a square,
or a pair (height, width). What they mean is said here alone."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

if typing.TYPE_CHECKING:
    import jax


Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return height, width


def shortest(size: Any) -> Size:
    """A size as one number where height and width are equal, else as a pair: as it is kept. size:
    whole numbers of any type, in any sequence."""
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height) if height == width else (int(height), int(width))


def words(size: Any) -> str:
    """A size in pixels as people read it: '64' or '48 x 96'."""
    return " x ".join(map(str, size)) if isinstance(size, (tuple, list)) else str(size)


def aspect(size: Size) -> float:
    """Width over height."""
    height, width = pair(size)
    return width / height


def grid(image: Size, patch: Size) -> tuple[int, int]:
    """Rows and columns of patches of an image."""
    (height, width), (rows, columns) = pair(image), pair(patch)
    return height // rows, width // columns


def patches(image: Size, patch: Size) -> int:
    """How many patches an image has."""
    rows, columns = grid(image, patch)
    return rows * columns


def divides(patch: Size, image: Size) -> bool:
    """Whether an image is a whole number of patches, one at least, down and across."""
    return all(side >= part and side % part == 0 for side, part in zip(pair(image), pair(patch)))


# Where texts end in their rows of tokens.


Array = TypeVar("Array", "np.ndarray", "jax.Array")


def lengths(valid: Array) -> Array:
    """Tokens of each text, from the first to its end symbol: valid bool [N, L] -> int32 [N].

    Not the sum: a vocabulary may hide ids inside a text (CLIP's "!" before another sign), where
    valid is false too. 0 for a row of nothing but padding.
    """
    places = np.arange(1, valid.shape[1] + 1, dtype=np.int32)
    return (valid * places).max(1)


# The layout of images of any shape as rows of patches, see native.py; without JAX.


PLACE = 4  # numbers behind the pixels of a patch: row, column, rows, columns
MOST_SIDE = 255  # patches of a side: their places are bytes


def width(patch_size: int) -> int:
    """Numbers of a patch."""
    return patch_size * patch_size * 3 + PLACE


def is_packed(shape: Sequence[int]) -> bool:
    """Whether arrays of a shape hold packed images, [..., N, P * P * 3 + 4], and not squares."""
    return shape[-1] != 3
