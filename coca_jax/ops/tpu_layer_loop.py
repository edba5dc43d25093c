"""A tower's layers on an accelerator: one loop forward and one backward, written out by hand.

It computes what block.Block computes, and keeps what the remat policy 'named' keeps. Written out,
three things are possible that differentiating a scan does not give:
* what a layer keeps is written to a stack over layers by the product that makes it, the layer's
  result included, so that no layer's input is copied;
* the attention kernels read their operands from the stacks, and write to one, in place;
* query, key and value kernels are [D, D] matrices, not [D, H, K], from the loop's beginning to the
  sum of their gradients.

Shape letters: L layers, B batch, N queries, M keys, D width, H heads, K head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.ops import tpu_attention, tpu_norm
from coca_jax.parallel import sharding
from coca_jax.parallel.sharding import constrain

Weights = dict[str, jax.Array]


class Options(NamedTuple):
    """heads: of attention. epsilon: of the norms. cross: whether layers attend to a context."""

    heads: int
    epsilon: float
    cross: bool


def run(
    params: dict,
    x: jax.Array,
    mask: jax.Array | None,
    context: jax.Array | None,
    heads: int,
    epsilon: float,
) -> jax.Array:
    """x bfloat16 [B, N, D] through L layers.

    params: of block.Block, each stacked over layers, float32 or bfloat16. mask: bool,
    broadcastable to [B, 1, N, N], for self-attention. context: bfloat16 [B, M, D] or None.
    """
    options = Options(heads, epsilon, context is not None)
    if context is None:
        context = jnp.zeros((x.shape[0], 0, x.shape[2]), x.dtype)
    return _run(flatten(params, x.dtype), x, mask, context, options)


def flatten(params: dict, dtype: Any) -> Weights:
    """Stacked parameters of block.Block -> {'attention/query/kernel': [L, D, D], ...}: kernels in
    `dtype`, and the axes [H, K] merged."""
    weights = {}
    for part, modules in params.items():
        for name, value in modules.items():
            leaves = value if isinstance(value, dict) else {"": value}
            for leaf, array in leaves.items():
                path = f"{part}/{name}/{leaf}".rstrip("/")
                if leaf == "kernel":
                    inputs = 2 if name == "out" and array.ndim == 4 else 1
                    rows = math.prod(array.shape[1 : 1 + inputs])
                    array = array.astype(dtype).reshape(array.shape[0], rows, -1)
                elif leaf == "bias":
                    array = array.reshape(array.shape[0], -1)
                weights[path] = array
    return weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _run(weights, x, mask, context, options):
    def body(x, layer):
        return _forward(layer, x, mask, context, options, {}, 0)[0], None

    return jax.lax.scan(body, x, weights)[0]


def _run_forward(weights, x, mask, context, options):
    depth = next(iter(weights.values())).shape[0]
    shapes = jax.eval_shape(
        lambda w, x: _forward(jax.tree.map(lambda a: a[0], w), x, mask, context, options, {}, 0)[1],
        weights,
        x,
    )
    stacks = {name: _stack(depth, a.shape, a.dtype) for name, a in shapes.items()}
    inputs = _stack(depth + 1, x.shape, x.dtype)
    inputs = jax.lax.dynamic_update_index_in_dim(inputs, x, 0, 0)

    def body(carry, layer):
        x, inputs, stacks, index = carry
        y, stacks = _forward(layer, x, mask, context, options, stacks, index)
        inputs = jax.lax.dynamic_update_index_in_dim(inputs, y, index + 1, 0)
        return (y, inputs, stacks, index + 1), None

    start = (x, inputs, stacks, jnp.zeros((), jnp.int32))
    (y, inputs, stacks, _), _ = jax.lax.scan(body, start, weights)
    return y, (weights, inputs, stacks, mask, context)


def _run_backward(options, saved, g):
    weights, inputs, stacks, mask, context = saved
    depth = inputs.shape[0] - 1

    def body(carry, scanned):
        layer, index = scanned
        gradients, *carry = _backward(
            layer, {**stacks, "input": inputs}, index, mask, context, options, *carry
        )
        return tuple(carry), gradients

    indices = jnp.arange(depth, dtype=jnp.int32)
    start = (g, tpu_norm.column_sum(g), jnp.zeros_like(context))
    (g, _, d_context), gradients = jax.lax.scan(body, start, (weights, indices), reverse=True)
    return gradients, g, None, d_context


_run.defvjp(_run_forward, _run_backward)


def _stack(depth: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """[depth, B, ...] whose contents are not set, each device's rows on it."""
    names = (None, "batch") + (None,) * (len(shape) - 2) + ("act_mlp" if shape[-1] > 1 else None,)
    return _local_map(lambda s: jax.lax.empty(s, dtype), (depth,) + shape, names)


def _local_map(
    function: Callable[[tuple[int, ...]], jax.Array], shape: tuple[int, ...], names: tuple
) -> jax.Array:
    """An array of `shape` split by logical names, each device's part made by function(its shape)
    on that device; function(shape) without a mesh."""
    mesh = sharding.active_mesh()
    if mesh is None:
        return function(shape)
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in sharding.spec(*names)]
    parts = [int(np.prod([mesh.shape[a] for a in axes])) for axes in entries]
    if any(n % p for n, p in zip(shape, parts)):
        return function(shape)
    local = tuple(n // p for n, p in zip(shape, parts))
    make = jax.shard_map(
        lambda: function(local),
        mesh=mesh,
        in_specs=(),
        out_specs=sharding.spec(*names),
        check_vma=False,
    )
    return make()


class _Keeper:
    """Puts named tensors of one layer in their stacks; with no stacks, into a dict of them."""

    def __init__(self, stacks: dict[str, jax.Array], index: Any):
        self.found: dict[str, jax.Array] = dict(stacks)
        self.stacked, self.index = bool(stacks), index

    def __call__(self, name: str, x: jax.Array, reread: bool = False) -> jax.Array:
        if self.stacked:
            stack = jax.lax.dynamic_update_index_in_dim(self.found[name], x, self.index, 0)
            if reread:  # what follows reads the stack, so that x is not written a second time
                stack = jax.lax.optimization_barrier(stack)
                x = stack[self.index]
            self.found[name] = stack
        else:
            self.found[name] = x
        return x


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks what a helper (..., layer, name, ...) does with the name, for reports by layer."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        name = next(x for x in arguments if isinstance(x, str))
        with jax.named_scope(name):
            return function(*arguments)

    return run


@_named
def _dense(layer: Weights, name: str, x: jax.Array) -> jax.Array:
    y = jax.lax.dot_general(x, layer[f"{name}/kernel"], (((2,), (0,)), ((), ())))
    return y + layer[f"{name}/bias"].astype(y.dtype)


@_named
def _dense_backward(
    gradients: Weights,
    layer: Weights,
    name: str,
    x: jax.Array,
    g: jax.Array,
    d_bias: jax.Array | None = None,
) -> jax.Array:
    """Gradient of x; those of kernel and bias go to `gradients`. d_bias: that of the bias, where it
    is known already."""
    gradients[f"{name}/kernel"] = jax.lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())))
    gradients[f"{name}/bias"] = tpu_norm.column_sum(g) if d_bias is None else d_bias
    return jax.lax.dot_general(g, layer[f"{name}/kernel"], (((2,), (1,)), ((), ())))


@_named
def _norm(layer: Weights, name: str, x: jax.Array, epsilon: float, keep: _Keeper) -> jax.Array:
    mean, inverse = tpu_norm.statistics(x, epsilon)
    mean, inverse = keep(f"{name}/mean", mean), keep(f"{name}/inverse", inverse)
    return tpu_norm.normalised(x, mean, inverse, layer[f"{name}/scale"], layer[f"{name}/bias"])


def _attention(layer, name, x, context, mask, options, keep):
    query = keep(f"{name}/query", _heads(_dense(layer, f"{name}/query", x)))
    key = keep(f"{name}/key", _heads(_dense(layer, f"{name}/key", context)))
    value = keep(f"{name}/value", _heads(_dense(layer, f"{name}/value", context)))
    if keep.stacked:  # from and to the stacks, so that nothing is written twice
        names = [f"{name}/{part}" for part in ("attended", "query", "key", "value")]
        stack, *operands = (keep.found[n] for n in names)
        stack, sums = tpu_attention.attend_into(stack, keep.index, *operands, mask, options.heads)
        keep.found[names[0]], out = stack, stack[keep.index]
    else:
        out, sums = tpu_attention.forward(query, key, value, mask, options.heads)
        keep(f"{name}/attended", out)
    if sums is not None:  # of long sequences
        keep(f"{name}/sums", sums)
    return _dense(layer, f"{name}/out", out)


def _heads(x):
    return constrain(x, "batch", "length", "act_heads")


def _stream(x):
    return constrain(x, "batch", "length", "act_embed")


def _forward(layer, x, mask, context, options, stacks, index):
    """One layer: (result, what it keeps)."""
    keep = _Keeper(stacks, index)
    normal = _norm(layer, "attention_norm", x, options.epsilon, keep)
    x = _stream(x + _attention(layer, "attention", normal, normal, mask, options, keep))
    if options.cross:
        x = keep("crossing", x)
        normal = _norm(layer, "cross_norm", x, options.epsilon, keep)
        x = _stream(x + _attention(layer, "cross_attention", normal, context, None, options, keep))
    x = keep("middle", x)
    normal = _norm(layer, "mlp_norm", x, options.epsilon, keep)
    hidden = constrain(_dense(layer, "mlp/in", normal), "batch", "length", "act_mlp")
    hidden = keep("hidden", hidden, reread=True)
    x = _stream(x + _dense(layer, "mlp/out", tpu_norm.gelu(hidden)))
    return x, keep.found


class _Kept:
    """What one layer has kept in the stacks."""

    def __init__(self, stacks: dict[str, jax.Array], index: jax.Array):
        self.stacks, self.index = stacks, index

    def __call__(self, name: str) -> jax.Array:
        return self.stacks[name][self.index]


@_named
def _normalised(layer: Weights, name: str, saved: _Kept, x: str) -> jax.Array:
    return tpu_norm.normalised(
        saved(x),
        saved(f"{name}/mean"),
        saved(f"{name}/inverse"),
        layer[f"{name}/scale"],
        layer[f"{name}/bias"],
    )


@_named
def _norm_backward(gradients, layer, name, saved, x, d_normal, g, epsilon):
    """(gradient of the stream before the norm, its sum over all but the width)."""
    g, gradients[f"{name}/scale"], gradients[f"{name}/bias"], total = tpu_norm.norm_backward(
        saved.stacks[x],
        saved.index,
        saved(f"{name}/mean"),
        saved(f"{name}/inverse"),
        layer[f"{name}/scale"],
        d_normal,
        g,
        epsilon,
    )
    return _stream(g), total


def _attention_backward(gradients, layer, name, saved, x, context, mask, heads, g, total):
    """Gradients of x and of context (None where that is x: both are in the first)."""
    g = _heads(
        _dense_backward(gradients, layer, f"{name}/out", saved(f"{name}/attended"), g, total)
    )
    query, key, value, out = (
        saved.stacks[f"{name}/{part}"] for part in ("query", "key", "value", "attended")
    )
    sums = saved.stacks.get(f"{name}/sums")
    d_query, d_key, d_value = tpu_attention.backward(
        query, key, value, mask, out, g, saved.index, heads, sums
    )
    source = x if context is None else context
    dx = _dense_backward(gradients, layer, f"{name}/query", x, d_query)
    # The key's bias has no gradient but rounding errors (see layers.Attention).
    zero = jnp.zeros(d_key.shape[-1:], jnp.float32)
    d_source = _dense_backward(gradients, layer, f"{name}/key", source, d_key, zero)
    d_source += _dense_backward(gradients, layer, f"{name}/value", source, d_value)
    return (dx + d_source, None) if context is None else (dx, d_source)


def _backward(layer, stacks, index, mask, context, options, g, total, d_context):
    """One layer backward: (gradients of its weights, of its input, that one's sum over all but the
    width, of the context with what was in d_context). total: the sum of g likewise."""
    gradients: Weights = {}
    heads, epsilon, cross = options
    saved = _Kept(stacks, index)
    hidden = saved("hidden")
    d_gelu = _dense_backward(gradients, layer, "mlp/out", tpu_norm.gelu(hidden), g, total)
    d_hidden, d_bias = tpu_norm.gelu_gradients(hidden, d_gelu)
    normal = _normalised(layer, "mlp_norm", saved, "middle")
    d_normal = _dense_backward(gradients, layer, "mlp/in", normal, d_hidden, d_bias)
    g, total = _norm_backward(gradients, layer, "mlp_norm", saved, "middle", d_normal, g, epsilon)
    if cross:
        normal = _normalised(layer, "cross_norm", saved, "crossing")
        d_normal, more = _attention_backward(
            gradients, layer, "cross_attention", saved, normal, context, None, heads, g, total
        )
        d_context = _stream(d_context + more)
        g, total = _norm_backward(
            gradients, layer, "cross_norm", saved, "crossing", d_normal, g, epsilon
        )
    normal = _normalised(layer, "attention_norm", saved, "input")
    d_normal, _ = _attention_backward(
        gradients, layer, "attention", saved, normal, None, mask, heads, g, total
    )
    g, total = _norm_backward(
        gradients, layer, "attention_norm", saved, "input", d_normal, g, epsilon
    )
    return gradients, g, total, d_context
