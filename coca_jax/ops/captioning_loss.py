"""The captioning loss on arrays, exact on any mesh and small in memory.

With chunks it works per device on the rows and the share of the vocabulary that the device holds
and makes its gradients in the forward pass, so that the logits [B, L, V] never exist. Without a
mesh it is a plain function of arrays.

Shape letters: B batch, L text length, N tokens, C tokens of a chunk, D width, V vocabulary (in
`_Softmax` and below it the device's share).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from coca_jax.ops.reference import Reference, wide
from coca_jax.parallel import sharding
from coca_jax.parallel.sharding import Collectives

REFERENCE = Reference()


def caption_targets(tokens: jax.Array, text_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(targets int [B, L], mask bool [B, L]): position t is to predict token t + 1, where valid."""
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return targets, jnp.pad(text_valid[:, 1:], ((0, 0), (0, 1)))


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
    ops: Reference = REFERENCE,
) -> tuple[jax.Array, jax.Array]:
    """Autoregressive cross-entropy (paper, Eq. 3), averaged over all target tokens of the batch.

    Args:
      states: [B, L, D], the decoder's output where `targets` come next; their dtype is that of
        the products with the softmax layer, log-sum-exp runs in float32.
      kernel: float32 [D, V]; bias: float32 [V] or None.
      targets: int [B, L], already shifted; mask: bool [B, L], True at real targets.
      chunk: tokens projected at a time on each device, at most; 0: all. With chunks only real
        targets are projected, and the gradients are made in the forward pass, so logits [B, L, V]
        never exist.
      z_loss: weight of the squared log-sum-exp.
      ops: how the chunks' loop and products run, and how many fewer tokens a chunk may have.

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
        ops=ops,
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
    ops: Reference = REFERENCE,
) -> tuple[jax.Array, jax.Array]:
    """As `captioning_loss`, with a float32 weight for each target [B, L] instead of the mean."""
    bias_or_zero = jnp.zeros((kernel.shape[1],), kernel.dtype) if bias is None else bias
    options = _Options(chunk, z_loss, label_smoothing, bias is not None, ops)
    if chunk <= 0:
        loss, nll = _token_losses(states, kernel, bias_or_zero, targets, options)
        return (loss * weights).sum(), jax.lax.stop_gradient(jnp.where(weights > 0, nll, 0.0))
    return _chunked_captioning(states, kernel, bias_or_zero, targets, weights, options)


class _Options(NamedTuple):
    chunk: int
    z_loss: float
    smoothing: float
    biased: bool
    ops: Reference


def _token_losses(states, kernel, bias, targets, options):
    """(loss, negative log-likelihood) of each token, float32 [...], from states [..., D]."""
    logits = jnp.einsum(
        "...d,dv->...v",
        states,
        kernel.astype(states.dtype),
        preferred_element_type=wide(states.dtype),
    )
    logits = sharding.constrain(logits + bias, "batch", "length", "vocab")
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = nll
    if options.smoothing:
        loss = (1 - options.smoothing) * nll + options.smoothing * (lse - logits.mean(-1))
    if options.z_loss:
        loss = loss + options.z_loss * jnp.square(lse)
    return loss, nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked_captioning(states, kernel, bias, targets, weights, options):
    run = _per_device(options, False, states.shape, kernel.shape)
    return run(states, kernel.astype(states.dtype), bias, targets, weights)[:2]


def _chunked_forward(states, kernel, bias, targets, weights, options):
    # Cast before the devices' shares are gathered: half the bytes in bfloat16.
    run = _per_device(options, True, states.shape, kernel.shape)
    matrix = kernel.astype(states.dtype)
    loss, nll, *gradients = run(states, matrix, bias, targets, weights)
    return (loss, nll), tuple(gradients)


def _chunked_backward(options, gradients, cotangents):
    d_states, d_kernel, d_bias = gradients
    g = cotangents[0]
    return (d_states * g.astype(d_states.dtype), d_kernel * g, d_bias * g, None, None)


_chunked_captioning.defvjp(_chunked_forward, _chunked_backward)


def _per_device(options, with_gradients, shape, kernel_shape):
    axis, d_kernel = sharding.softmax_layer_gradient(kernel_shape)
    function = functools.partial(
        _caption_rows, options=options, with_gradients=with_gradients, scatter_axis=axis
    )
    gradients = ("rows", d_kernel, "vocab") if with_gradients else ()
    return sharding.per_device(
        function,
        shape[0],
        inputs=("rows", "vocab_columns", "vocab", "rows", "rows"),
        outputs=("all", "rows", *gradients),
        thing="captions",
    )


def _caption_rows(
    batch_axes: Collectives,
    vocab_axis: Collectives,
    states: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    options: _Options,
    with_gradients: bool,
    scatter_axis: int | None,
) -> tuple[Any, ...]:
    """Loss and gradients over one device's rows and its share of the vocabulary."""
    dtype, width, count = wide(states.dtype), states.shape[-1], targets.size
    local_vocab = kernel.shape[1]
    chunk = options.ops.caption_chunk(min(options.chunk, count), local_vocab)
    padding = -count % chunk
    # Real targets first, so that the last chunks may hold padding only.
    order = jnp.argsort(weights.reshape(-1) <= 0, stable=True)
    pad = functools.partial(jnp.pad, pad_width=(0, padding))
    x = jnp.pad(states.reshape(count, width)[order], ((0, padding), (0, 0)))
    y = pad(targets.reshape(-1)[order]) - vocab_axis.index() * local_vocab
    w = pad(weights.reshape(-1)[order])
    zero = jnp.zeros((), dtype)
    sums = _Sums(zero, jnp.zeros_like(w), zero, zero)
    if with_gradients:
        extra = EXTRA if options.biased else 0
        d_kernel = jnp.zeros((width + extra, local_vocab), dtype)
        sums = _Sums(zero, jnp.zeros_like(w), jnp.zeros_like(x), d_kernel)
    body = functools.partial(
        _chunk, x, y, w, kernel, bias, vocab_axis, chunk, options, with_gradients
    )
    sums = _loop(body, sums, chunk, jnp.sum(w > 0), options.ops)
    back = jnp.argsort(order)
    loss = batch_axes.sum(sums.loss)
    nll = sums.nll[:count][back].reshape(targets.shape)
    if not with_gradients:
        return loss, nll
    d_states = sums.d_x[:count][back].reshape(states.shape)
    d_bias = sums.d_kernel[width] if options.biased else jnp.zeros(bias.shape, dtype)
    d_kernel = sums.d_kernel[:width] if scatter_axis == 0 else sums.d_kernel
    d_kernel = sharding.sum_softmax_layer(batch_axes, d_kernel, scatter_axis)
    return loss, nll, d_states, d_kernel[:width], batch_axes.sum(d_bias)


class _Sums(NamedTuple):
    """What the chunks add up: the loss, the likelihoods [N], the gradients of the states [N, D] and
    of the kernel [D + EXTRA, V], the last two 0 without gradients."""

    loss: jax.Array
    nll: jax.Array
    d_x: jax.Array
    d_kernel: jax.Array


# The bias's gradient is a further row of the kernel's, of states that are 1 (a tile of eight).
EXTRA = 8


def _loop(
    body: Callable[[Any, _Sums], _Sums], sums: _Sums, chunk: int, real: jax.Array, ops: Reference
) -> _Sums:
    """body(number of the chunk, sums) for each chunk that holds one of the `real` targets."""
    count = sums.nll.size
    if count <= chunk:
        return body(0, sums)

    # A loop of known length, so that its cost can be told before it runs; chunks that hold padding
    # only are skipped.
    def chunk_or_nothing(i: jax.Array, carry: _Sums) -> _Sums:
        return ops.run_if(i * chunk < real, lambda c: body(i, c), carry)

    return jax.lax.fori_loop(0, count // chunk, chunk_or_nothing, sums)


def _chunk(x, y, w, kernel, bias, vocab_axis, chunk, options, with_gradients, i, sums):
    """`sums` with chunk i of the states x [N, D], targets y [N] and weights w [N]."""
    loss, nll, d_x, d_kernel = sums
    dtype, start = wide(x.dtype), i * chunk
    rows, target, weight = (jax.lax.dynamic_slice_in_dim(a, start, chunk) for a in (x, y, w))
    softmax, token_loss, token_nll = _chunk_losses(
        rows, target, kernel, bias, vocab_axis, options, with_gradients
    )
    loss = loss + (token_loss * weight).sum()
    masked_nll = jnp.where(weight > 0, token_nll, 0.0)
    nll = jax.lax.dynamic_update_slice_in_dim(nll, masked_nll, start, 0)
    if not with_gradients:
        return _Sums(loss, nll, d_x, d_kernel)
    gradient = functools.partial(_logit_gradients, softmax, weight, options)
    d_rows = jax.lax.dot_general(
        gradient(softmax.exp).astype(x.dtype),
        kernel,
        (((1,), (1,)), ((), ())),
        preferred_element_type=dtype,
    )
    d_rows = vocab_axis.sum(d_rows).astype(x.dtype)
    d_x = jax.lax.dynamic_update_slice_in_dim(d_x, d_rows, start, 0)
    exp = softmax.exp
    if x.dtype == jnp.bfloat16:
        exp = options.ops.for_next_product(exp)
    ones = ((0, 0), (0, EXTRA))
    rows = jnp.pad(rows, ones, constant_values=1) if options.biased else rows
    d_kernel = d_kernel + options.ops.weight_gradient(rows, gradient(exp), x.dtype)
    return _Sums(loss, nll, d_x, d_kernel)


class _Softmax(NamedTuple):
    """Of a chunk: exp of the logits less their maximum [C, V], its sum over the vocabulary [C], the
    log-sum-exp [C], where the targets are, bool [C, V], and the size of the whole vocabulary."""

    exp: jax.Array
    total: jax.Array
    lse: jax.Array
    own: jax.Array
    vocab: int


def _chunk_losses(rows, target, kernel, bias, vocab_axis, options, with_gradients):
    """(softmax, loss of each token [C], its negative log-likelihood [C])."""
    dtype = wide(rows.dtype)
    vocab = kernel.shape[1] * vocab_axis.size()
    logits = jnp.dot(rows, kernel, preferred_element_type=dtype) + bias
    peak = vocab_axis.max(logits.max(-1))
    exp = jnp.exp(logits - peak[:, None])
    total = exp.sum(-1)
    # A comparison instead of a gather and a scatter: it fuses with the passes over the logits.
    own = jnp.arange(kernel.shape[1]) == target[:, None]
    picked = jnp.where(own, logits, 0.0).sum(-1)
    if with_gradients and rows.dtype == jnp.bfloat16:
        # One pass over the logits, stored in half the bytes: both products of the gradient start
        # from these.
        stored = exp.astype(rows.dtype), total, picked
        exp, total, picked = jax.lax.optimization_barrier(stored)
    total, picked = vocab_axis.sum(total), vocab_axis.sum(picked)
    lse = peak + jnp.log(total)
    token_nll = lse - picked
    token_loss = token_nll
    if options.smoothing:
        mean = vocab_axis.sum(logits.sum(-1)) / vocab
        token_loss = (1 - options.smoothing) * token_nll + options.smoothing * (lse - mean)
    if options.z_loss:
        token_loss = token_loss + options.z_loss * jnp.square(lse)
    return _Softmax(exp, total, lse, own, vocab), token_loss, token_nll


def _logit_gradients(softmax, weight, options, exp):
    """The loss's gradient by the logits [C, V], float32, from `exp` as it is stored."""
    factor = weight * (1 + 2 * options.z_loss * softmax.lse) if options.z_loss else weight
    d_logits = exp.astype(softmax.lse.dtype) * (factor / softmax.total)[:, None]
    if options.smoothing:
        d_logits = d_logits - (options.smoothing / softmax.vocab) * weight[:, None]
    return d_logits - jnp.where(softmax.own, (1 - options.smoothing) * weight[:, None], 0.0)
