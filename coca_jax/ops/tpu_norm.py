"""Norm, GELU and bias as the TPU compiler runs them best, with gradients of their own.

They compute what the plain forms in ops/reference.py compute. What differs is where the work lands,
found by the compiler's cycle estimates (docs/performance.md): sums over rows and columns run on the
matrix unit as products with ones (exact: the partial sums are float32).

Shape letters: B batch, N tokens, D width, F MLP width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from coca_jax.ops.reference import gelu, gelu_slope
from coca_jax.parallel import sharding
from coca_jax.parallel.sharding import active_mesh

# The backward pass of layer normalisation as one TPU kernel (Pallas).
#
# XLA makes its sums over rows and over columns in five passes, and the residual stream's gradient in
# a sixth; here each number is read once.
#
# Shape letters: L layers, B batch, N tokens, D width.


ROWS = 256  # tokens a step, about
AT_A_TIME = 16  # rows whose numbers stay in registers: a tile of bfloat16
MOST_BYTES = 13 * 2**20  # of blocks in a core's memory, two of each; of 16 MiB on v4


def fits(x: jax.Array) -> bool:
    """Whether x [..., B, N, D] can run as this kernel: N in whole tiles, since XLA lays other
    lengths out with the batch inside, and would copy."""
    n, width = x.shape[-2:]
    if x.dtype != jnp.bfloat16 or n % 16:
        return False
    return 2 * 2 * 4 * at_once(n) * width <= MOST_BYTES


def at_once(n: int) -> int:
    """Tokens of a row of n, in whole tiles, that are a block: all or, of long rows, a share."""
    return next((r for r in range(ROWS, 0, -16) if n % r == 0), n) if n > ROWS else n


def rows_per_step(batch: int, n: int) -> int:
    """How many of `batch` rows of n tokens the kernel takes at a time."""
    return next(r for r in range(max(1, ROWS // n), 0, -1) if batch % r == 0)


def backward(
    x: jax.Array,
    scale: jax.Array,
    gradient: jax.Array,
    beside: jax.Array,
    *,
    epsilon: float,
    index: jax.Array | int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradient of x where y = norm(x) and x itself also goes on beside the norm.

    x: bfloat16 [B, N, D], or a stack [L, B, N, D] of which `index` is meant; scale: float32 [D].
    gradient: of y, bfloat16 [B, N, D]; beside: of x where it goes on, likewise.
    Returns (gradient of x, bfloat16 [B, N, D]; float32 [B, 3, D], or more rows than B of shorter
    parts, sums over N of: the gradient of scale, that of the norm's bias, the first result).
    """
    batch, length, width = gradient.shape
    n = at_once(length)
    parts = length // n  # of a row, where it is long: then a step takes one
    rows = rows_per_step(batch, n)
    block = pl.BlockSpec((rows, n, width), lambda b, p, i: (b, p, 0))
    of_stack = pl.BlockSpec((None, rows, n, width), lambda b, p, i: (i[0], b, p, 0))
    of_sums = pl.BlockSpec((rows, 3, width), lambda b, p, i: (b * parts + p, 0, 0))
    kernel = functools.partial(_backward, epsilon=epsilon)
    return pl.pallas_call(
        lambda index, *refs: kernel(*refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch // rows, parts),
            in_specs=[
                block if x.ndim == 3 else of_stack,
                pl.BlockSpec((1, width), lambda b, p, i: (0, 0)),
                block,
                block,
            ],
            out_specs=[block, of_sums],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, width), gradient.dtype),
            jax.ShapeDtypeStruct((batch * parts, 3, width), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="norm_gradient",
        interpret=interpret,
    )(jnp.asarray(index, jnp.int32).reshape(1), x, scale[None], gradient, beside)


def _backward(x, scale, gradient, beside, dx, sums, *, epsilon):
    batch, n, width = x.shape
    for row in range(batch):
        totals = [jnp.zeros((8, width), jnp.float32)] * 3
        for first in range(0, n, AT_A_TIME):
            part = (row, slice(first, min(first + AT_A_TIME, n)))
            values = x[part].astype(jnp.float32)
            centred = values - values.mean(1, keepdims=True)
            variance = jnp.square(centred).mean(1, keepdims=True)
            inverse = jax.lax.rsqrt(variance + epsilon)
            normal = centred * inverse
            g = gradient[part].astype(jnp.float32)
            scaled = g * scale[:]
            mean = scaled.mean(1, keepdims=True)
            along = (scaled * normal).mean(1, keepdims=True)
            result = beside[part].astype(jnp.float32)
            result = result + inverse * (scaled - mean - normal * along)
            dx[part] = result.astype(dx.dtype)
            parts: tuple[Any, ...] = (g * normal, g, result)
            totals = [t + _eight(p) for t, p in zip(totals, parts)]
        for i, total in enumerate(totals):
            sums[row, i : i + 1] = total.sum(0, keepdims=True)


def _eight(x: jax.Array) -> jax.Array:
    """[R, D] -> [8, D] of the same sum over rows, without moving numbers between rows."""
    if x.shape[0] % 8:
        x = jnp.concatenate([x, jnp.zeros((-x.shape[0] % 8, x.shape[1]), x.dtype)])
    return x.reshape(-1, 8, x.shape[1]).sum(0)


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
            return backward(stack, scale, gradient, beside, epsilon=epsilon, index=index)

        rows = sharding.spec("batch")
        specs = (P(None, *rows), P(), rows, rows, P())
        run = per_device(run, mesh, specs, (rows, rows))
        dx, sums = run(stack, index, gradient, beside, scale)
        return dx, *sums.sum(0)

    def elsewhere(stack, index, gradient, beside, scale):
        parts = norm_gradients(stack[index], mean, inverse, scale, gradient)
        dx = beside + parts[0]
        return dx, *parts[1:], column_sum(dx)

    arrays = (stack, index, gradient, beside, scale)
    if stack.shape[1] % parts_of(mesh)[0] or not fits(stack):
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


def parts_of(mesh: Any) -> tuple[int, int]:
    """(parts that a batch is split in, parts that a width is)."""
    return (sharding.batch_parts(mesh), mesh.shape["tensor"]) if mesh else (1, 1)


def per_device(
    function: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on each device's share: the compiler cannot split a kernel by itself."""
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


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
