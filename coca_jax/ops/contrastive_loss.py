"""The contrastive loss on arrays, exact on any mesh and small in memory.

It works per device on the rows that the device holds, on a tile of columns at a time, and defines
its own gradient: a large similarity matrix [B, B] never exists. Without a mesh it is a plain function
of arrays.

Shape letters: B batch, b a device's rows, C columns of a tile, E embedding.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from coca_jax.ops.reference import wide
from coca_jax.parallel import sharding

HIGHEST = jax.lax.Precision.HIGHEST
TILE_ELEMENTS = 1 << 24  # similarities on a device at a time by default: 64 MiB of float32
NEGATIVE = -1e30  # stands for minus infinity where a difference of two must stay finite


class ContrastiveOptions(NamedTuple):
    """kind: 'softmax' (paper, Eq. 2) or 'sigmoid' (SigLIP). duplicates: what pairs with equal text
    are to each other: 'negatives', 'ignore' or 'positives'. chunk: see `tile_width`."""

    kind: str = "softmax"
    duplicates: str = "negatives"
    chunk: int = 0


def contrastive_loss(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    *,
    logit_bias: jax.Array | None = None,
    text_id: jax.Array | None = None,
    kind: str = "softmax",
    duplicates: str = "negatives",
    chunk: int = 0,
    reduction: str = "sum",
) -> tuple[jax.Array, jax.Array]:
    """The contrastive loss of B pairs with all B x B combinations as candidates.

    Args:
      image: float32 [B, E], L2-normalised.
      text: float32 [B, E], L2-normalised.
      scale: float32, the inverse temperature.
      logit_bias: float32, for the sigmoid loss.
      text_id: int32 [B, 2]; equal rows are equal texts. Needed unless duplicates='negatives'.
      kind: 'softmax' or 'sigmoid'.
      duplicates: what equal texts are to each other: 'negatives', 'ignore' or 'positives'.
      chunk: columns of the similarities that exist at a time; see `tile_width`.
      reduction: of the softmax loss's two directions, 'sum' (paper, Eq. 2) or 'mean'.

    Returns:
      (loss, row losses [B] without gradient). 'positives' spreads a row's target evenly over the
      pairs with its text; these share the losses of their columns. The sigmoid loss is the sum over
      pairs divided by B.

    Raises ValueError for an unknown option, or without text_id where it is needed.
    """
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"loss.contrastive={kind!r}; choose 'softmax' or 'sigmoid'")
    if duplicates not in ("negatives", "ignore", "positives"):
        raise ValueError(
            f"loss.duplicate_texts={duplicates!r}; choose 'negatives', 'ignore' or 'positives'"
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"loss.reduction={reduction!r}; choose 'sum' or 'mean'")
    if text_id is None:
        if duplicates != "negatives":
            raise ValueError(f"loss.duplicate_texts={duplicates!r} needs text_id for every pair")
        text_id = jnp.zeros((image.shape[0], 2), jnp.int32)
    if logit_bias is None:
        logit_bias = jnp.zeros((), scale.dtype)
    options = ContrastiveOptions(kind, duplicates, chunk)
    image, text = image.astype(wide(image.dtype)), text.astype(wide(text.dtype))
    loss, rows = _contrastive(image, text, scale, logit_bias, text_id, options)
    factor = 0.5 if (kind == "softmax" and reduction == "mean") else 1.0
    return loss * factor, jax.lax.stop_gradient(rows) * factor


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _contrastive(image, text, scale, logit_bias, text_id, options):
    return _contrastive_forward(image, text, scale, logit_bias, text_id, options)[0]


def _contrastive_forward(image, text, scale, logit_bias, text_id, options):
    run = sharding.per_device(
        functools.partial(_forward_rows, options=options),
        image.shape[0],
        inputs=("rows", "rows", "all", "all", "rows"),
        outputs=("all", "rows", "rows", "all", "rows"),
        thing="pairs",
    )
    loss, rows, row_lse, column_lse, matches = run(image, text, scale, logit_bias, text_id)
    saved = (image, text, scale, logit_bias, text_id, row_lse, column_lse, matches)
    return (loss, rows), saved


def _contrastive_backward(options, saved, cotangents):
    image, text, scale, logit_bias, text_id, row_lse, column_lse, matches = saved
    run = sharding.per_device(
        functools.partial(_backward_rows, options=options),
        image.shape[0],
        inputs=("rows", "rows", "all", "all", "rows", "rows", "all", "rows"),
        outputs=("rows", "rows", "all", "all"),
        thing="pairs",
    )
    gradients = run(image, text, scale, logit_bias, text_id, row_lse, column_lse, matches)
    return *(g * cotangents[0] for g in gradients), None


_contrastive.defvjp(_contrastive_forward, _contrastive_backward)


def tile_width(size: int, chunk: int, rows: int) -> int:
    """Columns per tile of a matrix [rows, size] on one device: the largest divisor of `size` up to
    `chunk` (for chunk=0: up to what fills TILE_ELEMENTS). Many narrow tiles are slow, so a divisor
    below half of that is replaced by the next larger one."""
    target = min(chunk or max(TILE_ELEMENTS // rows, 1), size)
    divisors = [c for c in range(1, size + 1) if size % c == 0]
    below = max(c for c in divisors if c <= target)
    return below if 2 * below >= target else min(c for c in divisors if c >= target)


def _tiles(x: jax.Array, chunk: int, rows: int) -> jax.Array:
    """[B, ...] -> [B / C, C, ...]; C is the tile's width."""
    width = tile_width(size := x.shape[0], chunk, rows)
    return x.reshape((size // width, width) + x.shape[1:])


def _relations(row_ids, column_ids, row_index, column_index, duplicates):
    """bool [b, C] each: (target pairs, pairs that take part)."""
    own = row_index[:, None] == column_index[None, :]
    if duplicates == "negatives":
        return own, None
    same = jnp.all(row_ids[:, None, :] == column_ids[None, :, :], axis=-1)
    if duplicates == "ignore":
        return own, own | ~same
    return same, None


def _columns(collectives, text, text_id, options):
    """The gathered texts cut in tiles: embeddings, ids, positions in the batch."""
    ids = collectives.gather(text_id)
    index = jnp.arange(ids.shape[0])
    arrays = (collectives.gather(text), ids, index)
    return tuple(_tiles(x, options.chunk, text.shape[0]) for x in arrays)


def _forward_rows(collectives, _, image, text, scale, logit_bias, text_id, *, options):
    local = image.shape[0]
    tiles = _columns(collectives, text, text_id, options)
    batch = tiles[2].size
    row_index = collectives.index() * local + jnp.arange(local)

    def softmax_tile(carry, tile):
        peak, total, target, matches = carry
        columns, column_ids, column_index = tile
        scores = scale * jnp.dot(image, columns.T, precision=HIGHEST)
        positive, allowed = _relations(text_id, column_ids, row_index, column_index, options[1])
        target = target + jnp.where(positive, scores, 0.0).sum(1)
        matches = matches + positive.sum(1, dtype=jnp.int32)
        if allowed is not None:
            scores = jnp.where(allowed, scores, NEGATIVE)
        new_peak = jnp.maximum(peak, scores.max(1))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(scores - new_peak[:, None]).sum(1)
        column_peak = scores.max(0)
        column_total = jnp.exp(scores - column_peak).sum(0)
        return (new_peak, total, target, matches), (column_peak, column_total)

    def sigmoid_tile(carry, tile):
        columns, column_ids, column_index = tile
        scores = scale * jnp.dot(image, columns.T, precision=HIGHEST) + logit_bias
        positive, allowed = _relations(text_id, column_ids, row_index, column_index, options[1])
        losses = -jax.nn.log_sigmoid(jnp.where(positive, scores, -scores))
        if allowed is not None:
            losses = jnp.where(allowed, losses, 0.0)
        return carry + losses.sum(1), None

    zeros = jnp.zeros((local,), image.dtype)
    if options.kind == "sigmoid":
        rows = jax.lax.scan(sigmoid_tile, zeros, tiles)[0]
        unused = jnp.zeros((batch,), image.dtype)
        return collectives.sum(rows.sum()) / batch, rows, zeros, unused, zeros
    start = (jnp.full_like(zeros, NEGATIVE), zeros, zeros, jnp.zeros((local,), jnp.int32))
    (peak, total, target, matches), column_stats = jax.lax.scan(softmax_tile, start, tiles)
    row_lse = peak + jnp.log(total)
    column_peak, column_total = (x.reshape(-1) for x in column_stats)
    top = collectives.max(column_peak)
    column_lse = top + jnp.log(collectives.sum(column_total * jnp.exp(column_peak - top)))
    own_columns = jax.lax.dynamic_slice_in_dim(column_lse, collectives.index() * local, local)
    rows = row_lse + own_columns - 2 * target / matches
    loss = collectives.sum(rows.sum()) / batch
    return loss, rows, row_lse, column_lse, matches.astype(image.dtype)


def _backward_rows(
    collectives,
    _,
    image,
    text,
    scale,
    logit_bias,
    text_id,
    row_lse,
    column_lse,
    matches,
    *,
    options,
):
    local = image.shape[0]
    tiles = _columns(collectives, text, text_id, options)
    batch = tiles[2].size
    row_index = collectives.index() * local + jnp.arange(local)

    def tile_gradient(carry, tile):
        d_image, d_bias = carry
        (columns, column_ids, column_index), lse = tile
        scores = scale * jnp.dot(image, columns.T, precision=HIGHEST)
        positive, allowed = _relations(text_id, column_ids, row_index, column_index, options[1])
        if options.kind == "sigmoid":
            scores = scores + logit_bias
            g = jnp.where(positive, -jax.nn.sigmoid(-scores), jax.nn.sigmoid(scores))
        else:
            g = jnp.exp(scores - row_lse[:, None]) + jnp.exp(scores - lse[None, :])
        if allowed is not None:
            g = jnp.where(allowed, g, 0.0)
        if options.kind == "softmax":
            g = g - jnp.where(positive, 2 / matches[:, None], 0.0)
        d_image = d_image + jnp.dot(g, columns, precision=HIGHEST)
        d_columns = jax.lax.dot_general(g, image, (((0,), (0,)), ((), ())), precision=HIGHEST)
        return (d_image, d_bias + g.sum()), d_columns

    start = (jnp.zeros_like(image), jnp.zeros((), image.dtype))
    lse_tiles = _tiles(column_lse, options.chunk, local)
    (d_image, d_bias), d_text = jax.lax.scan(tile_gradient, start, (tiles, lse_tiles))
    d_text = collectives.scatter_sum(d_text.reshape((batch, -1)))
    d_scale = collectives.sum((d_image * image).sum()) / batch
    return scale * d_image / batch, scale * d_text / batch, d_scale, collectives.sum(d_bias) / batch


# The contrastive loss over all examples of the data, from small batches (SogCLR, Yuan et al. 2022;
# FastCLIP, Wei et al. 2024).
#
# For an image i the loss over N examples is log(1 + sum over j of exp(s_ij - s_ii)), s being scaled
# similarities, and so is that of a text. Its gradient divides by the sum over all j, which a small
# batch does not know. So a moving mean u_i of exp(s_ij - s_ii) is kept for each example, from visit
# to visit, and the gradient of a batch's own mean g_i is divided by 1 / (N - 1) + u_i. A batch of all
# examples without memory (rate 1) gives the loss of `contrastive.contrastive_loss`.
#
# Means are kept as logarithms: at an inverse temperature of 100 their terms reach exp(200).


UNSEEN = -1e30  # the logarithm kept of an example that was never in a batch


class Estimates(NamedTuple):
    """Logarithms of the means of rows [B], float32: of each as an image, and as a text."""

    image: jax.Array
    text: jax.Array


def global_contrastive_loss(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    stored: Estimates,
    *,
    num_examples: int,
    rate: float,
    text_id: jax.Array | None = None,
    chunk: int = 0,
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
        chunk: rows of the similarities that exist at a time; see `tile_width`.
        reduction: of both directions, 'sum' or 'mean'.

    Returns:
        (loss: the mean over the rows, by the means kept; its rows [B]; the new means). Nothing but
        the loss has a gradient.
    """
    count = image.shape[0]
    ids = jnp.arange(count)[:, None] if text_id is None else text_id
    own = scale * (image * text).sum(1)
    factor = 0.5 if reduction == "mean" else 1.0
    width = tile_width(
        count, chunk, max(count // sharding.batch_parts(jax.sharding.get_abstract_mesh()), 1)
    )

    def split(x: jax.Array) -> jax.Array:
        """[B, ...] -> [B / C, C, ...]. A tile takes rows at equal distances, so that each device
        holds a part of every tile."""
        return x.reshape((width, count // width) + x.shape[1:]).swapaxes(0, 1)

    # Computed again in the backward pass, which would otherwise store the tiles of all rows.
    @jax.checkpoint
    def tile(columns, rows, own, ids_of_rows, old):
        excess = scale * jnp.dot(rows, columns.T, precision=HIGHEST) - own[:, None]  # [C, B]
        negative = ~(ids_of_rows[:, None] == ids[None]).all(-1)
        number = jnp.maximum(negative.sum(1), 1)
        now = jax.nn.logsumexp(jnp.where(negative, excess, UNSEEN), axis=1) - jnp.log(number)
        new = jnp.where(negative.any(1), updated(old, now, rate), old)
        new = jax.lax.stop_gradient(new)
        total = jnp.logaddexp(-math.log(num_examples - 1), new)
        share = excess - (jnp.log(number) + total)[:, None]
        share = jax.lax.stop_gradient(jnp.exp(jnp.where(negative, share, UNSEEN)))
        slope = (share * excess).sum(1)  # has the gradient; the value is that of `total`
        value = math.log(num_examples - 1) + total
        return factor * (value + slope - jax.lax.stop_gradient(slope)), new

    losses, found = jnp.zeros_like(own), []
    for rows, columns, old in ((image, text, stored.image), (text, image, stored.text)):
        tiles = tuple(split(x) for x in (rows, own, ids, old))
        each, new = jax.lax.map(lambda t, columns=columns: tile(columns, *t), tiles)
        each, new = (x.swapaxes(0, 1).reshape(count) for x in (each, new))
        losses = losses + each
        found.append(new)
    return losses.mean(), jax.lax.stop_gradient(losses), Estimates(*found)


def updated(old: jax.Array, now: jax.Array, rate: float) -> jax.Array:
    """Logarithms of the moving means [B] after a batch whose own are `now`; a first visit's are its
    own."""
    if rate == 1:
        return now
    mixed = jnp.logaddexp(math.log(1 - rate) + old, math.log(rate) + now)
    return jnp.where(old <= UNSEEN / 2, now, mixed)
