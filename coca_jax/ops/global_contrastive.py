"""The contrastive loss over all examples of the data, from small batches (SogCLR, Yuan et al. 2022;
FastCLIP, Wei et al. 2024).

For an image i the loss over N examples is log(1 + sum over j of exp(s_ij - s_ii)), s being scaled
similarities, and so is that of a text. Its gradient divides by the sum over all j, which a small
batch does not know. So a moving mean u_i of exp(s_ij - s_ii) is kept for each example, from visit
to visit, and the gradient of a batch's own mean g_i is divided by 1 / (N - 1) + u_i. A batch of all
examples without memory (rate 1) gives the loss of `contrastive.contrastive_loss`.

Means are kept as logarithms: at an inverse temperature of 100 their terms reach exp(200).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from coca_jax.ops.reference import wide

UNSEEN = -1e30  # the logarithm kept of an example that was never in a batch


class Estimates(NamedTuple):
    """Logarithms of the means of rows [B], float32: of each as an image, and as a text."""

    image: jax.Array
    text: jax.Array


def global_contrastive_loss(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    kept: Estimates,
    *,
    num_examples: int,
    rate: float,
    text_id: jax.Array | None = None,
    reduction: str = "sum",
) -> tuple[jax.Array, jax.Array, Estimates]:
    """The loss of a batch's rows against all examples.

    Args:
        image, text: [B, E], L2-normalised, float32 or wider.
        scale: inverse temperature.
        kept: of these rows, from their last visits; UNSEEN at first. A row without a negative in
            the batch keeps its own.
        num_examples: N, 2 at least.
        rate: the share that a batch has in the new means.
        text_id: int32 [B, 2]; rows that are equal in it are no negatives of each other. None: all
            others are.
        reduction: of both directions, 'sum' or 'mean'.

    Returns:
        (loss: the mean over the rows, by the means kept; its rows [B]; the new means). Nothing but
        the loss has a gradient.
    """
    similarity = scale * jnp.dot(image, text.T, preferred_element_type=wide(image.dtype))
    count = similarity.shape[0]
    negative = ~jnp.eye(count, dtype=bool)
    if text_id is not None:
        negative &= ~(text_id[:, None] == text_id[None]).all(-1)
    own = jnp.diagonal(similarity)
    factor = 0.5 if reduction == "mean" else 1.0
    loss, rows, found = jnp.zeros((), similarity.dtype), jnp.zeros_like(own), []
    for scores, old in ((similarity, kept.image), (similarity.T, kept.text)):
        excess = scores - own[:, None]  # [B, B]
        number = jnp.maximum(negative.sum(1), 1)
        now = jax.nn.logsumexp(jnp.where(negative, excess, UNSEEN), axis=1) - jnp.log(number)
        new = jnp.where(negative.any(1), updated(old, now, rate), old)
        new = jax.lax.stop_gradient(new)
        whole = jnp.logaddexp(-math.log(num_examples - 1), new)
        share = excess - (jnp.log(number) + whole)[:, None]
        share = jax.lax.stop_gradient(jnp.exp(jnp.where(negative, share, UNSEEN)))
        slope = (share * excess).sum(1)  # has the gradient; the value is that of `whole`
        value = math.log(num_examples - 1) + whole
        each = factor * (value + slope - jax.lax.stop_gradient(slope))
        loss, rows = loss + each.mean(), rows + each
        found.append(new)
    return loss, jax.lax.stop_gradient(rows), Estimates(*found)


def updated(old: jax.Array, now: jax.Array, rate: float) -> jax.Array:
    """Logarithms of the moving means [B] after a batch whose own are `now`; a first visit's are its
    own."""
    if rate == 1:
        return now
    mixed = jnp.logaddexp(math.log(1 - rate) + old, math.log(rate) + now)
    return jnp.where(old <= UNSEEN / 2, now, mixed)
