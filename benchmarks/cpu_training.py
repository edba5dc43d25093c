"""The kernels of ops/cpu that training alone has, by processor time on this process's cores.

    taskset -c 0 python benchmarks/cpu_training.py

Prints a line of JSON, milliseconds, the best of calls that take turns: `attention`, forward and
backward in float32, as XLA compiles it and by kernels of our own; `weight_gradients`, the product
of one in float32, in bfloat16 as XLA has it, and with the kernel that turns an operand.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from cpu_kernels import REPEATS, best, drawn

from coca_jax import ops
from coca_jax.ops import cpu, cpu_attention
from coca_jax.ops.cpu import Cpu
from coca_jax.ops.cpu_kernels import turn

# (examples, queries, keys, heads, width of one) of the emoji recipe, coca_ViT-B-32 and a ViT-B/16.
ATTENTION = {
    "36_by_36": (128, 36, 36, 4, 40),
    "50_by_50": (16, 50, 50, 12, 64),
    "76_by_255": (16, 76, 255, 8, 64),
    "197_by_197": (4, 197, 197, 12, 64),
}
# (rows, depth, width) of x and g: layers of the same models, and a chunk of a softmax layer.
WEIGHTS = {
    "4608_640_160": (4608, 640, 160),
    "800_768_3072": (800, 768, 3072),
    "304_520_49408": (304, 520, 49_408),
}


def attention() -> dict[str, dict[str, float]]:
    """Milliseconds by shape and way."""
    found = {}
    for name, (batch, queries, keys, heads, head) in ATTENTION.items():
        width = heads * head
        operands = [drawn(batch, n, width) for n in (queries, keys, keys)]
        g = drawn(batch, queries, width)

        def gradients(form: Cpu, *operands: Any, g: Any, heads: int) -> Any:
            y, back = jax.vjp(lambda *qkv: form.attend(*qkv, None, heads), *operands)
            return y, back(g)

        ways = {}
        for way, form in (("xla", Cpu(kernels=False)), ("kernels", Cpu())):
            one = functools.partial(gradients, form, heads=heads)
            run = jax.jit(one, compiler_options=ops.compiler_options("cpu"))
            ways[way] = functools.partial(run, *operands, g=g)
        found[name] = in_milliseconds(best(ways, 2 * REPEATS))
    return found


def weight_gradients() -> dict[str, dict[str, float]]:
    """Milliseconds by shape and way, from float32 operands: rounding them is part of it."""
    found = {}
    for name, (rows, depth, width) in WEIGHTS.items():
        given = drawn(rows, depth), drawn(depth, width, scale=depth**-0.5), drawn(rows, width)

        def gradient(x: Any, w: Any, g: Any, dtype: Any, kernels: bool) -> Any:
            return jax.vjp(lambda w: cpu.product(x, w, dtype, kernels), w)[1](g)

        ways = {}
        for way, dtype, kernels in (
            ("float32", jnp.float32, False),
            ("bfloat16_xla", jnp.bfloat16, False),
            ("bfloat16_kernels", jnp.bfloat16, True),
        ):
            one = functools.partial(gradient, dtype=jnp.dtype(dtype), kernels=kernels)
            run = jax.jit(one, compiler_options=ops.compiler_options("cpu"))
            ways[way] = functools.partial(run, *given)
        found[name] = in_milliseconds(best(ways, REPEATS))
    return found


def in_milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {way: 1000 * value for way, value in seconds.items()}


def main() -> None:
    """Command-line entry."""
    if not (cpu_attention.available() and turn.available()):
        raise SystemExit("no compiler, no kernels: see the warning above")
    print(json.dumps(dict(attention=attention(), weight_gradients=weight_gradients())))


if __name__ == "__main__":
    main()
