"""The product of a weight's gradient in bfloat16 on a CPU: both operands have their rows summed.

XLA has none of that form in bfloat16: it converts to float32, and a processor's units for bfloat16
stay idle. It has one of a left operand that lies turned, but takes a transpose of its own back into
the product, before it or behind. So turning is a kernel, and what is done with the result is kept
apart. Numbers: docs/performance.md.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp

from coca_jax.ops.cpu_kernels import build

SOURCE = pathlib.Path(__file__).with_name("turn_kernels.cc")


def available() -> bool:
    """Whether the kernel is there: compiles and registers it at first use (`build`)."""
    return build.register(
        SOURCE, ("turn", "keep"), "Training in bfloat16 on this CPU will take longer than it needs"
    )


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [N, D] turned times g [N, F], both rounded to bfloat16 -> [D, F], summed in float32."""
    left, right = turn(x.astype(jnp.float32)), g.astype(jnp.bfloat16)
    product = jnp.dot(left, right, preferred_element_type=jnp.float32)
    result = jax.ShapeDtypeStruct(product.shape, product.dtype)
    keep = jax.ffi.ffi_call(
        "coca_jax_keep", result, input_output_aliases={0: 0}, vmap_method="sequential"
    )
    return keep(product)


def turn(x: jax.Array) -> jax.Array:
    """float32 [R, C] -> bfloat16 [C, R], rounded to nearest, ties to even."""
    result = jax.ShapeDtypeStruct(x.shape[::-1], jnp.bfloat16)
    return jax.ffi.ffi_call("coca_jax_turn", result, vmap_method="sequential")(x)
