"""Softmax attention of bfloat16 as one TPU kernel forward and one backward (Pallas).

XLA writes each pair's [N, M] weights to memory and reads them back, five times in the backward
pass. Here they never leave the core: a step of the kernel holds all heads of one row of the batch.
Heads lie side by side along the width, as projections leave them, and are not cut out: lanes of
other heads are set to zero on one side of each product, over whole tiles of 128 lanes.

Shape letters: B batch, N queries, M keys, D width, H heads, K head width (D = H K).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MOST_WEIGHTS = 256 * 256  # of one head; scores and gradients of more do not fit beside the blocks
MOST_BYTES = 13 * 2**20  # of blocks in a core's memory, two of each; of 16 MiB on v4
NEGATIVE = -1e30
AHEAD = 2


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Whether attention of query [B, N, D] over key [B, M, D] can run as these kernels."""
    (n, width), m = query.shape[-2:], key.shape[-2]
    blocks = 2 * 2 * 4 * (n + m) * width  # bfloat16, two of each; backward: 4 by N and 4 by M
    return (
        query.dtype == key.dtype == jnp.bfloat16
        and min(n, m) >= 16
        and n * m <= MOST_WEIGHTS
        and blocks <= MOST_BYTES
    )


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    heads: int,
    *,
    stack: jax.Array | None = None,
    index: jax.Array | int = 0,
    interpret: bool = False,
) -> jax.Array:
    """softmax(query key' / sqrt(K) + bias) value, bfloat16 [B, N, D], [B, M, D] -> [B, N, D].

    bias: float32 [B or 1, N, M] or None, the same for all heads; NEGATIVE hides a key.
    stack, index: the result is put at stack [L, B, N, D][index], in place; returns the stack.
    """
    inputs = (query, key, value) if bias is None else (query, key, value, bias)
    kernel = functools.partial(_forward, heads=heads, masked=bias is not None)
    name = f"attention_{heads}_heads"
    return _call(kernel, name, inputs, [query], stack, index, interpret)[0]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    out: jax.Array,
    gradient: jax.Array,
    heads: int,
    *,
    index: jax.Array | int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value from the output and the output's gradient [B, N, D].

    Each of query, key, value and out may be a stack [L, B, N, D], of which `index` is meant.
    """
    inputs: tuple[jax.Array, ...] = (query, key, value, out, gradient)
    if bias is not None:
        inputs += (bias,)
    kernel = functools.partial(_backward, heads=heads, masked=bias is not None)
    name = f"attention_gradient_{heads}_heads"
    outputs = [query, key, value]
    d_query, d_key, d_value = _call(kernel, name, inputs, outputs, None, index, interpret)
    return d_query, d_key, d_value


def _call(
    kernel: Any,
    name: str,
    inputs: tuple[jax.Array, ...],
    outputs: list[jax.Array],
    stack: jax.Array | None,
    index: jax.Array | int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel for each row of the batch; results are like `outputs`, less a leading L."""

    def row(x: Any) -> pl.BlockSpec:
        shared = x.shape[-3] == 1
        if x.ndim == 3:
            return pl.BlockSpec((None, *x.shape[1:]), lambda b, i: (0 if shared else b, 0, 0))
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, i: (i[0], b, 0, 0))

    shapes = [jax.ShapeDtypeStruct(x.shape[-3:], x.dtype) for x in outputs]
    specs, aliases, body = [row(x) for x in inputs], {}, kernel
    if stack is not None:
        shapes = [jax.ShapeDtypeStruct(stack.shape, stack.dtype)]
        aliases = {1 + len(inputs): 0}  # after the index and the inputs
        specs.append(pl.BlockSpec(memory_space=pl.ANY))
        inputs += (stack,)

        def body(*refs: Any) -> None:
            kernel(*refs[:-2], refs[-1])

    return pl.pallas_call(
        lambda index, *refs: body(*refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(inputs[0].shape[-3],),
            in_specs=specs,
            out_specs=[row(x) for x in shapes],
        ),
        out_shape=shapes,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=name,
        interpret=interpret,
    )(jnp.asarray(index, jnp.int32).reshape(1), *inputs)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    contract = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def _tiles(head: int, width: int, total: int) -> tuple[int, int]:
    """First and last lane of the tiles that a head has a part in."""
    return head * width // LANES * LANES, min(-(-(head + 1) * width // LANES) * LANES, total)


def _keep(x: jax.Array, low: int, high: int) -> jax.Array:
    """x with zeros in all lanes outside low to high."""
    if low <= 0 and high >= x.shape[1]:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= low) & (lane < high), x, jnp.zeros_like(x))


class _Writer:
    """Gathers the heads' shares of a result and stores each tile once its last head is in."""

    def __init__(self, ref: Any, width: int):
        self.ref, self.width, self.open = ref, width, dict[int, jax.Array]()

    def add(self, head: int, x: jax.Array, scale: float = 1.0) -> None:
        """x: float32, the head's tiles; lanes of other heads are ignored."""
        low, high = head * self.width, (head + 1) * self.width
        start, stop = _tiles(head, self.width, self.ref.shape[1])
        for tile in range(start, stop, LANES):
            end = min(tile + LANES, stop)
            piece = _keep(x[:, tile - start : end - start], low - tile, high - tile)
            if tile in self.open:
                piece = self.open.pop(tile) + piece
            if high >= end:
                self.ref[:, tile:end] = (piece * scale).astype(self.ref.dtype)
            else:
                self.open[tile] = piece


def _weights(query: jax.Array, key: jax.Array, bias: Any, scale: float) -> tuple:
    """(exp(score - maximum) float32 [N, M], one over its sums [N, 1])."""
    scores = _dot(query, key, 1, 1)
    if bias is not None:
        scores = scores + bias[:]
    exps = jnp.exp((scores - scores.max(1, keepdims=True)) * scale)
    return exps, 1 / exps.sum(1, keepdims=True)


def _staggered(heads: int, start: Callable[[int], Any], finish: Callable[..., None]) -> None:
    """finish(head, *start(head)) for each head, AHEAD starts before a finish: the core's units wait
    less for results, since loads are not moved before the stores of another head."""
    started = []
    for head in range(heads):
        started.append((head, *start(head)))
        if len(started) > AHEAD:
            finish(*started.pop(0))
    for left in started:
        finish(*left)


def _forward(query, key, value, *rest, heads, masked):
    bias, out = rest if masked else (None, *rest)
    total = query.shape[1]
    width = total // heads
    writer = _Writer(out, width)

    def start(head):
        first, last = _tiles(head, width, total)
        low, high = head * width - first, (head + 1) * width - first
        q = _keep(query[:, first:last], low, high)
        exps, inverse = _weights(q, key[:, first:last], bias, width**-0.5)
        return exps.astype(q.dtype), inverse, value[:, first:last]

    def finish(head, exps, inverse, v):
        writer.add(head, _dot(exps, v, 1, 0) * inverse)

    _staggered(heads, start, finish)


def _backward(query, key, value, out, gradient, *rest, heads, masked):
    bias, d_query, d_key, d_value = rest if masked else (None, *rest)
    total = query.shape[1]
    width = total // heads
    scale = width**-0.5
    to_query, to_key, to_value = (_Writer(x, width) for x in (d_query, d_key, d_value))

    def start(head):
        first, last = _tiles(head, width, total)
        low, high = head * width - first, (head + 1) * width - first
        q = _keep(query[:, first:last], low, high)
        k, v = key[:, first:last], value[:, first:last]
        exps, inverse = _weights(q, k, bias, scale)
        # Weights are exps * inverse; the factor goes to the gradient, which is smaller.
        g = _keep(gradient[:, first:last], low, high).astype(jnp.float32) * inverse
        inner = (out[:, first:last].astype(jnp.float32) * g).sum(1, keepdims=True)
        g = g.astype(q.dtype)
        d_scores = (exps * (_dot(g, v, 1, 1) - inner)).astype(q.dtype)
        return q, k, g, exps.astype(q.dtype), d_scores

    def finish(head, q, k, g, exps, d_scores):
        to_value.add(head, _dot(exps, g, 0, 0))
        to_query.add(head, _dot(d_scores, k, 1, 0), scale)
        to_key.add(head, _dot(d_scores, q, 0, 0), scale)

    _staggered(heads, start, finish)


def replay(heads: int, gradient: bool) -> Callable[..., Any]:
    """A function of a call's operands, in their order in HLO, that makes the same call."""

    def run(index: jax.Array, *arrays: jax.Array) -> Any:
        bias = next((x for x in arrays if x.dtype == jnp.float32), None)
        rest = [x for x in arrays if x.dtype != jnp.float32]
        query, key, value, *others = rest
        if gradient:
            out, g = others
            return backward(query, key, value, bias, out, g, heads, index=index)
        stack = others[0] if others else None
        return forward(query, key, value, bias, heads, stack=stack, index=index)

    return run
