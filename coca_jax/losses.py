"""The contrastive and the captioning loss on arrays, exact on any mesh and small in memory.

Both work per device on the rows that the device holds (shard_map over 'data' and 'fsdp') and
define their own gradients, so that neither the similarity matrix [B, B] nor the logits [B, L, V]
ever exist when a chunk size is given. Without a mesh they are plain functions of arrays.

Shape letters: B batch, b a device's rows, C columns of a tile, E embedding, N tokens, D width,
V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from coca_jax import partitioning
from coca_jax.ops.reference import wide

BATCH_AXES = ("data", "fsdp")
HIGHEST = jax.lax.Precision.HIGHEST
NEGATIVE = -1e30  # stands for minus infinity where a difference of two must stay finite


class ContrastiveOptions(NamedTuple):
    """kind: 'softmax' (paper, Eq. 2) or 'sigmoid' (SigLIP). duplicates: what pairs with equal text
    are to each other: 'negatives', 'ignore' or 'positives'. chunk: columns per tile, 0: all."""

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
      image, text: float32 [B, E], L2-normalised.
      scale: float32, the inverse temperature.
      logit_bias: float32, for the sigmoid loss.
      text_id: int32 [B, 2]; equal rows are equal texts. Needed unless duplicates='negatives'.
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
    run = _per_device(
        functools.partial(_forward_rows, options=options),
        image.shape[0],
        in_specs=("rows", "rows", "all", "all", "rows"),
        out_specs=("all", "rows", "rows", "all", "rows"),
    )
    loss, rows, row_lse, column_lse, matches = run(image, text, scale, logit_bias, text_id)
    saved = (image, text, scale, logit_bias, text_id, row_lse, column_lse, matches)
    return (loss, rows), saved


def _contrastive_backward(options, saved, cotangents):
    image, text, scale, logit_bias, text_id, row_lse, column_lse, matches = saved
    run = _per_device(
        functools.partial(_backward_rows, options=options),
        image.shape[0],
        in_specs=("rows", "rows", "all", "all", "rows", "rows", "all", "rows"),
        out_specs=("rows", "rows", "all", "all"),
    )
    gradients = run(image, text, scale, logit_bias, text_id, row_lse, column_lse, matches)
    return *(g * cotangents[0] for g in gradients), None


_contrastive.defvjp(_contrastive_forward, _contrastive_backward)


class _Collectives(NamedTuple):
    """Collectives over the batch axes, or their one-device meaning when axes is empty."""

    axes: tuple[str, ...]

    # One axis at a time: the TPU compiler turns a gather over two axes into a sum of zeros.
    def gather(self, x):
        for axis in reversed(self.axes):
            x = jax.lax.all_gather(x, axis, tiled=True)
        return x

    def scatter_sum(self, x):
        for axis in self.axes:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return x

    def sum(self, x):
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x):
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def index(self):
        return jax.lax.axis_index(self.axes) if self.axes else 0


def _per_device(function, batch, in_specs, out_specs):
    """Runs function(collectives, *arrays) on each device's rows; directly without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return functools.partial(function, _Collectives(()))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % parts:
        raise ValueError(f"a batch of {batch} pairs cannot be split over {parts} devices evenly")
    specs = {"rows": P(BATCH_AXES), "all": P()}
    return jax.shard_map(
        functools.partial(function, _Collectives(BATCH_AXES)),
        mesh=mesh,
        in_specs=tuple(specs[s] for s in in_specs),
        out_specs=tuple(specs[s] for s in out_specs),
        check_vma=False,
    )


def _tiles(x: jax.Array, chunk: int) -> jax.Array:
    """[B, ...] -> [B / C, C, ...]; C is the largest divisor of B up to chunk."""
    size = x.shape[0]
    width = size if chunk <= 0 else max(c for c in range(1, min(chunk, size) + 1) if size % c == 0)
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
    return tuple(_tiles(x, options.chunk) for x in (collectives.gather(text), ids, index))


def _forward_rows(collectives, image, text, scale, logit_bias, text_id, *, options):
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
    collectives, image, text, scale, logit_bias, text_id, row_lse, column_lse, matches, *, options
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
    lse_tiles = _tiles(column_lse, options.chunk)
    (d_image, d_bias), d_text = jax.lax.scan(tile_gradient, start, (tiles, lse_tiles))
    d_text = collectives.scatter_sum(d_text.reshape((batch, -1)))
    d_scale = collectives.sum((d_image * image).sum()) / batch
    return scale * d_image / batch, scale * d_text / batch, d_scale, collectives.sum(d_bias) / batch


def captioning_loss(
    states: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Autoregressive cross-entropy (paper, Eq. 3), averaged over all target tokens of the batch.

    Args:
      states: [B, L, D], the decoder's output where `targets` come next; their dtype is that of
        the products with the softmax layer, log-sum-exp runs in float32.
      kernel: float32 [D, V]; bias: float32 [V] or None.
      targets: int [B, L], already shifted; mask: bool [B, L], True at real targets.
      chunk: tokens projected at a time on each device; 0: all. With chunks only real targets are
        projected, and the gradients are made in the forward pass, so logits [B, L, V] never exist.
      z_loss: weight of the squared log-sum-exp.

    Returns:
      (loss, negative log-likelihood of each target, float32 [B, L], 0 where masked, no gradient).
    """
    weights = mask.astype(wide(states.dtype)) / jnp.maximum(mask.sum(), 1)
    return weighted_captioning_loss(
        states,
        kernel,
        bias,
        targets,
        weights,
        chunk=chunk,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )


def weighted_captioning_loss(
    states: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """As `captioning_loss`, with a float32 weight for each target [B, L] instead of the mean."""
    bias_or_zero = jnp.zeros((kernel.shape[1],), kernel.dtype) if bias is None else bias
    options = (chunk, z_loss, label_smoothing, bias is not None)
    if chunk <= 0:
        loss, nll = _token_losses(states, kernel, bias_or_zero, targets, options)
        return (loss * weights).sum(), jax.lax.stop_gradient(jnp.where(weights > 0, nll, 0.0))
    return _chunked_captioning(states, kernel, bias_or_zero, targets, weights, options)


def _token_losses(states, kernel, bias, targets, options):
    """(loss, negative log-likelihood) of each token, float32 [...], from states [..., D]."""
    _, z_loss, smoothing, _ = options
    logits = jnp.einsum(
        "...d,dv->...v",
        states,
        kernel.astype(states.dtype),
        preferred_element_type=wide(states.dtype),
    )
    logits = partitioning.constrain(logits + bias, "batch", "length", "vocab")
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = nll
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (lse - logits.mean(-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(lse)
    return loss, nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked_captioning(states, kernel, bias, targets, weights, options):
    run = _captioning_per_device(options, False, states.shape, kernel.shape)
    return run(states, kernel.astype(states.dtype), bias, targets, weights)[:2]


def _chunked_forward(states, kernel, bias, targets, weights, options):
    # Cast before the devices' shares are gathered: half the bytes in bfloat16.
    run = _captioning_per_device(options, True, states.shape, kernel.shape)
    matrix = kernel.astype(states.dtype)
    loss, nll, *gradients = run(states, matrix, bias, targets, weights)
    return (loss, nll), tuple(gradients)


def _chunked_backward(options, gradients, cotangents):
    d_states, d_kernel, d_bias = gradients
    g = cotangents[0]
    return (d_states * g.astype(d_states.dtype), d_kernel * g, d_bias * g, None, None)


_chunked_captioning.defvjp(_chunked_forward, _chunked_backward)


def _captioning_per_device(options, with_gradients, shape, kernel_shape):
    batch = shape[0]
    function = functools.partial(_caption_rows, options=options, with_gradients=with_gradients)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return functools.partial(function, _Collectives(()), _Collectives(()))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % parts:
        raise ValueError(f"a batch of {batch} captions cannot be split over {parts} devices evenly")
    rows, vocab = P(BATCH_AXES), P("tensor")
    # The kernel's gradient leaves as its parameter lives (partitioning.param_spec).
    width, size = kernel_shape
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    axis, d_kernel = None, P(None, "tensor")
    if size % (fsdp * tensor) == 0:
        axis, d_kernel = 1, P(None, ("tensor", "fsdp"))
    elif width % fsdp == 0:
        axis, d_kernel = 0, P("fsdp", "tensor")
    function = functools.partial(function, scatter_axis=axis)
    outputs = (P(), rows) + ((rows, d_kernel, vocab) if with_gradients else ())
    return jax.shard_map(
        functools.partial(function, _Collectives(BATCH_AXES), _Collectives(("tensor",))),
        mesh=mesh,
        in_specs=(rows, P(None, "tensor"), vocab, rows, rows),
        out_specs=outputs,
        check_vma=False,
    )


def _caption_rows(
    batch_axes: _Collectives,
    vocab_axis: _Collectives,
    states: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    options: tuple[int, float, float, bool],
    with_gradients: bool,
    scatter_axis: int | None = None,
) -> tuple[Any, ...]:
    """Loss and gradients over one device's rows and its share of the vocabulary."""
    chunk, z_loss, smoothing, biased = options
    dtype = wide(states.dtype)
    shape, width = targets.shape, states.shape[-1]
    count, local_vocab = targets.size, kernel.shape[1]
    vocab = local_vocab * (jax.lax.axis_size("tensor") if vocab_axis.axes else 1)
    chunk = min(chunk, count)
    padding = -count % chunk
    # Real targets first, so that the last chunks may hold padding only.
    order = jnp.argsort(weights.reshape(-1) <= 0, stable=True)
    pad = functools.partial(jnp.pad, pad_width=(0, padding))
    x = jnp.pad(states.reshape(count, width)[order], ((0, padding), (0, 0)))
    y = pad(targets.reshape(-1)[order]) - vocab_axis.index() * local_vocab
    w = pad(weights.reshape(-1)[order])
    real = jnp.sum(w > 0)
    matrix = kernel
    vocabulary = jnp.arange(local_vocab)

    def body(i, carry):
        loss, nll, d_x, d_kernel = carry
        start = i * chunk
        rows = jax.lax.dynamic_slice_in_dim(x, start, chunk)
        target = jax.lax.dynamic_slice_in_dim(y, start, chunk)
        weight = jax.lax.dynamic_slice_in_dim(w, start, chunk)
        logits = jnp.dot(rows, matrix, preferred_element_type=dtype) + bias
        peak = vocab_axis.max(logits.max(-1))
        exp = jnp.exp(logits - peak[:, None])
        total = exp.sum(-1)
        # A comparison instead of a gather and a scatter: it fuses with the passes over the logits.
        own = vocabulary == target[:, None]
        picked = jnp.where(own, logits, 0.0).sum(-1)
        if with_gradients and states.dtype == jnp.bfloat16:
            # One pass over the logits, stored in half the bytes: both products of the gradient
            # start from these.
            stored = exp.astype(states.dtype), total, picked
            exp, total, picked = jax.lax.optimization_barrier(stored)
        total, picked = vocab_axis.sum(total), vocab_axis.sum(picked)
        lse = peak + jnp.log(total)
        token_nll = lse - picked
        token_loss = token_nll
        if smoothing:
            mean = vocab_axis.sum(logits.sum(-1)) / vocab
            token_loss = (1 - smoothing) * token_nll + smoothing * (lse - mean)
        if z_loss:
            token_loss = token_loss + z_loss * jnp.square(lse)
        loss = loss + (token_loss * weight).sum()
        nll = jax.lax.dynamic_update_slice_in_dim(
            nll, jnp.where(weight > 0, token_nll, 0.0), start, 0
        )
        if with_gradients:
            factor = weight * (1 + 2 * z_loss * lse) if z_loss else weight

            def gradient(exp):
                d_logits = exp.astype(dtype) * (factor / total)[:, None]
                if smoothing:
                    d_logits = d_logits - (smoothing / vocab) * weight[:, None]
                return d_logits - jnp.where(own, (1 - smoothing) * weight[:, None], 0.0)

            d_logits = gradient(exp)
            d_rows = jax.lax.dot_general(
                d_logits.astype(states.dtype),
                matrix,
                (((1,), (1,)), ((), ())),
                preferred_element_type=dtype,
            )
            d_rows = vocab_axis.sum(d_rows).astype(states.dtype)
            d_x = jax.lax.dynamic_update_slice_in_dim(d_x, d_rows, start, 0)
            if states.dtype == jnp.bfloat16:
                # Another array to the compiler each time, so that each product makes its operand
                # on the way in and none is stored.
                exp = jax.lax.optimization_barrier(exp)
                d_logits = gradient(exp)
            d_kernel = d_kernel + jax.lax.dot_general(
                jnp.pad(rows, ((0, 0), (0, extra)), constant_values=1) if extra else rows,
                d_logits.astype(states.dtype),
                (((0,), (0,)), ((), ())),
                preferred_element_type=dtype,
            )
        return loss, nll, d_x, d_kernel

    zero = jnp.zeros((), dtype)
    start = (zero, jnp.zeros_like(w), zero, zero)
    # The bias's gradient is a further row of the kernel's, of states that are 1 (a tile of eight).
    extra = 8 if biased else 0
    if with_gradients:
        d_kernel = jnp.zeros((width + extra, local_vocab), dtype)
        start = (zero, jnp.zeros_like(w), jnp.zeros_like(x), d_kernel)
    if count <= chunk:
        loss, nll, d_x, d_kernel = body(0, start)
    else:
        # A loop of known length, so that its cost can be told before it runs; chunks that hold
        # padding only are skipped.
        def chunk_or_nothing(i, carry):
            return jax.lax.cond(i * chunk < real, lambda c: body(i, c), lambda c: c, carry)

        trips = (count + padding) // chunk
        loss, nll, d_x, d_kernel = jax.lax.fori_loop(0, trips, chunk_or_nothing, start)
    back = jnp.argsort(order)
    loss, nll = batch_axes.sum(loss), nll[:count][back].reshape(shape)
    if not with_gradients:
        return loss, nll
    d_states = d_x[:count][back].reshape(states.shape)
    d_bias = d_kernel[width] if biased else jnp.zeros(bias.shape, dtype)
    if scatter_axis == 0:
        d_kernel = d_kernel[:width]
    if scatter_axis is not None:
        d_kernel = jax.lax.psum_scatter(
            d_kernel, "fsdp", scatter_dimension=scatter_axis, tiled=True
        )
        d_kernel = jax.lax.psum(d_kernel, "data")
    else:
        d_kernel = batch_axes.sum(d_kernel)
    return loss, nll, d_states, d_kernel[:width], batch_axes.sum(d_bias)
