"""Softmax attention for training on a CPU, forward and backward.

XLA repacks both operands of each head's products, which are small, and writes scores and weights
to memory in between. Numbers: docs/performance.md.
"""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp

from coca_jax.ops.cpu_kernels import build
from coca_jax.ops.reference import attend as plain
from coca_jax.ops.reference import merge_heads, split_heads

SOURCE = pathlib.Path(__file__).with_name("cpu_kernels") / "attention_kernels.cc"
KERNELS = ("attention", "attention_gradients")


def available() -> bool:
    """Whether the kernels are there: compiles and registers them at first use (`build`)."""
    return build.register(SOURCE, KERNELS, "Training on this CPU will take longer than it needs")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, heads: int
) -> jax.Array:
    """float32 [B, N, D] x [B, M, D] -> [B, N, D] as `Reference.attend`. The kernels run where it is
    differentiated, and nowhere else: what only runs forward need not wait until they are compiled.
    """
    return _plain(mask, heads, query, key, value)


def _plain(mask, heads, *operands):
    query, key, value = (split_heads(x, heads) for x in operands)
    return merge_heads(plain(query, key, value, mask, jnp.float32))


def _forward(query, key, value, mask, heads):
    if not available():
        return jax.vjp(functools.partial(_plain, mask, heads), query, key, value)
    shown = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
    shown = shown.reshape((1,) * (4 - shown.ndim) + shown.shape)
    operands = (query, key, value, shown)
    result = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    return _call("attention", result)(*operands, heads=heads), operands


def _backward(heads, operands, g):
    if callable(operands):  # the gradient of `_plain`
        return *operands(g), None
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in operands[:3]]
    return *_call("attention_gradients", results)(*operands, g, heads=heads), None


def _call(name, result):
    return jax.ffi.ffi_call(f"coca_jax_{name}", result, vmap_method="sequential")


attend.defvjp(_forward, _backward)
