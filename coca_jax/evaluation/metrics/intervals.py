"""Bootstrap confidence intervals of evaluation figures (Efron 1979, percentile method)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Endings of scores that belong to the score without the ending: its 95% interval, the number of
# examples, and what it would be for a model that does not look at the images (see chance.py).
COMPANIONS = ("_low", "_high", "_count", "_chance", "_majority")
_MAX_BLOCKS = 5_000
_LEVEL = 0.95
_RESAMPLES = 1_000


def resampled_sums(stats: np.ndarray, *, resamples: int = _RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns float64 [resamples, K]: sums over examples drawn with replacement.

    Any figure that is a function of sums over examples (a ratio, corpus BLEU) has its bootstrap
    distribution from these.

    Args:
      stats: [N, K], what each example adds to each sum; N at least 1.
      resamples: draws, each of as many examples as there are.
      seed: of the draws; equal input gives equal output.

    More than 5,000 examples are first summed in random blocks of equal size: for independent
    examples this leaves the spread as it is and bounds time and memory.
    """
    stats = np.asarray(stats, np.float64)
    rng = np.random.default_rng(seed)
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


def of_owners(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Returns float64 [owners] or [owners, K]: sums of values [N] or [N, K] over whose they are.

    owners: int [N], 0, 1, ... without gaps, such as the image of each record.
    """
    values = np.asarray(values, np.float64)
    sums = np.zeros((int(owners.max()) + 1, *values.shape[1:]))
    np.add.at(sums, owners, values)
    return sums


def limits(samples: np.ndarray) -> tuple[float, float]:
    """Returns the 2.5% and 97.5% quantiles of a bootstrap distribution [R], NaN left out."""
    tail = (1 - _LEVEL) / 2
    low, high = np.nanquantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def share_limits(
    samples: np.ndarray, share: float, count: int, *, most: float = 1.0
) -> tuple[float, float]:
    """Returns the 95% interval of a mean that lies within 0 and `most`, such as a share.

    samples: [R], its bootstrap distribution; count: independent examples. Where all examples have
    the least, or the most, drawing them again varies nothing. Then it is Clopper and Pearson's
    (1934): above 1 - 0.025^(1/count) so many would have shown another one in 97.5% of sets.
    """
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
    """Returns (sum(values) / sum(weights), low, high): 95% by a bootstrap over examples.

    Args:
      values: [N], one figure an example, e.g. 1.0 where a guess is right.
      weights: [N], what the sum is divided by, e.g. tokens; ones by default.
      most: where each value lies within 0 and `most` times its weight, as a share does within 1,
        and the mean may be either: see `share_limits`. Default: values have no such ends.

    Raises ValueError when there is no example, the weights sum to zero, or a value lies outside of
    its ends, of which the interval would be wrong.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if not len(values) or not weights.sum() > 0:
        raise ValueError(
            f"{len(values)} examples with weights of sum {weights.sum()}: none to score"
        )
    if most is not None:
        slack = 1e-6 * most * np.maximum(weights, 1.0)  # of sums that round
        outside = (values < -slack) | (values > most * weights + slack)
        if outside.any():
            raise ValueError(
                f"{values[outside][0]:g}, of weight {weights[outside][0]:g}, does not lie between "
                f"0 and most={most:g} times its weight; give most=None for values without such ends"
            )
    top, bottom = resampled_sums(np.stack([values, weights], 1), resamples=resamples, seed=seed).T
    mean, drawn = float(values.sum() / weights.sum()), top[bottom > 0] / bottom[bottom > 0]
    if most is None:
        return (mean, *limits(drawn))
    return (mean, *share_limits(drawn, mean, int((weights > 0).sum()), most=most))


def mean_of_classes(hits: np.ndarray, totals: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Returns [R]: the mean of the classes' shares, resampled within each class.

    hits, totals: [C], right and all examples of each class; all of `totals` at least 1. A resample
    of a class's n examples of which h are right holds Binomial(n, h / n) right ones, which vary
    less than new examples would: so much more is drawn, n / (n - 1) of the variance. A single
    example tells nothing of its class's: it varies as one that is right as often as the mean.
    """
    rng = np.random.default_rng(seed)
    totals = np.asarray(totals, np.int64)
    share = np.asarray(hits, np.float64) / totals
    alone = totals == 1
    centre = np.where(alone, share.mean(), share)
    wider = np.where(alone, 1.0, np.sqrt(totals / np.maximum(totals - 1, 1)))
    drawn = [(rng.binomial(totals, centre) / totals - centre) * wider for _ in range(_RESAMPLES)]
    return np.clip(share.mean() + np.stack(drawn).mean(1), 0.0, 1.0)


def median_limits(values: np.ndarray, owners: np.ndarray | None = None) -> tuple[float, float]:
    """Returns the 95% interval of the median of values [N], by its order statistics.

    owners: int [N], whose each value is, by default its own. Values of one owner may be alike, and
    are then worth fewer (Woodruff 1952): the share of values up to the median varies as its sums by
    owner do.
    """
    values = np.asarray(values, np.float64)
    ordered = np.sort(values)
    half = 0.98 * np.sqrt(len(ordered))  # 1.96 standard deviations of Binomial(N, 1/2)
    if owners is not None:
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
    """Yields what `scored` does for the mean of values [N], or their sum over that of weights.

    owners: whose each value is, as `of_owners` has it: drawn with all that are theirs; by default
    its own. most: that a value can be, of its weight, the least being 0; None, as of counts
    and nats: see `bootstrap`, which raises ValueError for values beyond.
    """
    count = len(values)
    if owners is not None:
        weights = of_owners(np.ones(count) if weights is None else weights, owners)
        values = of_owners(values, owners)
    mean, low, high = bootstrap(values, weights, most=most)
    yield from scored(name, mean, (low, high), count)
