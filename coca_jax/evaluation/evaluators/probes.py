"""Probes of frozen image features: linear classification and k nearest neighbors."""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.data.evaluation_data import Records
from coca_jax.evaluation.evaluators import (
    Record,
    check_finite,
    in_batches,
    inputs,
    stack_images,
    warn,
)
from coca_jax.evaluation.evaluators.base import (
    Evaluator,
    Flag,
    Metric,
    RecordLimit,
    Scale,
    Setting,
    check_apart,
)
from coca_jax.evaluation.evaluators.classification import HEADLINES, METRICS, Tally

Encode = Callable[[Any], np.ndarray]
Select = Callable[[Sequence[Record]], Sequence[Record]]


class Probe(Evaluator):
    """Classifies images by features of the frozen encoder.

    Args:
      data_name: name of the dataset, the second part of the metric names.
      class_names: distinct names, [classes].
      train: training records, with `image` and `labels`.
      labels: names of the classes in the records, [classes]; `class_names` by default.
      batch_size: images per call of the model.
      num_examples: number of example images for the report.
      progress: show progress bars.
      cache: features and labels, shared by probes of the same model and classes on the same
        records.
    """

    needs, programs = "label", ("features",)
    flags = (
        inputs.FLAG,
        Flag("train_limit", 0, "Number of training records for probes (0 = all).", least=0),
    )
    options = dict(class_names=inputs.ClassNames, train=Mapping[str, Any], train_limit=RecordLimit)
    metrics, headlines = METRICS, HEADLINES

    def __init__(
        self,
        data_name: str,
        class_names: Sequence[str],
        train: Iterable[Record],
        *,
        labels: Sequence[str] | None = None,
        batch_size: int = 256,
        num_examples: int = 16,
        progress: bool = False,
        cache: dict[str, Any] | None = None,
    ):
        super().__init__(data_name)
        self._cache: dict[str, Any] = {} if cache is None else cache
        self._new_tally = lambda: Tally(
            self.name, class_names, labels, relative=True, num_examples=num_examples
        )
        self._new_tally()  # raises for invalid names
        self._classes = frozenset(class_names if labels is None else labels)
        self.num_classes, self.train = len(class_names), train
        self.batch_size, self.progress = batch_size, progress

    @classmethod
    def from_flags(cls, task: dict[str, Any], flags: Any) -> None:
        """Reads --class_names and --train_limit."""
        super().from_flags(task, flags)
        if flags.class_names:
            task["class_names"] = flags.class_names
        if flags.train_limit:
            task["train_limit"] = flags.train_limit

    @classmethod
    def check_task(cls, task: Mapping[str, Any]) -> None:
        super().check_task(task)
        inputs.check(task)

    @classmethod
    def train_data(cls, task: Mapping[str, Any]) -> dict[str, Any]:
        """The data entry with the training records."""
        return dict(task.get("train") or dict(task["data"], split="train"))

    @classmethod
    def more_data(cls, task: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [*super().more_data(task), dict(dict(split="test"), **cls.train_data(task))]

    @classmethod
    def check_data(cls, task: Mapping[str, Any]) -> None:
        """Raises ValueError if the training data contains the test data."""
        check_apart(task, cls.train_data(task), "trained on")

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Probe:
        """Options of a task: train (data entry with the training records, by default the split
        'train' of the same data), train_limit, class_names."""
        train = cls.train_data(task)
        names, labels = inputs.names_and_labels(dict(task, data=train))
        found = Records(train, task.get("train_limit", 0), need=cls.needs)
        limits = [task.get("limit", 0), task.get("train_limit", 0)]
        some = [task.get("known_only", False), task.get("candidates"), task.get("class_names")]
        of_data = json.dumps(["features", train, task["data"], limits, some], sort_keys=True)
        cache = setting.shared.setdefault(of_data, {})
        how = dict(setting.common(), labels=labels, cache=cache)
        probe = cls(task["name"], names, found, **how)
        probe.further = (found,)
        return probe

    @abc.abstractmethod
    def scores(
        self, test: np.ndarray, train: np.ndarray, classes: np.ndarray
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Classifies test features [N, W] given training features [M, W] and their classes int [M].
        Returns (scores [N, C] >= 0, {metric: chosen hyperparameter})."""

    def run(self, predict: Any, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields the metrics of `ZeroShot.run`, num_train, and l2 for a linear probe.

        predict.features maps N images to float32 [N, W]. `records` can be iterated repeatedly and
        have `image` and `labels`. A training record is assigned its first label that is a class;
        records without one are skipped with a warning. Raises ValueError for a test record without
        a known class, before training.
        """
        tally = self._new_tally()

        def require_class(batch: Sequence[Record]) -> Sequence[Record]:
            for record in batch:
                tally.true_classes(record)
            return batch

        # The test data is usually smaller: reading it first reports its errors early.
        test_x = self._features(predict.features, records, "test", require_class)
        train_x = self._features(predict.features, self.train, "train", self._learned)
        labels = self._cache["labels of train"]
        train_y = np.array([tally.true_classes(record)[0] for record in labels])
        scores, chosen = self.scores(test_x, train_x, train_y)
        scores /= scores.sum(1, keepdims=True)
        start = 0
        for batch in in_batches(records, self.batch_size):
            tally.add(scores[start : start + len(batch)], batch)
            start += len(batch)
        yield from ((f"{self.name}/{metric}", value) for metric, value in chosen.items())
        yield from tally.results()
        yield f"{self.name}/num_train", float(len(train_x))
        self.examples, self.classes = tally.examples(), tally.classes()

    def _learned(self, batch: Sequence[Record]) -> Sequence[Record]:
        """The records of a batch that have a class."""
        return [record for record in batch if not self._classes.isdisjoint(record["labels"])]

    def _features(
        self, encode: Encode, records: Iterable[Record], which: str, select: Select
    ) -> np.ndarray:
        """Features float32 [N, W] of the records that `select` returns per batch. Also caches their
        labels, which would otherwise require reading all images again."""
        if which in self._cache:
            return self._cache[which]
        labels: list[dict[str, Any]] = []
        show = f"{self.name} {which} images" if self.progress else ""
        parts, left = [], list[Record]()
        for batch in in_batches(records, self.batch_size, show=show):
            selected = select(batch)
            if len(selected) < len(batch):
                ids = set(map(id, selected))
                left += [_labels(record) for record in batch if id(record) not in ids]
            if not selected:
                continue
            found = np.asarray(encode(stack_images(selected)), np.float32)
            parts.append(check_finite(found, "image embeddings"))
            labels += map(_labels, selected)
        if left:
            line = (
                f"{len(left)} of {len(left) + len(labels)} training examples have none of the "
                f"{self.num_classes} classes (such as {left[0].get('key', '?')} with labels "
                f"{list(left[0]['labels'])[:3]})"
            )
            if not labels:
                raise ValueError(f"{self.name}: {line}. Use training data with these classes.")
            warn(self.name, f"skipped {line}")
        if not parts:
            raise ValueError(f"{self.name}: no records. Check the dataset and its split.")
        self._cache[f"labels of {which}"] = labels
        self._cache[which] = np.concatenate(parts)
        return self._cache[which]


def _labels(record: Record) -> dict[str, Any]:
    return {k: record[k] for k in ("key", "labels") if k in record}


class LinearProbe(Probe):
    """Probes with multinomial logistic regression."""

    kind, order, title = "linear_probe", 70, "Linear probe"
    metrics = METRICS | {"l2": Metric("L2 weight chosen", Scale.PLAIN)}

    def scores(
        self, test: np.ndarray, train: np.ndarray, classes: np.ndarray
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Unnormalized class probabilities."""
        from coca_jax.evaluation.metrics import linear  # slow: imports JAX and SciPy

        # With unit variance, one sweep of L2 weights suits every model.
        mean, std = train.mean(0), np.maximum(train.std(0), 1e-6)
        l2, weights = linear.choose_l2((train - mean) / std, classes, self.num_classes)
        logits = linear.linear_scores((test - mean) / std, weights)
        return np.exp(logits - logits.max(1, keepdims=True)), dict(l2=l2)


class NearestNeighbours(Probe):
    """Probes with the votes of the nearest training images."""

    kind, order, title = "knn", 80, "Nearest neighbors"

    def scores(
        self, test: np.ndarray, train: np.ndarray, classes: np.ndarray
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Votes per class."""
        from coca_jax.evaluation.metrics import linear

        return linear.knn_scores(test, train, classes, self.num_classes), {}
