"""The kernels of ops/cpu alone, by processor time on the cores that this process has.

    taskset -c 0 python benchmarks/cpu_kernels.py

Prints a line of JSON: `convolutions`, GFLOP/s of 3 x 3 convolutions of 128 images as XLA compiles
them and by kernels of our own, forward and for either gradient; `decoding`, milliseconds of the
parts of a decoder's block with weights in float32 and in bfloat16, 64 rows of width 512. Ways take
turns; each number is the best of its calls.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax import ops
from coca_jax.ops.cpu_kernels import conv, decode

# (channels, features, pixels, stride) of the convolutions of an earlier, deeper stem.
SHAPES = {
    "32_64_24_s2": (32, 64, 24, 2),
    "64_64_12": (64, 64, 12, 1),
    "64_128_12_s2": (64, 128, 12, 2),
    "128_128_6": (128, 128, 6, 1),
}
IMAGES = 128
ROWS, WIDTH, HEADS, PAST, TOKENS, WORDS = 64, 512, 8, 76, 255, 49_408
REPEATS = 15


def drawn(*shape: int, scale: float = 1.0) -> jax.Array:
    x = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    return jnp.asarray(scale * x)


def best(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the cores, the least of the calls, which take turns after one of each."""
    for run in ways.values():
        jax.block_until_ready(run())
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.process_time()
            jax.block_until_ready(run())
            found[name] = min(found[name], time.process_time() - start)
    return found


def by_xla(x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int) -> jax.Array:
    """What `conv_kernels.convolve` computes."""
    names = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        jax.nn.relu(x), kernel, (stride, stride), "SAME", dimension_numbers=names
    )
    return y + bias


def by_kernels(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int, halves: bool = False
) -> jax.Array:
    return conv.convolve(x, kernel, bias, stride, True, halves)


def convolutions() -> dict[str, dict[str, float]]:
    """GFLOP/s by shape and way."""
    found: dict[str, dict[str, float]] = {}
    compiled = functools.partial(jax.jit, compiler_options=ops.compiler_options("cpu"))
    for name, (channels, features, pixels, stride) in SHAPES.items():
        x = drawn(IMAGES, pixels, pixels, channels)
        kernel, bias = drawn(3, 3, channels, features, scale=0.05), drawn(features)
        g = drawn(IMAGES, pixels // stride, pixels // stride, features)
        gflop = 2 * 9 * channels * features * IMAGES * (pixels // stride) ** 2 / 1e9
        ways: dict[str, dict[str, Callable[[], Any]]] = {}
        forms: dict[str, Any] = dict(xla=by_xla, kernels=by_kernels)
        if conv.available_in_bfloat16():
            forms["bfloat16_kernels"] = functools.partial(by_kernels, halves=True)
        for way, convolve in forms.items():
            one = functools.partial(convolve, stride=stride)

            def of_input(x: Any, w: Any, b: Any, g: Any, one: Any = one) -> Any:
                return jax.vjp(lambda x: one(x, w, b), x)[1](g)

            def of_kernel(x: Any, w: Any, b: Any, g: Any, one: Any = one) -> Any:
                return jax.vjp(lambda w, b: one(x, w, b), w, b)[1](g)

            runs = dict(forward=compiled(one), input_gradient=compiled(of_input))
            runs["kernel_gradient"] = compiled(of_kernel)
            for part, run in runs.items():
                given = (x, kernel, bias) if part == "forward" else (x, kernel, bias, g)
                ways.setdefault(part, {})[way] = functools.partial(run, *given)
        for part, both in ways.items():
            for way, seconds in best(both, REPEATS).items():
                found.setdefault(f"{name}_{way}", {})[part] = gflop / seconds
    return found


def dense(depth: int, width: int, dtype: Any) -> dict[str, jax.Array]:
    kernel = drawn(depth, width, scale=depth**-0.5)
    return dict(panels=decode.panels(kernel, dtype), bias=drawn(width))


def parts(dtype: Any) -> dict[str, Callable[[], Any]]:
    """A call of each part of a block, with weights of this type."""
    head = WIDTH // HEADS
    x, norm = drawn(ROWS, 1, WIDTH), dict(scale=jnp.ones(WIDTH), bias=jnp.zeros(WIDTH))
    key, value = (drawn(ROWS, HEADS, PAST, head) for _ in range(2))
    mask = jnp.ones((ROWS, 1, PAST), bool)
    layer = functools.partial(dense, dtype=dtype)
    panels = jax.vmap(functools.partial(decode.panels, dtype=dtype))
    shared = dict(
        query=panels(drawn(HEADS, head, WIDTH, scale=WIDTH**-0.5)),
        value=panels(drawn(HEADS, WIDTH, head, scale=WIDTH**-0.5)),
        bias=drawn(WIDTH),
    )
    both = {"in": layer(WIDTH, 4 * WIDTH), "out": layer(4 * WIDTH, WIDTH)}
    tokens = drawn(ROWS, TOKENS, WIDTH).astype(dtype)
    square = layer(WIDTH, WIDTH)
    past = (x, norm, layer(WIDTH, 3 * WIDTH), square, mask, PAST - 1, key, value)
    seen = (x, norm, square, square, shared, tokens)
    mlp = jax.jit(lambda x, norm, both: decode.mlp(x, norm, both, "gelu"))
    return dict(
        mlp=functools.partial(mlp, x, norm, both),
        self_attention=functools.partial(jax.jit(decode.self_attention), *past),
        image_attention=functools.partial(jax.jit(decode.image_attention), *seen),
        logits=functools.partial(jax.jit(decode.log_probs), x, norm, layer(WIDTH, WORDS)),
    )


def decoding() -> dict[str, dict[str, float]]:
    """Milliseconds by part and type; float32 alone where the processor has no other."""
    types = dict(float32=jnp.float32)
    if decode.available_in_bfloat16():
        types["bfloat16"] = jnp.bfloat16
    made = {name: parts(dtype) for name, dtype in types.items()}
    found = {}
    for part in made["float32"]:
        seconds = best({name: one[part] for name, one in made.items()}, 2 * REPEATS)
        found[part] = {name: 1000 * value for name, value in seconds.items()}
    return found


def main() -> None:
    """Command-line entry."""
    if not (conv.available() and decode.available()):
        raise SystemExit("no compiler, no kernels: see the warning above")
    print(json.dumps(dict(convolutions=convolutions(), decoding=decoding())))


if __name__ == "__main__":
    main()
