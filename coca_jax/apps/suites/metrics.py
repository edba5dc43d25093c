"""Figures of suites as functions of what a model said of each example.

The definitions are those of CLIP_benchmark 1.6 (`metrics/`), of WILDS (Koh et al. 2021) and of
DataComp (Gadre et al. 2023, appendix N); they differ from evaluators/ where several answers score
the same: there ties count against the model, here the first of them is taken, but of pairs none
(Thrush et al. 2022; `measuring.chosen`).

`Outcome`: arrays with an example a row, by name. Every metric is a function of an outcome, so that
its interval, and that of the difference of two models, comes from drawing rows, or, where `image`
says which are of one, images with all their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from coca_jax.apps.search.nearest import Exact
from coca_jax.evaluation.metrics.intervals import limits, share_limits

Outcome = Mapping[str, np.ndarray]
Metric = Callable[[Outcome], float]

RECALL_AT = (1, 5, 10)
RESAMPLES = 1_000
MANY = 10  # candidates of the examples that `jaccard_of_many` is of


def of_classes(scores: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """What classification figures need: `target`, `guess` (int [N]) and, of five classes or more,
    `in_top5` (bool [N]), of scores [N, C] and the true classes [N]."""
    found = dict(target=np.asarray(target), guess=scores.argmax(1))
    if scores.shape[1] >= 5:
        first = np.argsort(-scores, 1, kind="stable")[:, :5]
        found["in_top5"] = (first == found["target"][:, None]).any(1)
    return found


def of_retrieval(
    images: np.ndarray,
    texts: np.ndarray,
    image_of: np.ndarray,
    cutoffs: tuple[int, ...] = RECALL_AT,
) -> dict[str, np.ndarray]:
    """What recalls need, an image a row: `texts_k` whether one of its texts is among the first k,
    `images_k` how many of its texts find it, `texts` how many it has.

    images, texts: float32 [N, E] and [M, E], L2-normalised; image_of: of each text, int [M]. A
    cut-off beyond the candidates is left out: everything would be found.
    """
    count = len(images)
    found = dict(texts=np.bincount(image_of, minlength=count))
    by_text, by_image = _first(texts, images, max(cutoffs)), _first(images, texts, max(cutoffs))
    for k in cutoffs:
        if k <= count:
            hit = (by_text[:, :k] == image_of[:, None]).any(1)
            found[f"images_{k}"] = np.bincount(image_of, hit, minlength=count)
        if k <= len(image_of):
            found[f"texts_{k}"] = (image_of[by_image[:, :k]] == np.arange(count)[:, None]).any(1)
    return found


def _first(queries: np.ndarray, candidates: np.ndarray, k: int, chunk: int = 512) -> np.ndarray:
    """The most similar candidates of each query, int [N, k], the first of equal ones first. The
    similarities of all exist at no time: of COCO's size they take gigabytes."""
    near = Exact(candidates)
    parts = [near(queries[start : start + chunk], k)[1] for start in range(0, len(queries), chunk)]
    return np.concatenate(parts)


def acc1(found: Outcome) -> float:
    """The share of first guesses that are right."""
    return float((found["guess"] == found["target"]).mean())


def acc5(found: Outcome) -> float:
    """The share of images whose class is among the first five."""
    return float(found["in_top5"].mean())


def mean_per_class_recall(found: Outcome) -> float:
    """The mean over the classes that occur of the share of their images that is right."""
    right = found["guess"] == found["target"]
    total = np.bincount(found["target"])
    hits = np.bincount(found["target"], right, minlength=len(total))[total > 0]
    return float((hits / total[total > 0]).mean())


def f1_macro(found: Outcome) -> float:
    """The mean F1 of the classes that occur (WILDS, iWildCam)."""
    size = int(max(found["target"].max(), found["guess"].max())) + 1
    total = np.bincount(found["target"], minlength=size)
    guessed = np.bincount(found["guess"], minlength=size)
    right = np.bincount(found["target"][found["guess"] == found["target"]], minlength=size)
    return float((2 * right / np.maximum(total + guessed, 1))[total > 0].mean())


def worst_group(found: Outcome, right: np.ndarray) -> float:
    """The lowest share of right ones over the groups that occur: `group` int [N], below 0: none;
    NaN where no example has one, as in draws of few."""
    inside = found["group"] >= 0
    if not inside.any():
        return float("nan")
    total = np.bincount(found["group"][inside])
    hits = np.bincount(found["group"][inside], right[inside], minlength=len(total))
    return float((hits[total > 0] / total[total > 0]).min())


def worst_acc1(found: Outcome) -> float:
    """Accuracy in the worst group (WILDS' FMoW and GeoDE: the region)."""
    return worst_group(found, found["guess"] == found["target"])


def worst_acc5(found: Outcome) -> float:
    """Top-5 accuracy in the worst group (Dollar Street: a quarter of the incomes)."""
    return worst_group(found, found["in_top5"])


def mean_average_precision(found: Outcome) -> float:
    """The mean over classes of the average precision: `scores` and `targets` [N, C]. A class of no
    image counts as 0, as in CLIP_benchmark."""
    order = np.argsort(-found["scores"], 0, kind="stable")
    true = np.take_along_axis(found["targets"].astype(bool), order, 0)
    precision = true.cumsum(0) / np.arange(1, len(true) + 1)[:, None]
    return float(((precision * true).sum(0) / np.maximum(true.sum(0), 1)).mean())


def image_retrieval(k: int) -> Metric:
    """The share of texts whose image is among the first k."""
    return lambda found: float(found[f"images_{k}"].sum() / found["texts"].sum())


def text_retrieval(k: int) -> Metric:
    """The share of images with one of their texts among the first k."""
    return lambda found: float(found[f"texts_{k}"].mean())


def mean_recall_at_1(found: Outcome) -> float:
    """The mean of both directions (DataComp's figure of Flickr and COCO)."""
    return (image_retrieval(1)(found) + text_retrieval(1)(found)) / 2


def share(name: str) -> Metric:
    """The mean of an array: a share of right ones, a mean Jaccard score."""
    return lambda found: float(found[name].mean())


def jaccard_of_many(found: Outcome) -> float:
    """The mean Jaccard score of the examples with ten candidates or more (DataComp's figure of
    WinoGAViL, whose examples have 5, 6, 10 or 12)."""
    many = found["candidates"] >= MANY
    return float(found["jaccard"][many].mean()) if many.any() else float("nan")


# What needs which arrays; of a task all are given that its outcome has the arrays for.
METRICS: dict[str, tuple[tuple[str, ...], Metric]] = {
    "acc1": (("guess",), acc1),
    "acc5": (("in_top5",), acc5),
    "mean_per_class_recall": (("guess",), mean_per_class_recall),
    "F1-macro_all": (("guess",), f1_macro),
    "acc_worst_group": (("guess", "group"), worst_acc1),
    "acc5_worst_group": (("in_top5", "group"), worst_acc5),
    "mean_average_precision": (("scores",), mean_average_precision),
    **{f"image_retrieval_recall@{k}": ((f"images_{k}",), image_retrieval(k)) for k in RECALL_AT},
    **{f"text_retrieval_recall@{k}": ((f"texts_{k}",), text_retrieval(k)) for k in RECALL_AT},
    "mean_recall@1": (("images_1", "texts_1"), mean_recall_at_1),
    "image_acc": (("image_acc",), share("image_acc")),
    "text_acc": (("text_acc",), share("text_acc")),
    "acc": (("acc",), share("acc")),
    "likelihood_image_acc": (("likelihood_image_acc",), share("likelihood_image_acc")),
    "likelihood_text_acc": (("likelihood_text_acc",), share("likelihood_text_acc")),
    "likelihood_acc": (("likelihood_acc",), share("likelihood_acc")),
    "jaccard": (("jaccard",), share("jaccard")),
    "jaccard_10_12": (("jaccard", "candidates"), jaccard_of_many),
    "lp_acc1": (("lp_guess",), lambda found: float((found["lp_guess"] == found["target"]).mean())),
}


def names(found: Outcome) -> list[str]:
    """The metrics that an outcome has the arrays for."""
    return [name for name, (needs, _) in METRICS.items() if all(one in found for one in needs)]


def value(name: str, found: Outcome) -> float:
    """A metric of an outcome. Raises ValueError for one that there is not."""
    if name not in METRICS:
        raise ValueError(f"metric {name!r}: choose from {', '.join(METRICS)}")
    return METRICS[name][1](found)


def count(found: Outcome) -> int:
    """The examples of an outcome."""
    return len(next(iter(found.values())))


def _needed(name: str, found: Outcome) -> dict[str, np.ndarray]:
    more = ("target", "targets", "texts")
    return {key: found[key] for key in {*METRICS[name][0], *more} if key in found}


def interval(name: str, found: Outcome, *, seed: int = 0) -> tuple[float, float]:
    """95% of a metric, by drawing examples with replacement (Efron 1979).

    Where it is 0 or 1 it is `share_limits`, by the smallest group where the worst one counts.
    """
    examples = len(np.unique(found["image"])) if "image" in found else count(found)
    if "group" in METRICS[name][0]:  # -1: of none
        sizes = np.unique(found["group"][found["group"] >= 0], return_counts=True)[1]
        examples = int(sizes.min(initial=examples))
    drawn = np.clip(_drawn(name, [found], seed)[0], 0.0, 1.0)
    return share_limits(drawn, value(name, found), examples)


def difference(
    name: str, found: Outcome, other: Outcome, *, seed: int = 0
) -> tuple[float, float, float]:
    """(metric of `other` less that of `found`, its 95% interval), both on the same draws of the
    same examples: a paired bootstrap. Raises ValueError for other examples."""
    for key in ("target", "targets", "texts", "group"):
        if not np.array_equal(found.get(key), other.get(key)):
            raise ValueError("both models must have been scored on the same examples")
    if count(found) != count(other):
        raise ValueError(f"{count(found)} examples and {count(other)}: not the same ones")
    mine, theirs = _drawn(name, [found, other], seed)
    low, high = limits(theirs - mine)
    return value(name, other) - value(name, found), low, high


def _drawn(name: str, outcomes: list[Outcome], seed: int) -> np.ndarray:
    """The metric of each outcome on each draw, float64 [outcomes, draws]."""
    rng, size = np.random.default_rng(seed), count(outcomes[0])
    # What an earlier version kept does not say whose its rows are, which are the same ones.
    owners = next((found["image"] for found in outcomes if "image" in found), np.arange(size))
    order, counts = np.argsort(owners, kind="stable"), np.bincount(owners)
    needed = [_needed(name, found) for found in outcomes]
    if name in _MOVED:
        return np.stack([_MOVED[name](one, np.random.default_rng(seed)) for one in needed])
    values = []
    for _ in range(RESAMPLES):
        rows = order[_of_drawn(rng.integers(0, len(counts), len(counts)), counts)]
        values.append([METRICS[name][1]({k: x[rows] for k, x in one.items()}) for one in needed])
    return np.asarray(values).T


def _of_drawn(drawn: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The places of all rows of the owners drawn, int [R], where rows lie owner by owner.

    drawn: int [D]; counts: int [owners], rows of each.
    """
    rows = counts[drawn]
    before = (counts.cumsum() - counts)[drawn] - (rows.cumsum() - rows)
    return np.arange(rows.sum()) + np.repeat(before, rows)


def _precision_drawn(found: Outcome, rng: np.random.Generator) -> np.ndarray:
    """The mean average precision and how far draws lie from their mean, [draws].

    A draw holds an image of a class several times, each of which makes the others' precision
    higher: the draws' mean lies above the value, the further the fewer images a class has, and as
    they stand they would hold too little below it. Of n images of a class draws vary by (n - 1) / n
    of what new ones would.
    """
    targets, size = found["targets"].astype(bool), len(found["targets"])
    order, total = np.argsort(-found["scores"], 0, kind="stable"), targets.sum(0)
    wider = np.sqrt(total / np.maximum(total - 1, 1))
    drawn = np.zeros((RESAMPLES, len(total)))
    for start in range(0, RESAMPLES, _AT_ONCE):
        some = drawn[start : start + _AT_ONCE]
        times = rng.multinomial(size, np.full(size, 1 / size), len(some)).astype(np.float64)
        for one in np.flatnonzero(total):
            ranked = times[:, order[:, one]]
            true = targets[order[:, one], one]
            own, above = ranked[:, true], ranked.cumsum(1)[:, true]
            precision = own.cumsum(1) / np.maximum(above, 1)
            some[:, one] = (precision * own).sum(1) / np.maximum(own.sum(1), 1)
    return mean_average_precision(found) + ((drawn - drawn.mean(0)) * wider).mean(1)


# Draws of metrics that lie elsewhere than the metric itself, moved to it.
_MOVED = {"mean_average_precision": _precision_drawn}
_AT_ONCE = 50  # draws whose examples are counted at a time
