"""What blind guesses reach."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


def among_first(count: int, right: Iterable[int], k: int) -> float:
    """How often one of the right ones is among the first k of `count` candidates in random order.

    right: how many are right, of each query. Of m that is 1 - C(count - m, k) / C(count, k); the
    mean over the queries.
    """
    first = min(k, count)
    several, times = np.unique(np.fromiter(right, np.int64), return_counts=True)
    whole = math.comb(count, first)
    missed = [math.comb(count - m, first) / whole for m in several.tolist()]
    return 1 - float(np.average(missed, weights=times))
