"""3 x 3 convolutions for training on a CPU, with the ReLU before them and the bias after.

XLA's own convolutions run at 40 to 115 GFLOP/s on a core that multiplies matrices at 115. They are
slowest for the gradients of kernels and of strided convolutions, and each ReLU and bias next to
them is another pass over memory. On one core of an Intel Xeon with AMX a step of configs/emoji.py
takes 1.5 to 1.6 times as long without these kernels (benchmarks/cpu_kernels.py).

The kernels are compiled for float32, and for bfloat16 where a processor multiplies pairs of those:
they round both operands of each product, and sums are float32.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.ops.cpu_kernels import build

SOURCE = pathlib.Path(__file__).with_name("conv_kernels.cc")
KERNELS = ("convolution", "convolution_input", "convolution_kernel")
PANEL = 64  # columns of a panel
LINE = 16  # a kernel's features, and channels where their gradient is asked for, are whole lines
MOST_ROWS = 1024


def available() -> bool:
    """Whether the kernels are there: compiles and registers them at first use (`build`)."""
    return build.register(
        SOURCE, KERNELS, "Training a convolutional stem on this CPU will take longer than it needs"
    )


def available_in_bfloat16() -> bool:
    """The same of those for bfloat16; False without a word on a processor that lacks it."""
    without = "Training a convolutional stem in bfloat16 on this CPU will take longer than it needs"
    return build.register_bfloat16(SOURCE, KERNELS, without)


def fits(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    """Whether the kernels know the shapes of x [B, H, W, C] and kernel [3, 3, C, F]."""
    _, height, width, _ = x.shape
    whole = height % stride == width % stride == 0 and kernel.shape[-1] % LINE == 0
    return whole and max(height, width) <= MOST_ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def convolve(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int, rectify: bool, halves: bool
) -> jax.Array:
    """float32 x [B, H, W, C], or max(x, 0), convolved with kernel [3, 3, C, F] with zeros around
    it, plus bias [F] -> [B, H / stride, W / stride, F]. What it takes: see `fits`. halves: round
    the operands of products, of those for gradients too, to bfloat16; `available_in_bfloat16`."""
    batch, height, width, _ = x.shape
    shape = (batch, height // stride, width // stride, kernel.shape[-1])
    call = _call("convolution", halves, jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(x, _panels(kernel, halves), bias, rectify=rectify)


def _forward(x, kernel, bias, stride, rectify, halves):
    return convolve(x, kernel, bias, stride, rectify, halves), (x, kernel)


def _backward(stride, rectify, halves, residuals, g):
    x, kernel = residuals
    of_kernel = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (kernel.shape, kernel.shape[3:])]
    call = _call("convolution_kernel", halves, of_kernel)
    return _input_gradient(x, kernel, g, rectify, halves), *call(x, g, rectify=rectify)


convolve.defvjp(_forward, _backward)


def _call(name: str, halves: bool, results: Any) -> Callable[..., Any]:
    return jax.ffi.ffi_call(build.target(name, halves), results)


def _input_gradient(x, kernel, g, rectify: bool, halves: bool) -> jax.Array:
    """The gradient of x. Of an image it is not asked for, and XLA leaves all of this away."""
    pad = -x.shape[-1] % LINE
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, pad), (0, 0)))
    positive = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, pad))) if pad else x
    zeros = jnp.zeros(positive.shape[3:], jnp.float32)
    result = jax.ShapeDtypeStruct(positive.shape, jnp.float32)
    call = _call("convolution_input", halves, result)
    dx = call(g, _panels(kernel.swapaxes(2, 3), halves), zeros, positive, rectify=rectify)
    return dx[..., : x.shape[-1]]


def _panels(kernel: jax.Array, halves: bool) -> jax.Array:
    """[3, 3, C, F] as the kernels read it: for each 64 columns of F, [9, C, columns] in a row, of
    halves [9, ceil(C / 2), columns, 2]."""
    width, pair = kernel.shape[-1], 1 + halves
    if halves:
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, kernel.shape[2] % 2), (0, 0)))
        kernel = kernel.astype(jnp.bfloat16)
    columns = kernel.reshape(-1, pair, width).swapaxes(1, 2)
    blocks = range(0, width, PANEL)
    return jnp.concatenate([columns[:, first : first + PANEL].reshape(-1) for first in blocks])
