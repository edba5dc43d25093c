"""Classifiers over frozen features: multinomial logistic regression and k nearest neighbors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

L2_SWEEP = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.1  # fraction of the training features that selects the L2 weight
MAX_ITERATIONS = 200
_AT_ONCE = 1 << 25  # cosines in memory at a time; sorting them takes 16 bytes each


def fit_linear(
    features: np.ndarray,
    classes: np.ndarray,
    num_classes: int,
    l2: float,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Fits multinomial logistic regression: float64 [W + 1, C]; the last row is the bias.

    Minimizes mean cross-entropy + l2 / 2 * sum of squared weights (without biases) with L-BFGS.
    features: float32 [N, W]; classes: int [N]; start: initial weights, zeros by default.
    """
    width = features.shape[1]
    x, y = jnp.asarray(features, jnp.float32), jnp.asarray(classes, jnp.int32)
    weights = np.zeros((width + 1, num_classes)) if start is None else start

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        now = jnp.asarray(flat.reshape(weights.shape), jnp.float32)
        loss, gradient = _objective(now, x, y, np.float32(l2))
        return float(loss), np.asarray(gradient, np.float64).ravel()

    options = dict(maxiter=MAX_ITERATIONS, maxcor=20)
    found = scipy.optimize.minimize(
        evaluate, weights.ravel(), jac=True, method="L-BFGS-B", options=options
    )
    return found.x.reshape(weights.shape)


@jax.jit
@jax.value_and_grad
def _objective(w: jax.Array, x: jax.Array, y: jax.Array, l2: jax.Array) -> jax.Array:
    logits = jnp.dot(x, w[:-1], precision="highest") + w[-1]
    true = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    loss = (jax.nn.logsumexp(logits, axis=1) - true).mean()
    return loss + l2 / 2 * jnp.square(w[:-1]).sum()


def choose_l2(
    features: np.ndarray, classes: np.ndarray, num_classes: int, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Returns (L2 weight from L2_SWEEP with the best holdout accuracy, weights fitted to all data).

    The largest of equally good L2 weights is chosen.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    held = max(1, round(HELD_OUT * len(order)))
    test, train = order[:held], order[held:]
    best, best_right, weights = L2_SWEEP[-1], -1, None
    for l2 in reversed(L2_SWEEP):
        # Warm start from the solution for the next larger L2 weight.
        weights = fit_linear(features[train], classes[train], num_classes, l2, weights)
        right = int((linear_scores(features[test], weights).argmax(1) == classes[test]).sum())
        if right > best_right:
            best, best_right = l2, right
    return best, fit_linear(features, classes, num_classes, best)


def linear_scores(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns logits float64 [N, C] of features [N, W] and weights [W + 1, C]."""
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
    """Returns the votes of the k nearest training features by cosine similarity, float64 [N, C].

    Each neighbor adds exp(cosine / temperature) to its class (Wu et al. 2018). features: [N, W];
    train: [M, W]; classes: int [M]; chunk: rows of the [N, M] cosines in memory at a time (fewer if
    M > 32,768).
    """
    unit = train / np.maximum(np.linalg.norm(train, axis=1, keepdims=True), 1e-12)
    k, chunk = min(k, len(train)), max(min(chunk, _AT_ONCE // len(train)), 1)
    votes = np.zeros((len(features), num_classes))
    for start in range(0, len(features), chunk):
        rows = features[start : start + chunk]
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        cosine = rows @ unit.T
        near = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        # Subtracting the maximum prevents overflow and only scales the row's votes.
        close = np.take_along_axis(cosine, near, 1).astype(np.float64)
        weight = np.exp((close - close.max(1, keepdims=True)) / temperature)
        for column in range(k):
            rows_here = np.arange(start, start + len(rows))
            np.add.at(votes, (rows_here, classes[near[:, column]]), weight[:, column])
    return votes
