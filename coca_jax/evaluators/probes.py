"""How much a frozen encoder's features tell: a linear probe and k nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from coca_jax.evaluators import Record, check_finite, in_batches, stack_images
from coca_jax.evaluators.classification import Tally

L2_SWEEP = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.1  # share of the training features that chooses the L2 weight
MAX_ITERATIONS = 200

Encode = Callable[[Any], np.ndarray]


def fit_linear(
    features: np.ndarray,
    classes: np.ndarray,
    num_classes: int,
    l2: float,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Multinomial logistic regression: float64 [W + 1, C], the last row the biases.

    Minimises mean cross-entropy + l2 / 2 * sum of squared weights (biases apart) by L-BFGS.
    features float32 [N, W]; classes int [N]; start: weights to begin with, zeros by default.
    """
    width = features.shape[1]
    x, y = jnp.asarray(features, jnp.float32), jnp.asarray(classes, jnp.int32)
    weights = np.zeros((width + 1, num_classes)) if start is None else start

    @jax.jit
    def objective(x: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        def value(w: jax.Array) -> jax.Array:
            logits = jnp.dot(x, w[:-1], precision="highest") + w[-1]
            true = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
            loss = (jax.nn.logsumexp(logits, axis=1) - true).mean()
            return loss + l2 / 2 * jnp.square(w[:-1]).sum()

        return jax.value_and_grad(value)(w)

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = objective(x, y, jnp.asarray(flat.reshape(weights.shape), jnp.float32))
        return float(loss), np.asarray(gradient, np.float64).ravel()

    options = dict(maxiter=MAX_ITERATIONS, maxcor=20)
    found = scipy.optimize.minimize(
        evaluate, weights.ravel(), jac=True, method="L-BFGS-B", options=options
    )
    return found.x.reshape(weights.shape)


def choose_l2(
    features: np.ndarray, classes: np.ndarray, num_classes: int, seed: int = 0
) -> tuple[float, np.ndarray]:
    """(the L2 weight of L2_SWEEP with the most right on a held-out part, weights fitted to all).

    Of equal ones the largest is taken. Each fit starts from the one before, with a larger L2.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    held = max(1, round(HELD_OUT * len(order)))
    test, train = order[:held], order[held:]
    best, best_right, weights = L2_SWEEP[-1], -1, None
    for l2 in reversed(L2_SWEEP):
        weights = fit_linear(features[train], classes[train], num_classes, l2, weights)
        right = int((linear_scores(features[test], weights).argmax(1) == classes[test]).sum())
        if right > best_right:
            best, best_right = l2, right
    return best, fit_linear(features, classes, num_classes, best)


def linear_scores(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Logits float64 [N, C] of features [N, W] by weights [W + 1, C]."""
    return features @ weights[:-1] + weights[-1]


def knn_scores(
    features: np.ndarray,
    train: np.ndarray,
    classes: np.ndarray,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> np.ndarray:
    """Votes of the k nearest training features by cosine, float64 [N, C].

    Each neighbour adds exp(cosine / temperature) to its class (Wu et al. 2018). features [N, W],
    train [M, W], classes int [M]; `chunk` rows of the N x M cosines exist at a time.
    """
    unit = train / np.maximum(np.linalg.norm(train, axis=1, keepdims=True), 1e-12)
    k = min(k, len(train))
    votes = np.zeros((len(features), num_classes))
    for start in range(0, len(features), chunk):
        rows = features[start : start + chunk]
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        cosine = rows @ unit.T
        near = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        # Less the largest: a common factor of a row, and no overflow.
        close = np.take_along_axis(cosine, near, 1).astype(np.float64)
        weight = np.exp((close - close.max(1, keepdims=True)) / temperature)
        for column in range(k):
            rows_here = np.arange(start, start + len(rows))
            np.add.at(votes, (rows_here, classes[near[:, column]]), weight[:, column])
    return votes


class Probe:
    """Classifies by features of the frozen encoder.

    Args:
      kind: 'linear_probe' or 'knn'.
      data_name: of the data set, the second part of the metrics' names.
      class_names: distinct names, [classes].
      train: records to learn from, with `image` and `labels`.
      batch_size: images at a time.
      num_examples: pictures kept for the report.
      progress: shows bars.
      cache: features by 'train' and 'test', filled in here: for another probe of the same model on
        the same records.
    """

    def __init__(
        self,
        kind: str,
        data_name: str,
        class_names: Sequence[str],
        train: Iterable[Record],
        *,
        batch_size: int = 256,
        num_examples: int = 16,
        progress: bool = False,
        cache: dict[str, np.ndarray] | None = None,
    ):
        self._cache: dict[str, np.ndarray] = {} if cache is None else cache
        self.kind, self.name = kind, f"{kind}/{data_name}"
        self._new_tally = lambda: Tally(self.name, class_names, num_examples=num_examples)
        self._new_tally()  # refuses unsuitable names now
        self.num_classes, self.train = len(class_names), train
        self.batch_size, self.progress = batch_size, progress
        self.examples: dict[str, Any] = {}
        self.classes: dict[str, Any] = {}

    def run(self, predict: Any, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields what `ZeroShot.run` does, num_train, and l2 of a linear probe.

        predict.features: N images -> float32 [N, W]. records can be gone through more than once,
        and have `image` and `labels`; of several labels the first that is a class is learned.
        Afterwards `examples` and `classes` are as those of ZeroShot.
        """
        tally = self._new_tally()
        train_x = self._features(predict.features, self.train, "train")
        train_y = np.array([tally.true_classes(record)[0] for record in self.train])
        test_x = self._features(predict.features, records, "test")
        if self.kind == "linear_probe":
            # Features of unit variance: one sweep of L2 weights then fits every model.
            mean, std = train_x.mean(0), np.maximum(train_x.std(0), 1e-6)
            l2, weights = choose_l2((train_x - mean) / std, train_y, self.num_classes)
            logits = linear_scores((test_x - mean) / std, weights)
            scores = np.exp(logits - logits.max(1, keepdims=True))
            yield f"{self.name}/l2", l2
        else:
            scores = knn_scores(test_x, train_x, train_y, self.num_classes)
        scores /= scores.sum(1, keepdims=True)
        start = 0
        for batch in in_batches(records, self.batch_size):
            tally.add(scores[start : start + len(batch)], batch)
            start += len(batch)
        yield from tally.results()
        yield f"{self.name}/num_train", float(len(train_x))
        self.examples, self.classes = tally.examples(), tally.classes()

    def _features(self, encode: Encode, records: Iterable[Record], which: str) -> np.ndarray:
        if which in self._cache:
            return self._cache[which]
        show = f"{self.name} {which} images" if self.progress else ""
        parts = [
            check_finite(np.asarray(encode(stack_images(batch)), np.float32), "image")
            for batch in in_batches(records, self.batch_size, show=show)
        ]
        if not parts:
            raise ValueError(f"{self.name} has no record; check the data set and its split")
        self._cache[which] = np.concatenate(parts)
        return self._cache[which]
