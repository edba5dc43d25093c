"""Which token comes next: rules over the scores, the most probable one, or a sample.

Shape letters: B images, W captions or beams of an image, P prompt slots, S new tokens, V
vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.inference.generation.base import Loop, Plan
from coca_jax.models.text_decoder import Decoder
from coca_jax.ops.decode_layouts import NEVER


def rules(
    spec: Decoder,
    plan: Plan,
    numbers: dict,
    log_probs: jax.Array,
    history: jax.Array,
    slots: int,
    step: jax.Array,
) -> jax.Array:
    """log_probs [B, W, V] after repetition penalty, n-gram rule and minimum length.

    history: int32 [B, W, T], the prompt in its first `slots`, then step [B] tokens.
    """
    scores = log_probs
    batch, row = jnp.indices(history.shape[:2], sparse=True)
    batch, row = batch[..., None], row[..., None]
    if plan.penalise:
        seen = jnp.where(history < 0, spec.vocab_size, history)  # out of range: dropped
        old = jnp.take_along_axis(scores, jnp.maximum(history, 0), axis=2)
        scores = scores.at[batch, row, seen].set(old * numbers["repetition_penalty"], mode="drop")
    if plan.ngram:
        n, total = plan.ngram, history.shape[2]
        if n <= total:
            at = (slots + step)[:, None, None] - (n - 1) + jnp.arange(n - 1)
            tail = jnp.take_along_axis(history, jnp.clip(at, 0, total - 1), axis=2)
            count = total - n + 1
            same = history[..., n - 1 :] >= 0
            for i in range(n - 1):
                window = history[..., i : i + count]
                same &= (window == tail[..., i : i + 1]) & (window >= 0)
            banned = jnp.where(same, history[..., n - 1 :], spec.vocab_size)
            scores = scores.at[batch, row, banned].set(NEVER, mode="drop")
    ids = jnp.arange(spec.vocab_size)
    too_early = (step < numbers["min_tokens"])[:, None, None]
    allowed = (ids < spec.num_ids) & ~((ids == spec.eos_id) & too_early)
    return jnp.where(allowed, scores, NEVER)


def single_step(
    spec: Decoder,
    plan: Plan,
    numbers: dict,
    loop: Loop,
    log_probs: jax.Array,
    allowed: jax.Array,
    slots: int,
) -> Loop:
    """Chooses one token per row: the most probable, or a sample. Finished rows stay as they are."""
    if plan.sample:
        token = _sample(plan, numbers, allowed, loop.step)
    else:
        token = _argmax(allowed)
    gain = jnp.take_along_axis(log_probs, token[..., None], axis=2)[..., 0]
    going = ~loop.done
    added = jnp.where(going, token, -1)
    length = loop.length + going
    return loop._replace(
        clock=loop.clock + 1,
        step=loop.step + 1,
        token=token,
        history=write(loop.history, added, slots + loop.step),
        log_prob=loop.log_prob + jnp.where(going, gain, 0.0),
        length=length,
        done=loop.done | (token == spec.eos_id) | (length >= numbers["limit"][:, None]),
    )


def write(history: jax.Array, token: jax.Array, slot: jax.Array) -> jax.Array:
    """history [B, N, T] with token [B, N] at slot [B]; nothing beyond the last slot."""
    here = jnp.arange(history.shape[2]) == slot[:, None, None]
    return jnp.where(here, token[..., None], history)


def _argmax(x: jax.Array) -> jax.Array:
    """First index of the largest value of the last axis: two plain reductions, which the CPU
    backend vectorises; argmax it does not."""
    size = x.shape[-1]
    index = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size)
    return index.min(-1)


def _largest(x: jax.Array, enough: Any) -> jax.Array:
    """The largest threshold t [...] of non-negative floats x [..., V] with enough(x >= t) true.

    `enough` must turn from false to true only once as t falls. Halves the interval of bit patterns,
    which order like the floats they stand for: exact, in 31 passes, without sorting.
    """
    low = jnp.zeros(x.shape[:-1], jnp.int32)
    high = jax.lax.bitcast_convert_type(x.max(-1), jnp.int32) + 1

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        ok = enough(x >= threshold[..., None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _sample(plan: Plan, numbers: dict, allowed: jax.Array, step: jax.Array) -> jax.Array:
    """One token per row of allowed [B, W, V] by its own random number: int32 [B, W]."""
    # The largest stays 0 at any temperature; divided first, all would become minus infinity.
    below = allowed - allowed.max(-1, keepdims=True)
    probs = jax.nn.softmax(below / numbers["temperature"], axis=-1)
    if plan.filter:
        kth = _largest(probs, lambda keep: keep.sum(-1) >= numbers["top_k"])
        probs = jnp.where(probs >= kth[..., None], probs, 0.0)
        # A little less than p: the sum of all kept probabilities may round below it.
        mass = numbers["top_p"] * (1 - 1e-6) * probs.sum(-1)
        least = _largest(probs, lambda keep: jnp.where(keep, probs, 0.0).sum(-1) >= mass)
        probs = jnp.where(probs >= least[..., None], probs, 0.0)
    # The most probable token stays whatever was left out: its probability is the largest.
    probs = jnp.where(probs >= numbers["min_p"] * probs.max(-1, keepdims=True), probs, 0.0)
    batch, width, size = probs.shape

    def number(row: jax.Array, caption: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.key(numbers["seed"])
        for part in (row, caption, step):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key, dtype=jnp.float32)  # whatever jax_enable_x64 says

    rows = jnp.broadcast_to(numbers["rows"][:, None], (batch, width))
    captions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    steps = jnp.broadcast_to(jnp.reshape(step, (-1, 1)), (batch, width))
    uniform = jax.vmap(jax.vmap(number))(rows, captions, steps)
    # Inverse of the cumulative distribution, in two levels: first the block, then the token in it.
    block = 256
    probs = jnp.pad(probs, ((0, 0), (0, 0), (0, -size % block)))
    blocks = probs.reshape(batch, width, -1, block)
    sums = blocks.sum(-1)
    target = uniform * sums.sum(-1)
    which, rest = _pick(sums, target)
    inner = jnp.take_along_axis(blocks, which[..., None, None], axis=2)[:, :, 0]
    return which * block + _pick(inner, rest)[0]


def _pick(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index where the running sum of weights [..., N] passes target [...], and what is left
    of target there; the heaviest index where rounding keeps the sum below the target."""
    total = jnp.cumsum(weights, axis=-1)
    passed = total > target[..., None]
    index = jnp.where(passed.any(-1), jnp.argmax(passed, -1), jnp.argmax(weights, -1))
    before = jnp.take_along_axis(total - weights, index[..., None], axis=-1)[..., 0]
    return index.astype(jnp.int32), jnp.maximum(target - before, 0.0)
