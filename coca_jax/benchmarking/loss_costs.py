"""`benchmark losses`: both losses against their plain definitions, memory and time.

Peak memory is the compiler's own count of temporaries and results at the full size; nothing of
that size has to be run. Times are medians at the size given for timing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.ops.captioning import captioning_loss
from coca_jax.ops.contrastive import contrastive_loss


def naive_contrastive(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """The paper's Eq. 2 as it is written: [B, E], [B, E], temperature -> loss."""
    scores = scale * image @ text.T
    rows = jnp.diagonal(jax.nn.log_softmax(scores, axis=1))
    columns = jnp.diagonal(jax.nn.log_softmax(scores, axis=0))
    return -(rows + columns).mean()


def naive_captioning(
    states: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
    """The paper's Eq. 3 with all logits [B, L, V] at once -> mean loss."""
    logits = jnp.einsum("bld,dv->blv", states, kernel) + bias
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -(picked * mask).sum() / mask.sum()


def measure(
    functions: dict[str, Callable[..., Any]],
    full: tuple[Any, ...],
    timed: tuple[Any, ...],
    repeats: int,
) -> dict[str, Any]:
    """{name}_bytes at the shapes `full`, {name}_seconds on the arrays `timed`, and the ratios."""
    result: dict[str, Any] = {}
    compiled = {}
    for name, function in functions.items():
        jitted = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))
        memory = jitted.lower(*full).compile().memory_analysis()
        result[f"{name}_bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
        compiled[name] = jitted.lower(*timed).compile()
        jax.block_until_ready(compiled[name](*timed))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):  # turn about, so that a busy spell hits all alike
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*timed))
            times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        result[f"{name}_seconds"] = statistics.median(values)
        result[f"{name}_seconds_spread"] = max(values) - min(values)
    result["memory_ratio"] = result["ours_bytes"] / result["naive_bytes"]
    result["time_ratio"] = result["ours_seconds"] / result["naive_seconds"]
    return result


def contrastive(batch: int, width: int, timed_batch: int, chunk: int, repeats: int) -> dict:
    """Our contrastive loss in column tiles of `chunk` against the plain one."""

    def ours(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
        return contrastive_loss(image, text, scale, chunk=chunk)[0]

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, timed_batch, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    shape = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    timed = (jnp.asarray(rows[0]), jnp.asarray(rows[1]), jnp.float32(14.3))
    functions: dict[str, Callable[..., Any]] = {"naive": naive_contrastive, "ours": ours}
    return measure(functions, (shape, shape, scalar), timed, repeats)


def captioning(
    batch: int, length: int, vocab: int, width: int, timed_batch: int, chunk: int, repeats: int
) -> dict:
    """Our captioning loss in chunks of tokens against the plain one; all targets real."""

    def ours(states: jax.Array, kernel: jax.Array, bias: jax.Array, *rest: jax.Array) -> jax.Array:
        return captioning_loss(states, kernel, bias, *rest, chunk=chunk)[0]

    def shapes(rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape = jax.ShapeDtypeStruct
        return (
            shape((rows, length, width), jnp.float32),
            shape((width, vocab), jnp.float32),
            shape((vocab,), jnp.float32),
            shape((rows, length), jnp.int32),
            shape((rows, length), jnp.bool_),
        )

    rng = np.random.default_rng(0)
    timed = (
        jnp.asarray(rng.normal(size=(timed_batch, length, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(width, vocab)) * 0.02, jnp.float32),
        jnp.zeros((vocab,), jnp.float32),
        jnp.asarray(rng.integers(0, vocab, size=(timed_batch, length)), jnp.int32),
        jnp.ones((timed_batch, length), bool),
    )
    functions: dict[str, Callable[..., Any]] = {"naive": naive_captioning, "ours": ours}
    return measure(functions, shapes(batch), timed, repeats)


def run(repeats: int = 5) -> dict[str, Any]:
    """Both comparisons at the sizes that docs/performance.md quotes; prints a table."""
    result = {
        "contrastive": contrastive(32_768, 512, 8_192, 1_024, repeats),
        "captioning": captioning(64, 76, 49_408, 512, 8, 304, repeats),
    }
    for name, numbers in result.items():
        print(
            f"{name:12s} memory {numbers['ours_bytes'] / 2**20:.0f} MiB of "
            f"{numbers['naive_bytes'] / 2**20:.0f} MiB ({numbers['memory_ratio']:.3f}), time "
            f"{numbers['ours_seconds']:.3f} s of {numbers['naive_seconds']:.3f} s "
            f"({numbers['time_ratio']:.2f})"
        )
    return result
