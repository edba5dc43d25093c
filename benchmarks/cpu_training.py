"""The kernels of ops/cpu that training alone has, by processor time on this process's cores.

    taskset -c 0 python benchmarks/cpu_training.py

Prints a line of JSON, milliseconds, the best of interleaved calls: `weight_gradients`, the product
of one in float32, in bfloat16 by XLA, and in bfloat16 with the kernel that transposes an operand.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from cpu_kernels import REPEATS, best, drawn

from coca_jax import ops
from coca_jax.ops import cpu
from coca_jax.ops.cpu_kernels import turn

# (rows, depth, width) of x and g: layers of the same models, and a chunk of a softmax layer.
WEIGHTS = {
    "4608_640_160": (4608, 640, 160),
    "800_768_3072": (800, 768, 3072),
    "304_520_49408": (304, 520, 49_408),
}


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
    if not turn.available():
        raise SystemExit("no compiler, no kernels: see the warning above")
    print(json.dumps(dict(weight_gradients=weight_gradients())))


if __name__ == "__main__":
    main()
