"""Bootstrap confidence intervals of evaluation scores (Efron 1979, percentile method)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Suffixes of the scores that accompany a score: its 95% interval, the number of examples, and the
# baselines of a model that ignores the images (evaluators/baselines.py).
COMPANIONS = ("_low", "_high", "_count", "_chance", "_majority")
_MAX_BLOCKS = 5_000
_LEVEL = 0.95
_RESAMPLES = 1_000


def resampled_sums(stats: np.ndarray, *, resamples: int = _RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns float64 [resamples, K]: sums over examples drawn with replacement.

    They give the bootstrap distribution of any score that is a function of sums over examples, such
    as a ratio or corpus BLEU.

    Args:
      stats: [N, K], the contribution of each example to each sum; N >= 1.
      resamples: number of draws of N examples.
      seed: random seed.
    """
    stats = np.asarray(stats, np.float64)
    rng = np.random.default_rng(seed)
    # Sum more than 5,000 examples in random blocks of equal size first. If examples are
    # independent, this preserves the variance and bounds time and memory.
    order = rng.permutation(len(stats))
    pieces = np.array_split(order, min(len(stats), _MAX_BLOCKS))
    starts = np.cumsum([0] + [len(piece) for piece in pieces[:-1]])
    blocks = np.add.reduceat(stats[order], starts, axis=0)
    share = np.full(len(blocks), 1 / len(blocks))
    drawn = []
    for start in range(0, resamples, 50):
        counts = rng.multinomial(len(blocks), share, size=min(50, resamples - start))
        drawn.append(counts @ blocks)
    return np.concatenate(drawn)


def sum_by_owner(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Returns float64 [owners] or [owners, K]: values [N] or [N, K] summed by owner.

    owners: int [N], the owner of each value (such as the image of a record), 0, 1, ... without gaps.
    """
    values = np.asarray(values, np.float64)
    sums = np.zeros((int(owners.max()) + 1, *values.shape[1:]))
    np.add.at(sums, owners, values)
    return sums


def limits(samples: np.ndarray) -> tuple[float, float]:
    """Returns the 2.5% and 97.5% quantiles of a bootstrap distribution [R], ignoring NaN."""
    tail = (1 - _LEVEL) / 2
    low, high = np.nanquantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def share_limits(
    samples: np.ndarray, share: float, count: int, *, most: float = 1.0
) -> tuple[float, float]:
    """Returns the 95% interval of a mean between 0 and `most`, such as an accuracy.

    samples: [R], its bootstrap distribution; count: number of independent examples.
    """
    # At 0 or `most`, all examples are equal and the bootstrap has no variance. Use the
    # Clopper-Pearson (1934) limit there.
    room = most * (1 - ((1 - _LEVEL) / 2) ** (1 / count))
    if share <= 0:
        return 0.0, room
    if share >= most:
        return most - room, most
    return limits(samples)


def bootstrap(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    most: float | None = None,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Returns (sum(values) / sum(weights), low, high) with a 95% bootstrap interval over examples.

    Args:
      values: [N], one value per example, e.g. 1.0 for a correct guess.
      weights: [N], the divisors, e.g. token counts; ones by default.
      most: upper bound of values / weights, whose lower bound is 0 (see `share_limits`); None if
        the values are unbounded.

    Raises ValueError if there are no examples, the weights sum to zero, or a value is out of bounds.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if not len(values) or not weights.sum() > 0:
        raise ValueError(
            f"{len(values)} examples with total weight {weights.sum()}: nothing to score."
        )
    if most is not None:
        slack = 1e-6 * most * np.maximum(weights, 1.0)  # rounding of sums
        outside = (values < -slack) | (values > most * weights + slack)
        if outside.any():
            raise ValueError(
                f"value {values[outside][0]:g} with weight {weights[outside][0]:g}: not between 0 "
                f"and most={most:g} times its weight. Use most=None for unbounded values."
            )
    top, bottom = resampled_sums(np.stack([values, weights], 1), resamples=resamples, seed=seed).T
    mean, drawn = float(values.sum() / weights.sum()), top[bottom > 0] / bottom[bottom > 0]
    if most is None:
        return (mean, *limits(drawn))
    return (mean, *share_limits(drawn, mean, int((weights > 0).sum()), most=most))


def mean_of_classes(hits: np.ndarray, totals: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Returns [R]: bootstrap samples of the mean per-class accuracy, resampled within each class.

    hits, totals: [C], correct and all examples of each class; totals >= 1.
    """
    rng = np.random.default_rng(seed)
    totals = np.asarray(totals, np.int64)
    share = np.asarray(hits, np.float64) / totals
    # Resampling n examples with h correct ones gives Binomial(n, h / n) hits, whose variance is too
    # small by a factor of (n - 1) / n: correct for it. A single example gives no variance at all:
    # use that of the mean accuracy.
    alone = totals == 1
    centre = np.where(alone, share.mean(), share)
    wider = np.where(alone, 1.0, np.sqrt(totals / np.maximum(totals - 1, 1)))
    drawn = [(rng.binomial(totals, centre) / totals - centre) * wider for _ in range(_RESAMPLES)]
    return np.clip(share.mean() + np.stack(drawn).mean(1), 0.0, 1.0)


def median_limits(values: np.ndarray, owners: np.ndarray | None = None) -> tuple[float, float]:
    """Returns the 95% interval of the median of values [N] from its order statistics.

    owners: int [N], the owner of each value; by default every value is independent.
    """
    values = np.asarray(values, np.float64)
    ordered = np.sort(values)
    half = 0.98 * np.sqrt(len(ordered))  # 1.96 standard deviations of Binomial(N, 1/2)
    if owners is not None:
        # Values of one owner are correlated, which widens the interval (Woodruff 1952).
        below = (values <= np.median(values)).astype(float)
        below -= below.mean()
        by_owner, own = np.square(np.bincount(owners, below)).sum(), np.square(below).sum()
        half *= np.sqrt(max(by_owner / own, 1.0)) if own else 1.0
    low = max(int(np.floor(len(ordered) / 2 - half)), 0)
    high = min(int(np.ceil(len(ordered) / 2 + half)), len(ordered) - 1)
    return float(ordered[low]), float(ordered[high])


def scored(
    name: str, value: float, interval: tuple[float, float], count: int
) -> Iterator[tuple[str, float]]:
    """Yields `name`, `name`_low and `name`_high (95%), and `name`_count (examples)."""
    yield name, float(value)
    yield f"{name}_low", float(interval[0])
    yield f"{name}_high", float(interval[1])
    yield f"{name}_count", float(count)


def with_interval(
    name: str,
    values: np.ndarray,
    weights: np.ndarray | None = None,
    owners: np.ndarray | None = None,
    most: float | None = 1.0,
) -> Iterator[tuple[str, float]]:
    """Yields the `scored` entries of mean(values), or of sum(values) / sum(weights); all [N].

    owners: int [N], the owner of each value (see `sum_by_owner`), resampled together. most: upper
    bound of a value (see `bootstrap`); None for unbounded values such as counts and nats.
    """
    count = len(values)
    if owners is not None:
        weights = sum_by_owner(np.ones(count) if weights is None else weights, owners)
        values = sum_by_owner(values, owners)
    mean, low, high = bootstrap(values, weights, most=most)
    yield from scored(name, mean, (low, high), count)
