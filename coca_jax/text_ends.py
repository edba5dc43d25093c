"""Where texts end in their rows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # data are read without it, too
    import jax

Array = TypeVar("Array", "np.ndarray", "jax.Array")


def lengths(valid: Array) -> Array:
    """Tokens of each text, from the first to its end symbol: valid bool [N, L] -> int32 [N].

    Not the sum: a vocabulary may hide ids inside a text (CLIP's "!" before another sign), where
    valid is false too. 0 for a row of nothing but padding.
    """
    places = np.arange(1, valid.shape[1] + 1, dtype=np.int32)
    return (valid * places).max(1)
