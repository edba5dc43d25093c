"""Muon's iterations on a CPU, one matrix a core.

XLA runs the products of each matrix of a small model one by one, about a hundred calls in a step,
and in float32 where a processor multiplies bfloat16 twice as fast. On one core of an Intel Xeon
with AMX a step of configs/emoji.py takes 1.3 times as long without this kernel
(benchmarks/cpu_kernels.py).
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp

from coca_jax.ops.cpu_kernels import build

SOURCE = pathlib.Path(__file__).with_name("muon_kernels.cc")
KERNELS = ("orthogonalise",)
MOST = 2**18  # numbers of a matrix: what stays in a core's second cache


def available() -> bool:
    """Whether the kernel is there: compiles and registers it at first use (`build`)."""
    return build.register(SOURCE, KERNELS, "Muon on this CPU will take longer than it needs")


def available_in_bfloat16() -> bool:
    """The same of that for bfloat16; False without a word on a processor that lacks it."""
    without = "Muon in bfloat16 on this CPU will take longer than it needs"
    return build.register_bfloat16(SOURCE, KERNELS, without)


def fits(x: jax.Array) -> bool:
    """Whether the kernel is for x [L, M, N]."""
    _, rows, columns = x.shape
    return x.dtype == jnp.float32 and rows <= columns and rows * columns <= MOST


def orthogonalise(
    x: jax.Array, coefficients: jax.Array, iterations: int, halves: bool
) -> jax.Array:
    """`Reference.orthogonalise` of x [L, M, N], M <= N. halves: round the operands of products to
    bfloat16; `available_in_bfloat16`."""
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call(build.target("orthogonalise", halves), result)
    return call(x, coefficients.astype(jnp.float32), iterations=iterations)
