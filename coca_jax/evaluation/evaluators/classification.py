"""What every classifier's guesses amount to: accuracies, accuracy by class, confusion."""

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
_MAX_CONFUSION = 100  # classes; more would be a picture nobody reads


class Tally:
    """Collects scores of classes for images with one or several true classes.

    Args:
      name: first two parts of the metrics' names, `<evaluator>/<data set>`.
      class_names: distinct names, [classes].
      labels: how the records call the classes, [classes]; by default as `class_names`.
      tie: scores closer than this are equal.
      relative: `tie` is a share of the higher score, as probabilities need, of which most are tiny.
      missing: whether an image with none of the classes counts as wrong and is not refused.
      asked: whether records ask something of images, of one several things: intervals draw it with
        all of them.
      num_examples: pictures kept for the report.

    An image is right when any of its classes is guessed. Of classes that score the same the true
    one is ranked last, so that constant scores count as wrong.

    Raises ValueError when names repeat or there are fewer than two.
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
                f"labels holds {len(set(labels))} distinct labels for {len(class_names)} "
                "class_names; give one for each name"
            )
        self.name, self.class_names = name, list(class_names)
        self.tie, self.relative, self.missing, self.asked = tie, relative, missing, asked
        self._image_of: list[bytes] = []
        self._number = {label: i for i, label in enumerate(labels)}
        self._ranks: list[np.ndarray] = []
        self._right: list[np.ndarray] = []  # how many classes each image has
        self._images_of = np.zeros(len(class_names), np.int64)  # number of images of each class
        self._truths: list[int] = []  # the first name, for accuracy by class and confusion; or -1
        self._guesses: list[np.ndarray] = []
        self._shown, self._worst = Spread(num_examples), Worst(num_examples // 2)

    def true_classes(self, record: Record) -> list[int]:
        """Returns the numbers of the record's classes; ValueError when none is known."""
        found = [self._number[label] for label in record["labels"] if label in self._number]
        if not found and not self.missing:
            first = str(next(iter(record["labels"]), ""))
            near = difflib.get_close_matches(first, self._number, n=1, cutoff=0)
            raise ValueError(
                f"labels of {record.get('key', 'a record')} are {list(record['labels'])}; "
                f"none is among the {len(self._number)} classes of {self.name}, of which "
                f"{near[0]!r} is the nearest; give all classes, or keep only records of these with "
                "--where=label=NAME,NAME"
            )
        return found

    def add(self, scores: np.ndarray, records: Sequence[Record]) -> np.ndarray:
        """Takes scores [N, classes] of N records with `labels` (and `image`, for the report);
        returns bool [N], whether the first guess is right."""
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
        # Among equal scores a wrong class is the guess, as in the rank.
        top = scores.max(1, keepdims=True)
        best = scores >= top - _width(self.tie, top, self.relative)
        self._guesses.append(np.where(best & ~right, 2, np.where(best, 1, 0)).argmax(1))
        # How far the guess lies over the truth, where it is wrong.
        margin = scores.max(1) - np.where(right, scores, -np.inf).max(1)
        for record, row, wrong, off in zip(records, scores, self._ranks[-1] > 0, margin):
            make = functools.partial(self._item, record, row.copy())
            self._shown.offer(make)
            if wrong and np.isfinite(off):
                self._worst.offer(float(off), make)
        return self._ranks[-1] < 1

    def _item(self, record: Record, scores: np.ndarray) -> dict[str, Any]:
        """One picture of the report, with the three best guesses."""
        return dict(
            image=encode_png(picture(record["image"])),
            truth=[self.class_names[c] for c in self.true_classes(record)] or record["labels"],
            guesses=[(self.class_names[c], float(scores[c])) for c in np.argsort(-scores)[:3]],
        )

    def owners(self) -> np.ndarray | None:
        """Which image each record asks about, int [N]; None where records ask nothing."""
        return numbered(self._image_of) if self.asked else None

    def results(self) -> Iterator[tuple[str, float]]:
        """Yields top1, top5 (of more than five classes), mean_per_class, their intervals and
        baselines.

        mean_per_class is the mean accuracy of the classes that occur; its interval resamples within
        each class. Raises ValueError when nothing was added.
        """
        if not self._truths:
            raise ValueError(f"{self.name} has no record; check the data set and its split")
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
        # Always naming the largest class: the baseline that a useful classifier has to beat.
        yield f"{self.name}/top1_majority", float(self._images_of.max() / len(self._truths))
        yield f"{self.name}/num_classes", float(len(self.class_names))

    def hits(self) -> np.ndarray:
        """Returns bool [N]: whether each image's first guess is right."""
        return np.concatenate(self._ranks) < 1

    def chance(self) -> dict[str, float]:
        """The scores of random guesses."""
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
        """(rank, first true class, guess) of every image that has a class; with several true
        classes a guess of any of them stands on the diagonal."""
        rank, truth = np.concatenate(self._ranks), np.asarray(self._truths)
        guess = np.where(rank < 1, truth, np.concatenate(self._guesses))
        return rank[truth >= 0], truth[truth >= 0], guess[truth >= 0]

    def classes(self) -> dict[str, Any]:
        """Returns dict(class_names, accuracy, count, confusion) for eval_classes.json.

        accuracy: of each class, None where it does not occur; count: its images. confusion: triples
        [true class, guessed class, times] of all pairs that occur, classes by their place in
        class_names.
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
        """Returns confusions, accuracies by class and pictures, for the report."""
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
            table = np.zeros((len(rows), len(columns)), int)  # of 100,000 names all are 80 GB
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
    """Returns how many wrong candidates score no less than the best right one, int [N].

    Args:
      scores: [N, C].
      right: bool [N, C]; a row without one has rank C.
      tie: scores closer than this are equal; float32 dot products of the same unit vectors may
        differ by about 1e-7.
      relative: `tie` is a share of the best right score.
    """
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    tie = _width(tie, best, relative)
    return ((scores >= best - tie) & ~right).sum(1)


def _width(tie: float, best: np.ndarray, relative: bool) -> Any:
    """How far below `best` scores are equal to it; best may be -inf, where there is none."""
    return tie * np.maximum(best, 0) if relative else tie
