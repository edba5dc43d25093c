"""The product of a weight's gradient in bfloat16 on a CPU: both operands have their rows summed.

XLA has no such product in bfloat16: it converts to float32, and a processor's bfloat16 units stay
idle. It has one for a left operand that is already transposed, but it folds its own transpose back
into the product. So the transpose is a kernel, and the result passes through an identity call, across
which XLA does not move its own transpose. On one core of an Intel Xeon with AMX a step of configs/emoji.py takes 1.4 times
as long without this kernel, and a bfloat16 step of coca_ViT-B-32 1.3 times
(benchmarks/cpu_kernels.py).
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
