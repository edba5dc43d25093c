"""Softmax attention of bfloat16 as one TPU kernel forward and one backward (Pallas).

XLA writes each pair's [N, M] weights to memory and reads them back, five times in the backward
pass. Here they never leave the core: a step of the kernel holds all heads of one row of the batch.
Heads lie side by side along the width, as projections leave them, and are not cut out: lanes of
other heads are set to zero on one side of each product, over whole tiles of 128 lanes.

Shape letters: B batch, N queries, M keys, D width, H heads, K head width (D = H K).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MOST_WEIGHTS = 256 * 256  # of one head; scores and gradients of more do not fit beside the blocks
MOST_BYTES = 13 * 2**20  # of blocks in a core's memory, two of each; of 16 MiB on v4
FEWEST = 16  # queries or keys: a tile of bfloat16
NEGATIVE = -1e30
PAIRS = "_in_pairs"  # of the names of kernels


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Whether attention of query [B, N, D] over key [B, M, D] can run as these kernels."""
    (n, width), m = query.shape[-2:], key.shape[-2]
    blocks = 2 * 2 * 4 * (n + m) * width  # bfloat16, two of each; backward: 4 by N and 4 by M
    return (
        query.dtype == key.dtype == jnp.bfloat16
        and min(n, m) >= FEWEST
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
    pairs: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """softmax(query key' / sqrt(K) + bias) value, bfloat16 [B, N, D], [B, M, D] -> [B, N, D].

    bias: float32 [B or 1, N, M] or None, the same for all heads; NEGATIVE hides a key.
    stack, index: the result is put at stack [L, B, N, D][index], in place; returns the stack. Each
    of query, key and value may be a stack [L, B, N, D] too, of which `index` is meant.
    pairs: two heads go through the products together, however many queries there are.
    """
    inputs = (query, key, value) if bias is None else (query, key, value, bias)
    kernel = functools.partial(_forward, heads=heads, masked=bias is not None, pairs=pairs)
    name = f"attention_{heads}_heads{PAIRS * pairs}"
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
    pairs: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value from the output and the output's gradient [B, N, D].

    Each of query, key, value and out may be a stack [L, B, N, D], of which `index` is meant.
    """
    inputs: tuple[jax.Array, ...] = (query, key, value, out, gradient)
    if bias is not None:
        inputs += (bias,)
    kernel = functools.partial(_backward, heads=heads, masked=bias is not None, pairs=pairs)
    name = f"attention_gradient_{heads}_heads{PAIRS * pairs}"
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


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The product of two matrices over an axis of each, float32."""
    contract = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


class Group:
    """Heads that go through the products together, one below the other: lanes low to high of the
    width, in tiles that span lanes start to stop."""

    def __init__(self, heads: range, width: int, total: int):
        self.heads, self.width = heads, width
        self.low, self.high = heads[0] * width, (heads[-1] + 1) * width
        self.start = self.low // LANES * LANES
        self.stop = min(-(-self.high // LANES) * LANES, total)

    def of(self, ref: Any) -> jax.Array:
        """The group's tiles of a block."""
        return ref[:, self.start : self.stop]

    def spread(self, x: jax.Array) -> jax.Array:
        """[N, lanes] -> [heads N, lanes]: below one another, each head's lanes alone."""
        return jnp.concatenate([self._alone(x, head) for head in self.heads])

    def repeat(self, x: jax.Array) -> jax.Array:
        """[N, lanes] -> [heads N, lanes]: the same for each head."""
        return jnp.concatenate([x] * len(self.heads))

    def merge(self, x: jax.Array) -> jax.Array:
        """The inverse of `spread`: of each head's rows its own lanes."""
        parts = jnp.split(x, len(self.heads))
        alone = [self._alone(part, head) for part, head in zip(parts, self.heads)]
        return functools.reduce(jnp.add, alone)

    def _alone(self, x: jax.Array, head: int) -> jax.Array:
        first = head * self.width - self.start
        return _keep(x, first, first + self.width)


def heads_together(heads: int, width: int, total: int, queries: int, pairs: bool) -> list[Group]:
    """All heads in groups: of two for few queries and where `pairs` are wanted, else of one."""
    few = queries <= 64  # they leave the units waiting
    size = 2 if heads % 2 == 0 and (few or pairs) else 1
    return [Group(range(h, h + size), width, total) for h in range(0, heads, size)]


def _keep(x: jax.Array, low: int, high: int) -> jax.Array:
    """x with zeros in all lanes outside low to high."""
    if low <= 0 and high >= x.shape[1]:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= low) & (lane < high), x, jnp.zeros_like(x))


class Writer:
    """Gathers the groups' shares of a result and stores each tile once its last head is in."""

    def __init__(self, ref: Any):
        self.ref, self.open = ref, dict[int, jax.Array]()

    def add(self, group: Group, x: jax.Array, scale: float = 1.0) -> None:
        """x: float32, the group's tiles, zeros in lanes of other groups."""
        for tile in range(group.start, group.stop, LANES):
            end = min(tile + LANES, group.stop)
            piece = x[:, tile - group.start : end - group.start]
            if tile in self.open:
                piece = self.open.pop(tile) + piece
            if group.high >= end:
                self.store(tile, end, piece * scale)
            else:
                self.open[tile] = piece

    def store(self, start: int, stop: int, x: jax.Array) -> None:
        """Lanes that are complete."""
        self.ref[:, start:stop] = x.astype(self.ref.dtype)


def _weights(query: jax.Array, key: jax.Array, bias: Any, scale: float) -> tuple:
    """(exp(score - maximum) float32 [N, M], one over its sums [N, 1])."""
    scores = dot(query, key, 1, 1)
    if bias is not None:
        scores = scores + bias
    exps = jnp.exp((scores - scores.max(1, keepdims=True)) * scale)
    return exps, 1 / exps.sum(1, keepdims=True)


def staggered(
    groups: list[Group], start: Callable[[Group], Any], finish: Callable[..., None]
) -> None:
    """finish(group, *start(group)) for each, a finish two heads behind the starts: the core's units
    wait less for results, since loads are not moved before the stores of another group."""
    started: list[Any] = []
    ahead = 2 // len(groups[0].heads)
    for group in groups:
        started.append((group, *start(group)))
        if len(started) > ahead:
            finish(*started.pop(0))
    for left in started:
        finish(*left)


def _forward(query, key, value, *rest, heads, masked, pairs):
    bias, out = rest if masked else (None, *rest)
    total = query.shape[1]
    width = total // heads
    writer = Writer(out)

    def start(group):
        q = group.spread(group.of(query))
        seen = group.repeat(bias[:]) if masked else None
        exps, inverse = _weights(q, group.of(key), seen, width**-0.5)
        return exps.astype(q.dtype), inverse, group.of(value)

    def finish(group, exps, inverse, v):
        writer.add(group, group.merge(dot(exps, v, 1, 0) * inverse))

    staggered(heads_together(heads, width, total, query.shape[0], pairs), start, finish)


def _backward(query, key, value, out, gradient, *rest, heads, masked, pairs):
    bias, d_query, d_key, d_value = rest if masked else (None, *rest)
    total = query.shape[1]
    width = total // heads
    scale = width**-0.5
    to_query, to_key, to_value = Writer(d_query), Writer(d_key), Writer(d_value)

    def start(group):
        q, k, v = group.spread(group.of(query)), group.of(key), group.of(value)
        seen = group.repeat(bias[:]) if masked else None
        exps, inverse = _weights(q, k, seen, scale)
        # Weights are exps * inverse; the factor goes to the gradient, which is smaller.
        g = group.spread(group.of(gradient)).astype(jnp.float32) * inverse
        o = group.repeat(group.of(out)).astype(jnp.float32)
        inner = (o * g).sum(1, keepdims=True)
        g = g.astype(q.dtype)
        d_scores = (exps * (dot(g, v, 1, 1) - inner)).astype(q.dtype)
        return q, k, g, exps.astype(q.dtype), d_scores

    def finish(group, q, k, g, exps, d_scores):
        to_value.add(group, dot(exps, g, 0, 0))
        to_query.add(group, group.merge(dot(d_scores, k, 1, 0)), scale)
        to_key.add(group, dot(d_scores, q, 0, 0), scale)

    staggered(heads_together(heads, width, total, query.shape[0], pairs), start, finish)


def replay(name: str) -> Callable[..., Any]:
    """A function of the operands of a call of this name, in their order in HLO, that makes the same
    call. Raises ValueError for a name that no kernel here has."""
    match = re.match(r"attention_(gradient_)?(\d+)_heads(_in_pairs)?", name)
    if match is None:
        raise ValueError(f"no kernel of this name: {name!r}")
    gradient, heads, pairs = bool(match[1]), int(match[2]), bool(match[3])

    def run(index: jax.Array, *arrays: jax.Array) -> Any:
        bias = next((x for x in arrays if x.dtype == jnp.float32), None)
        rest = [x for x in arrays if x.dtype != jnp.float32]
        query, key, value, *others = rest
        if gradient:
            out, g = others
            return backward(query, key, value, bias, out, g, heads, index=index, pairs=pairs)
        stack = others[0] if others else None
        return forward(query, key, value, bias, heads, stack=stack, index=index, pairs=pairs)

    return run
