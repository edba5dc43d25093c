"""Bootstrap confidence intervals of evaluation figures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_MAX_BLOCKS = 5_000


def bootstrap(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Returns (sum(values) / sum(weights), low, high) with a percentile bootstrap over examples.

    Args:
      values: [N], one figure an example, e.g. 1.0 where a guess is right.
      weights: [N], what the sum is divided by, e.g. tokens; ones by default.
      level: coverage of the interval.

    More than 5,000 examples are first summed in random blocks of equal size: for independent
    examples this leaves the spread of the mean as it is and bounds time and memory.
    Raises ValueError when there is no example or the weights sum to zero.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if not len(values) or not weights.sum() > 0:
        raise ValueError(
            f"{len(values)} examples with weights of sum {weights.sum()}: none to score"
        )
    mean = values.sum() / weights.sum()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(values))
    pieces = np.array_split(order, min(len(values), _MAX_BLOCKS))
    starts = np.cumsum([0] + [len(piece) for piece in pieces[:-1]])
    tops = np.add.reduceat(values[order], starts)
    bottoms = np.add.reduceat(weights[order], starts)
    means = []
    for _ in range(0, resamples, 50):
        counts = rng.multinomial(len(tops), np.full(len(tops), 1 / len(tops)), size=50)
        total = counts @ bottoms
        means.append((counts @ tops)[total > 0] / total[total > 0])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(mean), float(low), float(high)


def with_interval(
    name: str, values: np.ndarray, weights: np.ndarray | None = None
) -> Iterator[tuple[str, float]]:
    """Yields `name`, `name`_low and `name`_high (95%), and `name`_count (examples)."""
    mean, low, high = bootstrap(values, weights)
    yield name, mean
    yield f"{name}_low", low
    yield f"{name}_high", high
    yield f"{name}_count", float(len(values))
