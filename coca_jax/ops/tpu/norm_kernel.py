"""The backward pass of layer normalisation as one TPU kernel (Pallas).

XLA makes its sums over rows and over columns in five passes, and the residual stream's gradient in
a sixth; here each number is read once.

Shape letters: L layers, B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
