"""The losses written down from the papers, with their gradients, in NumPy float64.

Nothing here imports the package. B pairs, E embedding; N tokens, D width, V vocabulary.
"""

import numpy as np


def softmax(scores, axis):
    exp = np.exp(scores - scores.max(axis, keepdims=True))
    return exp / exp.sum(axis, keepdims=True)


def log_sum_exp(scores, axis):
    peak = scores.max(axis)
    return peak + np.log(np.exp(scores - np.expand_dims(peak, axis)).sum(axis))


def relations(ids, duplicates):
    """(targets of each row, summing to 1; pairs that take part), [B, B] each."""
    own = np.eye(len(ids), dtype=bool)
    same = (ids[:, None] == ids[None]).all(-1)
    right = same if duplicates == "positives" else own
    part = own | ~same if duplicates == "ignore" else np.ones_like(own)
    return right / right.sum(1, keepdims=True), part


def contrastive_softmax(image, text, scale, ids, duplicates):
    """Paper, Equation 2, the sum of both directions: (loss, row losses, gradients by image, text
    and scale). Targets are spread evenly over the pairs that count as right."""
    scores = np.where(relations(ids, duplicates)[1], scale * image @ text.T, -np.inf)
    target, part = relations(ids, duplicates)
    finite = np.where(part, scores, 0.0)
    rows = log_sum_exp(scores, 1) + log_sum_exp(scores, 0)
    rows = rows - (target * finite).sum(1) - (target.T * finite).sum(0)
    d_scores = (softmax(scores, 1) + softmax(scores, 0) - target - target.T) / len(image)
    gradients = (
        scale * d_scores @ text,
        scale * d_scores.T @ image,
        (d_scores * (image @ text.T)).sum(),
    )
    return rows.mean(), rows, gradients


def contrastive_sigmoid(image, text, scale, bias, ids, duplicates):
    """Zhai et al. 2023, Algorithm 1: (loss, row losses, gradients by image, text, scale, bias)."""
    target, part = relations(ids, duplicates)
    sign = np.where(target > 0, 1.0, -1.0)
    scores = scale * image @ text.T + bias
    losses = np.where(part, np.logaddexp(0, -sign * scores), 0.0)
    d_scores = np.where(part, -sign / (1 + np.exp(sign * scores)), 0.0) / len(image)
    gradients = (
        scale * d_scores @ text,
        scale * d_scores.T @ image,
        (d_scores * (image @ text.T)).sum(),
    )
    return losses.sum() / len(image), losses.sum(1), (*gradients, d_scores.sum())


def captioning(states, kernel, bias, targets, weights, z_loss=0.0, smoothing=0.0):
    """Paper, Equation 3, a sum over tokens with weights [N]: (loss, negative log-likelihoods [N],
    gradients by states, kernel, bias).

    Label smoothing e gives the target 1 - e + e / V and every other token e / V (Szegedy et al.
    2016); the z-loss adds z_loss x log-sum-exp squared (Chowdhery et al. 2022, Section 5).
    """
    logits = states @ kernel + bias
    lse = log_sum_exp(logits, 1)
    own = np.arange(logits.shape[1]) == targets[:, None]
    wanted = (1 - smoothing) * own + smoothing / logits.shape[1]
    losses = (wanted * (lse[:, None] - logits)).sum(1) + z_loss * lse**2
    d_logits = softmax(logits, 1) * (1 + 2 * z_loss * lse)[:, None] - wanted
    d_logits = d_logits * weights[:, None]
    gradients = d_logits @ kernel.T, states.T @ d_logits, d_logits.sum(0)
    return (losses * weights).sum(), lse - logits[own], gradients
