"""Softmax attention of bfloat16 over long sequences as one TPU kernel forward and one backward.

attention_kernel.py holds a whole row of the batch at a time, which longer sequences do not leave
room for. Here a step takes a block of the queries. Forward it meets all keys, so that softmax needs
no second look, and each query's logarithm of its sum of exponentials is kept. Backward blocks of
queries meet blocks of keys: the gradients of the keys of a block are summed while the queries pass,
those of all queries while the keys do (Dao 2023, Algorithm 2). Heads lie side by side as they do
there, so that nothing is transposed on either side.

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

from coca_jax.ops.tpu_attention_short import (
    FEWEST,
    LANES,
    PAIRS,
    Group,
    Writer,
    dot,
    heads_together,
    staggered,
)

MOST_FORWARD = 128  # queries a step forward, at most
LEAST = 64  # rows of a block that is not all there are; 16 x 16 take four times XLA's form
MOST_QUERIES, MOST_KEYS = 128, 256  # of a step backward, at most
# Of a core's memory, 16 MiB on v4: what blocks and sums may take backward, and forward together
# with what the compiler keeps there for each weight of a head.
MOST_BYTES, MOST_BYTES_FORWARD, BYTES_A_WEIGHT = 14 * 2**20, 15.3 * 2**20, 66
ROOM = 17 * 2**20


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Whether attention of query [B, N, D] over key [B, M, D] can run as these kernels."""
    (n, width), m = query.shape[-2:], key.shape[-2]
    bfloat16 = query.dtype == key.dtype == jnp.bfloat16
    return bfloat16 and rows_forward(n, m, width) > 0 and min(blocks_backward(n, m, width)) > 0


def rows_forward(n: int, m: int, width: int) -> int:
    """Queries a step of `forward`; 0 where it cannot run."""

    def memory(rows: int) -> int:
        return 2 * (2 * m + 4 * rows) * width + BYTES_A_WEIGHT * rows * m

    found = (r for r in _divisors(n, MOST_FORWARD) if memory(r) <= MOST_BYTES_FORWARD)
    return next(found, 0)


def blocks_backward(n: int, m: int, width: int) -> tuple[int, int]:
    """Queries and keys of a step of `backward`; (0, 0) where it cannot run."""

    def memory(queries: int, keys: int) -> int:
        return 2 * (4 * keys + 8 * queries) * width + 4 * (n + 2 * keys) * width

    found = (
        (queries, keys)
        for keys in _divisors(m, MOST_KEYS)
        for queries in _divisors(n, MOST_QUERIES)
        if memory(queries, keys) <= MOST_BYTES
    )
    return max(found, key=lambda b: (b[0] * b[1], b[1]), default=(0, 0))


def _divisors(length: int, most: int) -> list[int]:
    """Rows of a block that divide `length` into whole tiles, the most first: those of 272, which
    only 16 divides, are none."""
    tiles = (r for r in range(most, 0, -FEWEST) if length % r == 0)
    return [r for r in tiles if r >= LEAST or r == length]


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    heads: int,
    *,
    stack: jax.Array | None = None,
    index: jax.Array | int = 0,
    pairs: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """softmax(query key' / sqrt(K)) value, bfloat16 [B, N, D], [B, M, D] -> [B, N, D], and the
    logarithm of each query's sum of exponentials, float32 [B, N, LANES], a lane a head.

    stack, index: as of attention_kernel.forward. pairs: two heads go through the products together.
    """
    n, m = query.shape[-2], key.shape[-2]
    rows = rows_forward(n, m, query.shape[-1])
    groups = heads_together(heads, query.shape[-1] // heads, query.shape[-1], rows, pairs)
    inputs: tuple[jax.Array, ...] = (query, key, value)
    specs = [_spec(x, count, at) for x, count, at in zip(inputs, (rows, m, m), ("q", "", ""))]
    shape = jax.ShapeDtypeStruct(query.shape[-3:], query.dtype)
    body, aliases = functools.partial(_forward, groups=groups), {}
    if stack is not None:
        shape = jax.ShapeDtypeStruct(stack.shape, stack.dtype)
        aliases = {1 + len(inputs): 0}  # after the index and the inputs
        inputs, specs = (*inputs, stack), [*specs, pl.BlockSpec(memory_space=pl.ANY)]
    sums = jax.ShapeDtypeStruct((*query.shape[-3:-1], LANES), jnp.float32)
    out, sums = pl.pallas_call(
        lambda index, *refs: body(*refs[:3], *refs[-2:]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(query.shape[-3], 1, n // rows),
            in_specs=specs,
            out_specs=[_spec(shape, rows, "q"), _spec(sums, rows, "q")],
        ),
        out_shape=[shape, sums],
        input_output_aliases=aliases,
        compiler_params=_in_order(),
        name=f"long_attention_{heads}_heads{PAIRS * pairs}",
        interpret=interpret,
    )(jnp.asarray(index, jnp.int32).reshape(1), *inputs)
    return out, sums


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    gradient: jax.Array,
    sums: jax.Array,
    heads: int,
    *,
    index: jax.Array | int = 0,
    pairs: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value from both results of `forward` and the gradient of the
    first, [B, N, D].

    Each of query, key, value, out and sums may be a stack [L, B, N, D], of which `index` is meant.
    """
    (n, width), m = query.shape[-2:], key.shape[-2]
    queries, keys = blocks_backward(n, m, width)
    groups = heads_together(heads, width // heads, width, queries, pairs)
    inputs = (query, key, value, out, gradient, sums)
    sizes = (queries, keys, keys, queries, queries, queries)
    shapes = [jax.ShapeDtypeStruct(x.shape[-3:], x.dtype) for x in (query, key, value)]
    d_query, d_key, d_value = pl.pallas_call(
        lambda index, *refs: _backward(*refs, groups=groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(query.shape[-3], m // keys, n // queries),
            in_specs=[_spec(x, r, at) for x, r, at in zip(inputs, sizes, "qkkqqq")],
            out_specs=[
                _spec(shapes[0], queries, "last"),
                _spec(shapes[1], keys, "k"),
                _spec(shapes[2], keys, "k"),
            ],
            scratch_shapes=[
                pltpu.VMEM((n, width), jnp.float32),
                pltpu.VMEM((keys, width), jnp.float32),
                pltpu.VMEM((keys, width), jnp.float32),
            ],
        ),
        out_shape=shapes,
        compiler_params=_in_order(),
        name=f"long_attention_gradient_{heads}_heads{PAIRS * pairs}",
        interpret=interpret,
    )(jnp.asarray(index, jnp.int32).reshape(1), *inputs)
    return d_query, d_key, d_value


def _in_order() -> pltpu.CompilerParams:
    # The same blocks take some KiB more on v5e than on v4; it has room, but not by default.
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=ROOM,
    )


def _spec(x: Any, rows: int, at: str) -> pl.BlockSpec:
    """Blocks of `rows` of x [B, N, D] or of layer `index` of [L, B, N, D], over a grid of rows of
    the batch, blocks of keys and blocks of queries. at: 'q', 'k': the block of the step; '': there
    is one; 'last': that of the queries, once the last keys are there. A block of keys, which stays
    for many steps, has no second place."""

    def place(k: Any, q: Any) -> Any:
        if at == "last":
            return jnp.where(k == pl.num_programs(1) - 1, q, 0)
        return {"q": q, "k": k, "": 0}[at]

    mode = pl.Buffered(1) if at in ("k", "") else None
    width = x.shape[-1]
    if len(x.shape) == 3:
        shape: Any = (None, rows, width)
        return pl.BlockSpec(shape, lambda b, k, q, i: (b, place(k, q), 0), pipeline_mode=mode)
    return pl.BlockSpec(
        (None, None, rows, width),
        lambda b, k, q, i: (i[0], b, place(k, q), 0),
        pipeline_mode=mode,
    )


def _forward(query, key, value, out, sums, *, groups):
    scale = groups[0].width ** -0.5
    writer, columns = Writer(out), _Columns(sums)

    def start(group):
        q = group.spread(group.of(query))
        scores = dot(q, group.of(key), 1, 1)
        top = scores.max(1, keepdims=True)
        exps = jnp.exp((scores - top) * scale)
        total = exps.sum(1, keepdims=True)
        columns.put(group, top * scale + jnp.log(total))
        return exps.astype(q.dtype), 1 / total, group.of(value)

    def finish(group, exps, inverse, v):
        writer.add(group, group.merge(dot(exps, v, 1, 0) * inverse))

    staggered(groups, start, finish)
    columns.store()


class _Columns:
    """A number a query and head, [heads N, 1] of each group, as lanes of a block [N, LANES]."""

    def __init__(self, ref: Any):
        self.ref = ref
        self.lane = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 1)
        self.all = jnp.zeros(ref.shape, jnp.float32)

    def put(self, group: Group, x: jax.Array) -> None:
        for head, part in zip(group.heads, jnp.split(x, len(group.heads))):
            self.all = jnp.where(self.lane == head, part, self.all)

    def store(self) -> None:
        self.ref[:] = self.all


class _Adder(Writer):
    """A writer that adds to float32 sums from a row on."""

    def __init__(self, ref: Any, first: Any, rows: int):
        super().__init__(ref)
        self.rows = pl.ds(first, rows)

    def store(self, start: int, stop: int, x: jax.Array) -> None:
        self.ref[self.rows, start:stop] += x


def _backward(
    query, key, value, out, gradient, sums, d_query, d_key, d_value, *totals, groups
):  # fmt: skip
    of_query, of_key, of_value = totals
    scale = groups[0].width ** -0.5
    count, keys = query.shape[0], key.shape[0]
    at_key, at_query = pl.program_id(1), pl.program_id(2)
    first = pl.multiple_of(at_query * count, 16)

    @pl.when(at_query == 0)
    def _():
        of_key[:] = jnp.zeros_like(of_key)
        of_value[:] = jnp.zeros_like(of_value)

    @pl.when(at_key == 0)
    def _():
        of_query[pl.ds(first, count)] = jnp.zeros((count, of_query.shape[1]), jnp.float32)

    to_query = _Adder(of_query, first, count)
    to_key, to_value = _Adder(of_key, 0, keys), _Adder(of_value, 0, keys)

    def start(group):
        q, k, v = group.spread(group.of(query)), group.of(key), group.of(value)
        log_sums = jnp.concatenate([sums[:, h : h + 1] for h in group.heads])
        weights = jnp.exp(dot(q, k, 1, 1) * scale - log_sums)
        g = group.spread(group.of(gradient))
        o = group.repeat(group.of(out)).astype(jnp.float32)
        inner = (o * g.astype(jnp.float32)).sum(1, keepdims=True)
        d_scores = (weights * (dot(g, v, 1, 1) - inner)).astype(q.dtype)
        return q, k, g, weights.astype(q.dtype), d_scores

    def finish(group, q, k, g, weights, d_scores):
        to_value.add(group, dot(weights, g, 0, 0))
        to_query.add(group, group.merge(dot(d_scores, k, 1, 0)))
        to_key.add(group, dot(d_scores, q, 0, 0))

    staggered(groups, start, finish)

    @pl.when(at_query == pl.num_programs(2) - 1)
    def _():
        d_key[:] = (of_key[:] * scale).astype(d_key.dtype)
        d_value[:] = of_value[:].astype(d_value.dtype)

    @pl.when(at_key == pl.num_programs(1) - 1)
    def _():
        d_query[:] = (of_query[pl.ds(first, count)] * scale).astype(d_query.dtype)


def work(name: str, shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """(steps, bytes of operands and results that are moved) of a call with bfloat16 operands of
    these shapes."""
    (batch, n, width), m = shapes[0][-3:], shapes[1][-2]
    if "gradient" not in name:
        steps = batch * (n // rows_forward(n, m, width))
        return steps, 2 * batch * (2 * n + 2 * m) * width
    queries, keys = blocks_backward(n, m, width)
    moved = 2 * batch * ((3 * (m // keys) + 1) * n + 4 * m) * width
    return batch * (m // keys) * (n // queries), moved


def replay(name: str) -> Callable[..., Any]:
    """A function of the operands of a call of this name, in their order in HLO, that makes the same
    call. Raises ValueError for a name that no kernel here has."""
    match = re.match(r"long_attention_(gradient_)?(\d+)_heads(_in_pairs)?", name)
    if match is None:
        raise ValueError(f"no kernel of this name: {name!r}")
    gradient, heads, pairs = bool(match[1]), int(match[2]), bool(match[3])

    def run(index: jax.Array, *arrays: jax.Array) -> Any:
        options: dict[str, Any] = dict(index=index, pairs=pairs)
        query, key, value, *others = arrays
        if gradient:
            out, g, sums = others
            return backward(query, key, value, out, g, sums, heads, **options)
        stack = others[0] if others else None
        return forward(query, key, value, heads, stack=stack, **options)

    return run
