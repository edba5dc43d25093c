"""Attention on a TPU: which kernel runs, on which device's share, and XLA's own where none fits.

All compute what the plain form in ops/reference.py computes. In XLA's own softmax normalises its
output instead of the weights, and queries lie along the vector lanes, so that sums and maxima over
keys never cross lanes.

Shape letters: B batch, N queries, M keys, D width, H heads, K head width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from coca_jax.ops import tpu_attention_long, tpu_attention_short
from coca_jax.ops.reference import log_once
from coca_jax.ops.tpu_norm import parts_of, per_device
from coca_jax.parallel import sharding
from coca_jax.parallel.sharding import active_mesh

einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    heads: int,
    kernels: bool = True,
) -> jax.Array:
    """Softmax attention [B, N, D] x [B, M, D] -> [B, N, D], heads side by side along D; softmax in
    float32. One kernel on a TPU where it fits (attention_kernel.py, of longer sequences
    long_attention_kernel.py), a pooler's single query padded to the fewest that it takes.

    mask: bool, broadcastable to [B, 1, N, M]; True where a query may look. kernels: False leaves
    it to XLA.
    """
    count = query.shape[1]
    if kernels and mask is None and count < tpu_attention_short.FEWEST:
        padded = jnp.pad(query, ((0, 0), (0, tpu_attention_short.FEWEST - count), (0, 0)))
        if tpu_attention_short.fits(padded, key) or _is_long(padded, key, None, heads):
            return _attend(padded, key, value, None, heads, kernels)[:, :count]
    return _attend(query, key, value, mask, heads, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, heads, kernels):
    return _attend_forward(query, key, value, mask, heads, kernels)[0]


def _attend_forward(query, key, value, mask, heads, kernels):
    if kernels:
        out, sums = forward(query, key, value, mask, heads)
    else:
        out, sums = _plain_forward(query, key, value, mask, heads), None
    out, sums = checkpoint_name((out, sums), "attended")
    return out, (query, key, value, mask, out, sums)


def _attend_backward(heads, kernels, saved, g):
    query, key, value, mask, out, sums = saved
    if kernels:
        return *backward(query, key, value, mask, out, g, 0, heads, sums), None
    return *_plain_backward(query, key, value, out, g, mask, heads), None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, heads: int
) -> tuple[jax.Array, jax.Array | None]:
    """The result of `attend`, and what `backward` wants beside it of long sequences, float32
    [B, N, LANES]: the logarithm of each query's sum of exponentials, or None."""
    arrays = dict(query=query, key=key, value=value)
    if _is_long(query, key, mask, heads):
        return _on_device(tpu_attention_long.forward, _with_sums, arrays, None, heads)
    return _on_device(tpu_attention_short.forward, _plain_forward, arrays, mask, heads), None


def attend_into(
    stack: jax.Array,
    index: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    heads: int,
) -> tuple[jax.Array, jax.Array | None]:
    """`forward` of query[index], key[index] and value[index], all stacks [L, B, N, D], whose result
    goes to stack[index] in place; returns the stack in its stead."""

    def put(stack, index, out):
        return jax.lax.dynamic_update_index_in_dim(stack, out, index, 0)

    def plain(stack, index, query, key, value, mask, heads):
        return put(
            stack, index, _plain_forward(*(x[index] for x in (query, key, value)), mask, heads)
        )

    def with_sums(stack, index, query, key, value, mask, heads):
        out, sums = _with_sums(*(x[index] for x in (query, key, value)), mask, heads)
        return put(stack, index, out), sums

    arrays = dict(query=query, key=key, value=value, stack=stack, index=index)
    if _is_long(query, key, mask, heads):
        return _on_device(tpu_attention_long.forward, with_sums, arrays, None, heads)
    return _on_device(tpu_attention_short.forward, plain, arrays, mask, heads), None


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    out: jax.Array,
    gradient: jax.Array,
    index: jax.Array | int,
    heads: int,
    sums: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, [B, N, D], from the results of `forward` and the gradient
    of the first; all but that gradient and the mask may be stacks [L, B, N, D], of which `index` is
    meant."""

    def plain(query, key, value, out, gradient, index, mask, heads, sums=None):
        del sums
        parts = (x[index] if x.ndim > 3 else x for x in (query, key, value, out))
        return _plain_backward(*parts, gradient, mask, heads)

    index = jnp.asarray(index, jnp.int32)
    arrays = dict(query=query, key=key, value=value, out=out, gradient=gradient, index=index)
    if sums is not None:
        arrays["sums"] = sums
        return _on_device(tpu_attention_long.backward, plain, arrays, None, heads)
    return _on_device(tpu_attention_short.backward, plain, arrays, mask, heads)


def _is_long(query, key, mask, heads):
    """Whether the kernels for long sequences run."""
    even = _even(query, heads)
    each = heads // parts_of(active_mesh())[1]
    long = mask is None and not tpu_attention_short.fits(query, key)
    return (
        even and long and each <= tpu_attention_short.LANES and tpu_attention_long.fits(query, key)
    )


def _even(query, heads):
    """Whether each device has as many rows and heads as the others."""
    parts, tensor = parts_of(active_mesh())
    return query.shape[-3] % parts == 0 and heads % tensor == 0


def _on_device(kernel, plain, arrays, mask, heads):
    """kernel(**arrays, heads) on TPUs where it fits, with a bias in the mask's stead if it takes
    one, else plain(**arrays, mask, heads)."""
    mesh = active_mesh()
    tensor = parts_of(mesh)[1]
    query, key = arrays["query"], arrays["key"]
    long = kernel in (tpu_attention_long.forward, tpu_attention_long.backward)
    if not (long or (_even(query, heads) and tpu_attention_short.fits(query, key))):
        tokens = query.shape[-2], key.shape[-2]
        if math.prod(tokens) > tpu_attention_short.MOST_WEIGHTS:
            log_once(
                f"attention of {tokens[0]:,} tokens to {tokens[1]:,} runs as XLA makes it: of so "
                "many the kernels take bfloat16 without a mask, up to about 2,500 that a multiple "
                "of 16 from 64 to 128 divides"
            )
        return plain(**arrays, mask=mask, heads=heads)

    pairs = query.shape[-1] // heads <= 64 and _wide_matrix_unit()

    def on_tpu(arrays, mask):
        bias = None
        if mask is not None:
            seen = jnp.broadcast_to(mask[:, 0], (mask.shape[0], query.shape[-2], key.shape[-2]))
            bias = jnp.where(seen, 0.0, tpu_attention_short.NEGATIVE)

        def run(arrays, bias):
            masked: dict[str, Any] = {} if long else {"bias": bias}
            return kernel(**arrays, **masked, heads=heads // tensor, pairs=pairs)

        rows = sharding.spec("batch", None, "act_heads")
        specs = {k: (P(), rows, P(None, *rows))[max(0, x.ndim - 2)] for k, x in arrays.items()}
        of_bias = P() if bias is None or bias.shape[0] == 1 else P(rows[0])
        out: Any = P(None, *rows) if "stack" in arrays else rows
        if kernel is tpu_attention_long.forward:
            out = (out, rows)
        return per_device(run, mesh, (specs, of_bias), out)(arrays, bias)

    def elsewhere(arrays, mask):
        return plain(**arrays, mask=mask, heads=heads)

    return jax.lax.platform_dependent(arrays, mask, tpu=on_tpu, default=elsewhere)


def _wide_matrix_unit() -> bool:
    """Whether the mesh's chips have matrix units of 256 lanes: v6e and later."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.device_kind.startswith(("TPU v6", "TPU7", "TPU v7"))


def _split(x, heads):
    """[B, N, D] -> [B, N, H, K]."""
    return x.reshape(x.shape[:2] + (heads, -1))


def _exponentials(query, key, mask, dtype):
    """(exp(score - maximum) [B, H, M, N] in dtype, one over its sums over M, float32 [B, H, N])."""
    scale = 1 / math.sqrt(query.shape[-1])
    scores = einsum("bmhk,bnhk->bhmn", key, query)
    if mask is not None:
        scores = jnp.where(mask.swapaxes(2, 3), scores, jnp.finfo(jnp.float32).min)
    exps = jnp.exp((scores - scores.max(2, keepdims=True)) * scale)
    # The barrier makes this one pass over the scores: without it XLA fuses the division into the
    # product with the values, and makes the exponentials twice.
    exps, sums = jax.lax.optimization_barrier((exps.astype(dtype), exps.sum(2)))
    return exps, 1 / sums


def _with_sums(query, key, value, mask, heads):
    """What the long kernel gives: each device's heads are the first of its lanes."""
    out = _plain_forward(query, key, value, mask, heads)
    each = (_split(x, heads) for x in (query, key))
    scores = einsum("bnhk,bmhk->bnhm", *each) / math.sqrt(query.shape[-1] // heads)
    sums = jax.nn.logsumexp(scores, -1)
    tensor = parts_of(active_mesh())[1]
    sums = sums.reshape(sums.shape[:2] + (tensor, heads // tensor))
    beside = tpu_attention_short.LANES - heads // tensor
    sums = jnp.pad(sums, ((0, 0), (0, 0), (0, 0), (0, beside)))
    return out, sums.reshape(sums.shape[:2] + (-1,))


def _plain_forward(query, key, value, mask, heads):
    query, key, value = (_split(x, heads) for x in (query, key, value))
    exps, inverse = _exponentials(query, key, mask, value.dtype)
    out = einsum("bhmn,bmhk->bnhk", exps, value) * inverse.transpose(0, 2, 1)[..., None]
    return out.astype(value.dtype).reshape(out.shape[:2] + (-1,))


def _plain_backward(query, key, value, out, gradient, mask, heads):
    width = query.shape[-1]
    arrays = (query, key, value, out, gradient)
    query, key, value, out, g = (_split(x, heads) for x in arrays)
    exps, inverse = _exponentials(query, key, mask, value.dtype)
    # Weights are exps * inverse; the factor goes to the gradient, which is smaller.
    g = g * inverse.transpose(0, 2, 1)[..., None].astype(g.dtype)
    inner = einsum("bnhk,bnhk->bhn", out, g)[:, :, None]
    d_value = einsum("bhmn,bnhk->bmhk", exps, g)
    d_exps = einsum("bmhk,bnhk->bhmn", value, g) - inner
    d_scores = jax.lax.optimization_barrier((exps.astype(jnp.float32) * d_exps).astype(g.dtype))
    scale = 1 / math.sqrt(query.shape[-1])
    d_query = einsum("bhmn,bmhk->bnhk", d_scores, key) * scale
    d_key = einsum("bhmn,bnhk->bmhk", d_scores, query) * scale
    gradients = (d_query, d_key, d_value)
    return tuple(x.astype(query.dtype).reshape(x.shape[:2] + (width,)) for x in gradients)
