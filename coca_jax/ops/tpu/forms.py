"""Attention, norm, GELU and bias as the TPU compiler runs them best, with gradients of their own.

They compute what the plain forms in ops/reference.py compute. What differs is where the work lands,
found by the compiler's cycle estimates (docs/performance.md): sums over rows and columns run on the
matrix unit as products with ones (exact: the partial sums are float32), softmax normalises its
output instead of the weights, and queries lie along the vector lanes, so that sums and maxima over
keys never cross lanes.

Shape letters: B batch, N queries, M keys, D width, H heads, K head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from coca_jax import partitioning
from coca_jax.ops.reference import gelu, gelu_slope
from coca_jax.ops.tpu import attention_kernel, norm_kernel
from coca_jax.partitioning import active_mesh

einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def row_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, [..., D] -> float32 [..., 1].

    A float32 x is summed as two bfloat16 parts: relative error of a term below 2^-16.
    """
    ones = jnp.ones((x.shape[-1], 128), jnp.bfloat16)  # 128: a whole tile, not a vector product

    def total(part: jax.Array) -> jax.Array:
        contract = (((part.ndim - 1,), (0,)), ((), ()))
        product = jax.lax.dot_general(part, ones, contract, preferred_element_type=jnp.float32)
        return product[..., :1]

    if x.dtype == jnp.bfloat16:
        return total(x)
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return total(high.astype(jnp.bfloat16)) + total((x - high).astype(jnp.bfloat16))


def column_sum(x: jax.Array) -> jax.Array:
    """Sum over all axes but the last, [..., D] -> float32 [D], of x rounded to bfloat16."""
    lead = tuple(range(x.ndim - 1))
    ones = jnp.ones(x.shape[:-1] + (8,), jnp.bfloat16)
    contract = ((lead, lead), ((), ()))
    x = x.astype(jnp.bfloat16)
    return jax.lax.dot_general(ones, x, contract, preferred_element_type=jnp.float32)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """bfloat16 [..., D] normalised over D, times scale plus bias (float32 [D]); bfloat16.

    Statistics are float32.
    """
    return _norm_forward(x, scale, bias, epsilon)[0]


def statistics(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(mean, one over the standard deviation) over the last axis, float32 [..., 1]."""
    width = x.shape[-1]
    mean = row_sum(x) / width
    centred = x.astype(jnp.float32) - mean
    variance = row_sum(jnp.square(centred)) / width
    return mean, jax.lax.rsqrt(variance + epsilon)


def normalised(
    x: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """x with these statistics normalised, times scale plus bias, in x's dtype."""
    return ((x.astype(jnp.float32) - mean) * inverse * scale + bias).astype(x.dtype)


def norm_gradients(
    x: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, scale and bias from that of `normalised`."""
    width = x.shape[-1]
    normal = (x.astype(jnp.float32) - mean) * inverse
    scaled = g.astype(jnp.float32) * scale
    # The terms of these sums are gradients, known to bfloat16 only: one part will do.
    first = row_sum(scaled.astype(jnp.bfloat16)) / width
    second = row_sum((scaled * normal).astype(jnp.bfloat16)) / width
    dx = inverse * (scaled - first - normal * second)
    return dx.astype(x.dtype), column_sum(g.astype(jnp.float32) * normal), column_sum(g)


def norm_backward(
    stack: jax.Array,
    index: jax.Array,
    mean: jax.Array,
    inverse: jax.Array,
    scale: jax.Array,
    gradient: jax.Array,
    beside: jax.Array,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradient of x = stack[index], of which `normalised` has `gradient` and which itself goes
    on with the gradient `beside`; those of scale and bias; the first's sum over all but D.

    One kernel on a TPU where it fits (norm_kernel.py).
    """
    mesh = active_mesh()

    def on_tpu(stack, index, gradient, beside, scale):
        def run(stack, index, gradient, beside, scale):
            return norm_kernel.backward(
                stack, scale, gradient, beside, epsilon=epsilon, index=index
            )

        rows = partitioning.spec("batch")
        specs = (P(None, *rows), P(), rows, rows, P())
        run = _per_device(run, mesh, specs, (rows, rows))
        dx, sums = run(stack, index, gradient, beside, scale)
        return dx, *sums.sum(0)

    def elsewhere(stack, index, gradient, beside, scale):
        parts = norm_gradients(stack[index], mean, inverse, scale, gradient)
        dx = beside + parts[0]
        return dx, *parts[1:], column_sum(dx)

    arrays = (stack, index, gradient, beside, scale)
    if stack.shape[1] % _parts(mesh)[0] or not norm_kernel.fits(stack):
        return elsewhere(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=on_tpu, default=elsewhere)


def _norm_forward(x, scale, bias, epsilon):
    mean, inverse = statistics(x, epsilon)
    mean = checkpoint_name(mean, "statistics")
    inverse = checkpoint_name(inverse, "statistics")
    return normalised(x, mean, inverse, scale, bias), (x, mean, inverse, scale)


def _norm_backward(epsilon, saved, g):
    return norm_gradients(*saved, g)


layer_norm.defvjp(_norm_forward, _norm_backward)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    heads: int,
    kernels: bool = True,
) -> jax.Array:
    """Softmax attention [B, N, D] x [B, M, D] -> [B, N, D], heads side by side along D; softmax in
    float32. One kernel on a TPU where it fits (attention_kernel.py), a pooler's single query
    padded to the fewest that it takes.

    mask: bool, broadcastable to [B, 1, N, M]; True where a query may look. kernels: False leaves
    it to XLA.
    """
    count = query.shape[1]
    if kernels and mask is None and count < attention_kernel.FEWEST:
        padded = jnp.pad(query, ((0, 0), (0, attention_kernel.FEWEST - count), (0, 0)))
        if attention_kernel.fits(padded, key):
            return _attend(padded, key, value, None, heads, kernels)[:, :count]
    return _attend(query, key, value, mask, heads, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, heads, kernels):
    return _attend_forward(query, key, value, mask, heads, kernels)[0]


def _attend_forward(query, key, value, mask, heads, kernels):
    arrays = dict(query=query, key=key, value=value)
    kernel = attention_kernel.forward if kernels else None
    out = _on_device(kernel, _plain_forward, arrays, mask, heads)
    out = checkpoint_name(out, "attended")
    return out, (query, key, value, mask, out)


def _attend_backward(heads, kernels, saved, g):
    query, key, value, mask, out = saved
    arrays = dict(query=query, key=key, value=value, out=out, gradient=g)
    kernel = attention_kernel.backward if kernels else None
    return *_on_device(kernel, _plain_backward, arrays, mask, heads), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_into(
    stack: jax.Array,
    index: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    heads: int,
) -> jax.Array:
    """`attend` of query[index], key[index] and value[index], all stacks [L, B, N, D], whose result
    goes to stack[index] in place; returns the stack."""

    def plain(stack, index, query, key, value, mask, heads):
        out = _plain_forward(query[index], key[index], value[index], mask, heads)
        return jax.lax.dynamic_update_index_in_dim(stack, out, index, 0)

    arrays = dict(query=query, key=key, value=value, stack=stack, index=index)
    return _on_device(attention_kernel.forward, plain, arrays, mask, heads)


def attend_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    out: jax.Array,
    gradient: jax.Array,
    index: jax.Array,
    heads: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, [B, N, D], from attend's result and its gradient; all but
    the last are stacks [L, B, N, D], of which `index` is meant."""

    def plain(query, key, value, out, gradient, index, mask, heads):
        parts = (x[index] for x in (query, key, value, out))
        return _plain_backward(*parts, gradient, mask, heads)

    arrays = dict(query=query, key=key, value=value, out=out, gradient=gradient, index=index)
    return _on_device(attention_kernel.backward, plain, arrays, mask, heads)


def _on_device(kernel, plain, arrays, mask, heads):
    """kernel(**arrays, bias, heads) on TPUs where it fits, else plain(**arrays, mask, heads);
    kernel: None for plain in any case."""
    mesh = active_mesh()
    parts, tensor = _parts(mesh)
    query, key = arrays["query"], arrays["key"]
    even = query.shape[-3] % parts == 0 and heads % tensor == 0
    if kernel is None or not (even and attention_kernel.fits(query, key)):
        return plain(**arrays, mask=mask, heads=heads)

    pairs = query.shape[-1] // heads <= 64 and _wide_matrix_unit()

    def on_tpu(arrays, mask):
        bias = None
        if mask is not None:
            seen = jnp.broadcast_to(mask[:, 0], (mask.shape[0], query.shape[-2], key.shape[-2]))
            bias = jnp.where(seen, 0.0, attention_kernel.NEGATIVE)

        def run(arrays, bias):
            return kernel(**arrays, bias=bias, heads=heads // tensor, pairs=pairs)

        rows = partitioning.spec("batch", None, "act_heads")
        specs = {k: (P(), rows, P(None, *rows))[max(0, x.ndim - 2)] for k, x in arrays.items()}
        of_bias = P() if bias is None or bias.shape[0] == 1 else P(rows[0])
        out = P(None, *rows) if "stack" in arrays else rows
        return _per_device(run, mesh, (specs, of_bias), out)(arrays, bias)

    def elsewhere(arrays, mask):
        return plain(**arrays, mask=mask, heads=heads)

    return jax.lax.platform_dependent(arrays, mask, tpu=on_tpu, default=elsewhere)


def _wide_matrix_unit() -> bool:
    """Whether the mesh's chips have matrix units of 256 lanes: v6e and later."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.device_kind.startswith(("TPU v6", "TPU7", "TPU v7"))


def _parts(mesh):
    """(parts that a batch is split in, parts that a width is)."""
    return (partitioning.batch_parts(mesh), mesh.shape["tensor"]) if mesh else (1, 1)


def _per_device(function, mesh, in_specs, out_specs):
    """`function` on each device's share: the compiler cannot split a kernel by itself."""
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


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


@jax.custom_vjp
def bias_gelu(x: jax.Array, bias: jax.Array) -> jax.Array:
    """GELU of x [..., F] + bias [F] by its tanh approximation, computed in float32, in x's dtype.

    Its gradient and that of the bias come out of one pass.
    """
    return _gelu_forward(x, bias)[0]


def gelu_gradients(hidden: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradient of `hidden` [..., F] and, float32 [F], of a bias in it."""
    dx = g.astype(jnp.float32) * gelu_slope(hidden)
    # Two products read the result: the barrier has it made once, and its sum with it.
    d_bias = dx.sum(tuple(range(dx.ndim - 1)))
    return jax.lax.optimization_barrier((dx.astype(hidden.dtype), d_bias))


def _gelu_forward(x, bias):
    hidden = checkpoint_name(x + bias, "mlp")
    return gelu(hidden), (hidden, bias)


def _gelu_backward(saved, g):
    hidden, bias = saved
    dx, d_bias = gelu_gradients(hidden, g)
    return dx, d_bias.astype(bias.dtype)


bias_gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., F] + bias [F] (or [..., H, K] + [H, K]) of the same dtype."""
    return x + bias


def _bias_forward(x, bias):
    return x + bias, bias


def _bias_backward(bias, g):
    if bias.ndim == 1 and g.dtype == jnp.bfloat16:
        return g, column_sum(g).astype(bias.dtype)
    lead = tuple(range(g.ndim - bias.ndim))
    return g, g.astype(jnp.float32).sum(lead).astype(bias.dtype)


add_bias.defvjp(_bias_forward, _bias_backward)
