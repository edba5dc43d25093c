"""Classification metrics: top-k and per-class accuracy, confusion matrix, example images."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coca_jax.data.dedup import content_digest, numbered
from coca_jax.evaluation.evaluators import Record
from coca_jax.evaluation.evaluators.base import Metric
from coca_jax.evaluation.evaluators.baselines import among_first
from coca_jax.evaluation.evaluators.inputs import check_distinct
from coca_jax.evaluation.evaluators.results import Spread, Worst, encode_png, picture
from coca_jax.evaluation.metrics.intervals import (
    mean_of_classes,
    scored,
    share_limits,
    with_interval,
)

HEADLINES: tuple[str, ...] = ("top1", "top5", "mean_per_class")
METRICS = {
    "top1": Metric("Top-1"),
    "top5": Metric("Top-5"),
    "mean_per_class": Metric("Mean per class"),
}
_MAX_CONFUSION = 100  # classes; a larger matrix is unreadable


class Tally:
    """Accumulates class scores of images with one or several true classes.

    A prediction is correct if it is any of the true classes. Among equal scores the true class is
    ranked last, so constant scores count as wrong.

    Args:
      name: first two parts of the metric names, `<evaluator>/<dataset>`.
      class_names: distinct names, [classes].
      labels: names of the classes in the records, [classes]; `class_names` by default.
      tie: scores closer than this are equal.
      relative: `tie` is relative to the higher score; for probabilities, most of which are tiny.
      missing: count an image without a known class as wrong instead of raising an error.
      asked: records are questions, of which an image may have several; intervals resample images.
      num_examples: number of example images for the report.

    Raises ValueError for duplicate names or fewer than two.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        labels: Sequence[str] | None = None,
        *,
        tie: float = 1e-6,
        relative: bool = False,
        missing: bool = False,
        asked: bool = False,
        num_examples: int = 16,
    ):
        labels = list(class_names if labels is None else labels)
        check_distinct(class_names)
        if len(set(labels)) != len(class_names):
            raise ValueError(
                f"labels: {len(set(labels))} distinct labels for {len(class_names)} class_names. "
                "Give one label per name."
            )
        self.name, self.class_names = name, list(class_names)
        self.tie, self.relative, self.missing, self.asked = tie, relative, missing, asked
        self._image_of: list[bytes] = []
        self._number = {label: i for i, label in enumerate(labels)}
        self._ranks: list[np.ndarray] = []
        self._right: list[np.ndarray] = []  # number of true classes of each image
        self._images_of = np.zeros(len(class_names), np.int64)  # number of images of each class
        self._truths: list[int] = []  # first true class of each image, or -1
        self._guesses: list[np.ndarray] = []
        self._shown, self._worst = Spread(num_examples), Worst(num_examples // 2)

    def true_classes(self, record: Record) -> list[int]:
        """Returns the class indices of a record. Raises ValueError if none is known."""
        found = [self._number[label] for label in record["labels"] if label in self._number]
        if not found and not self.missing:
            first = str(next(iter(record["labels"]), ""))
            near = difflib.get_close_matches(first, self._number, n=1, cutoff=0)
            raise ValueError(
                f"record {record.get('key', '?')}: labels {list(record['labels'])} are not among "
                f"the {len(self._number)} classes of {self.name} (closest: {near[0]!r}). Add the "
                "class names, or select records with --where=label=NAME,NAME."
            )
        return found

    def add(self, scores: np.ndarray, records: Sequence[Record]) -> np.ndarray:
        """Adds scores [N, classes] of N records with `labels` and `image`. Returns bool [N]:
        whether the top prediction is correct."""
        right = np.zeros(scores.shape, bool)
        for row, record in enumerate(records):
            known = self.true_classes(record)
            right[row, known] = True
            self._truths.append(known[0] if known else -1)
            if self.asked:
                self._image_of.append(content_digest(record["image"]))
        self._ranks.append(rank_of_best(scores, right, self.tie, self.relative))
        self._right.append(right.sum(1))
        self._images_of += right.sum(0)
        # Among equal scores the prediction is a wrong class, consistent with the rank.
        top = scores.max(1, keepdims=True)
        best = scores >= top - _width(self.tie, top, self.relative)
        self._guesses.append(np.where(best & ~right, 2, np.where(best, 1, 0)).argmax(1))
        # Margin of a wrong prediction over the best true class.
        margin = scores.max(1) - np.where(right, scores, -np.inf).max(1)
        for record, row, wrong, off in zip(records, scores, self._ranks[-1] > 0, margin):
            make = functools.partial(self._item, record, row.copy())
            self._shown.offer(make)
            if wrong and np.isfinite(off):
                self._worst.offer(float(off), make)
        return self._ranks[-1] < 1

    def _item(self, record: Record, scores: np.ndarray) -> dict[str, Any]:
        """An example image for the report with the top three predictions."""
        return dict(
            image=encode_png(picture(record["image"])),
            truth=[self.class_names[c] for c in self.true_classes(record)] or record["labels"],
            guesses=[(self.class_names[c], float(scores[c])) for c in np.argsort(-scores)[:3]],
        )

    def owners(self) -> np.ndarray | None:
        """Index of the image of each record, int [N]; None if records are not questions."""
        return numbered(self._image_of) if self.asked else None

    def results(self) -> Iterator[tuple[str, float]]:
        """Yields top1, top5 (with more than five classes) and mean_per_class with intervals and
        baselines.

        mean_per_class is the mean accuracy over the classes that occur; its interval resamples
        within each class. Raises ValueError if nothing was added.
        """
        if not self._truths:
            raise ValueError(f"{self.name}: no records. Check the dataset and its split.")
        rank, truth = np.concatenate(self._ranks), np.asarray(self._truths)
        owners = self.owners()
        yield from with_interval(f"{self.name}/top1", rank < 1, owners=owners)
        if len(self.class_names) > 5:
            yield from with_interval(f"{self.name}/top5", rank < 5, owners=owners)
        rank, truth = rank[truth >= 0], truth[truth >= 0]
        total = np.bincount(truth, minlength=len(self.class_names))
        hits = np.bincount(truth, rank < 1, minlength=len(self.class_names))[total > 0]
        total = total[total > 0]
        if len(rank):
            mean = float((hits / total).mean())
            interval = share_limits(mean_of_classes(hits, total), mean, len(rank))
            yield from scored(f"{self.name}/mean_per_class", mean, interval, len(rank))
        for metric, share in self.chance().items():
            yield f"{self.name}/{metric}_chance", share
        # Accuracy of always predicting the largest class.
        yield f"{self.name}/top1_majority", float(self._images_of.max() / len(self._truths))
        yield f"{self.name}/num_classes", float(len(self.class_names))

    def hits(self) -> np.ndarray:
        """Returns bool [N]: whether the top prediction of each image is correct."""
        return np.concatenate(self._ranks) < 1

    def chance(self) -> dict[str, float]:
        """Expected scores of random guessing."""
        right, count = np.concatenate(self._right), len(self.class_names)
        found = {f"top{k}": among_first(count, right, k) for k in (1, 5) if k < max(count, 2)}
        known = np.asarray(self._truths) >= 0
        if known.any():
            truth, right = np.asarray(self._truths)[known], right[known]
            total = np.bincount(truth)
            shares = np.bincount(truth, right / count)[total > 0] / total[total > 0]
            found["mean_per_class"] = float(shares.mean())
        return found

    def _guessed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rank, first true class, prediction) of every image with a known class."""
        rank, truth = np.concatenate(self._ranks), np.asarray(self._truths)
        # Any of several true classes is correct: put it on the diagonal of the confusion matrix.
        guess = np.where(rank < 1, truth, np.concatenate(self._guesses))
        return rank[truth >= 0], truth[truth >= 0], guess[truth >= 0]

    def classes(self) -> dict[str, Any]:
        """Returns dict(class_names, accuracy, count, confusion) for eval_classes.json.

        accuracy: per class, None if the class does not occur; count: images per class. confusion:
        [true class, predicted class, count] of all pairs that occur, as indices into class_names.
        """
        rank, truth, guess = self._guessed()
        total = np.bincount(truth, minlength=len(self.class_names))
        hits = np.bincount(truth, rank < 1, minlength=len(self.class_names))
        pairs, times = np.unique(np.stack([truth, guess], 1), axis=0, return_counts=True)
        return dict(
            class_names=self.class_names,
            accuracy=[float(h / n) if n else None for h, n in zip(hits, total)],
            count=total.tolist(),
            confusion=[[int(t), int(g), int(n)] for (t, g), n in zip(pairs, times)],
        )

    def examples(self) -> dict[str, Any]:
        """Returns the confusion matrix, per-class accuracy and example images for the report."""
        rank, truth, guess = self._guessed()
        names = self.class_names
        present, place, total = np.unique(truth, return_inverse=True, return_counts=True)
        hits = np.bincount(place, rank < 1, minlength=len(present))
        by_class = {
            names[c]: dict(accuracy=float(h / n), count=int(n))
            for c, h, n in zip(present, hits, total)
        }
        wrong = rank >= 1
        pairs, counts = np.unique(
            np.stack([truth[wrong], guess[wrong]], 1), axis=0, return_counts=True
        )
        worst = np.argsort(-counts, kind="stable")[:15]
        examples: dict[str, Any] = dict(
            kind="zero_shot",
            per_class=by_class,
            confused=[
                dict(truth=names[pairs[i][0]], guess=names[pairs[i][1]], count=int(counts[i]))
                for i in worst
            ],
            items=self._shown.items(),
            worst=self._worst.items(),
        )
        rows, columns = present, np.unique(np.concatenate([present, guess]))
        if len(columns) <= _MAX_CONFUSION:
            # Only classes that occur: a full matrix of 100,000 classes would need 80 GB.
            table = np.zeros((len(rows), len(columns)), int)
            np.add.at(table, (place, np.searchsorted(columns, guess)), 1)
            examples["confusion"] = dict(
                rows=[names[c] for c in rows],
                columns=[names[c] for c in columns],
                counts=table.tolist(),
            )
        return examples


def rank_of_best(
    scores: np.ndarray, right: np.ndarray, tie: float = 1e-6, relative: bool = False
) -> np.ndarray:
    """Returns the number of wrong candidates that score at least as high as the best correct one,
    int [N].

    Args:
      scores: [N, C].
      right: bool [N, C], the correct candidates; a row without any has rank C.
      tie: scores closer than this are equal (float32 dot products of the same unit vectors can
        differ by about 1e-7).
      relative: `tie` is relative to the best correct score.
    """
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    tie = _width(tie, best, relative)
    return ((scores >= best - tie) & ~right).sum(1)


def _width(tie: float, best: np.ndarray, relative: bool) -> Any:
    """Distance below `best` within which scores are equal to it; `best` may be -inf."""
    return tie * np.maximum(best, 0) if relative else tie
