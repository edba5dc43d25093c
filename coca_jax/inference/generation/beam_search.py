"""Beam search over one shared cache.

Shape letters: B images, W captions or beams of an image, P prompt slots, S new tokens, V
vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from coca_jax.inference.generation.base import Finished, Loop, Plan
from coca_jax.inference.generation.sampling import write
from coca_jax.models.text_decoder import Decoder
from coca_jax.ops.decode_layouts import NEVER


def beam_step(
    spec: Decoder,
    plan: Plan,
    numbers: dict,
    loop: Loop,
    log_probs: jax.Array,
    allowed: jax.Array,
    slots: int,
) -> Loop:
    """Extends every image's beams by a token; finished images stay as they are.

    Of the 2 W best continuations, those that end (and are among the W best) become finished
    captions; the W best others go on. Images at their limit finish their beams as they stand.
    """
    width, limit = allowed.shape[1], numbers["limit"][:, None]
    norm = functools.partial(_norm, penalty=numbers["length_penalty"])
    score, parent, token, log_prob, history = _continuations(loop, log_probs, allowed, slots)
    length = jnp.broadcast_to(loop.step[:, None] + 1, token.shape)
    # Captions that end here, beside those that ended before.
    ends = (token == spec.eos_id) & (jnp.arange(token.shape[1]) < width) & (score > NEVER / 2)
    ranked = jnp.where(ends, norm(score, length), NEVER)
    finished = _best(loop.finished, Finished(ranked, log_prob, length, history), width)
    # Beams that go on.
    score, at = jax.lax.top_k(jnp.where(token == spec.eos_id, NEVER, score), width)
    parent, token, log_prob = _take(parent, at), _take(token, at), _take(log_prob, at)
    history, length = _take(history, at), _take(length, at)
    last = length >= limit
    alive = jnp.where(last & (score > NEVER / 2), norm(score, length), NEVER)
    finished = _best(finished, Finished(alive, log_prob, length, history), width)
    # Is any beam still able to displace the captions asked for?
    reach = norm(score, length)
    if not plan.early_stop:
        reach = jnp.maximum(norm(score, length + 1), norm(score, jnp.maximum(limit, length)))
    worst = finished.score[:, plan.num_captions - 1 : plan.num_captions]
    over = last.any(1, keepdims=True) | (worst >= reach.max(1, keepdims=True))
    done = loop.done

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(done.reshape(done.shape + (1,) * (new.ndim - 2)), old, new)

    past = jnp.take_along_axis(loop.past, parent[:, :, None, None], axis=1)
    return Loop(
        clock=loop.clock + 1,
        step=loop.step + 1,
        token=token,
        caches=loop.caches,
        past=past,
        visible=loop.visible,
        history=history,
        log_prob=log_prob,
        score=score,
        done=done | over,
        length=length,
        finished=jax.tree.map(keep, loop.finished, finished),
    )


def _continuations(
    loop: Loop, log_probs: jax.Array, allowed: jax.Array, slots: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The 2 W best of all beams' next tokens, best first, each [B, 2 W]: score, the beam that it
    continues, token, log probability, history [B, 2 W, P + S]."""
    batch, width, vocab = allowed.shape
    per_beam = min(2 * width, vocab)
    best, token = jax.lax.top_k(allowed, per_beam)
    total = (loop.score[..., None] + best).reshape(batch, -1)
    gain = jnp.take_along_axis(log_probs, token, axis=2)
    model = (loop.log_prob[..., None] + gain).reshape(batch, -1)
    score, at = jax.lax.top_k(total, min(2 * width, total.shape[1]))
    parent, token, log_prob = at // per_beam, _take(token.reshape(batch, -1), at), _take(model, at)
    history = _take(loop.history, parent)
    history = write(history, token, slots + loop.step)
    return score, parent, token, log_prob, history


def _norm(score: jax.Array, length: jax.Array, penalty: jax.Array) -> jax.Array:
    return score / length.astype(jnp.float32) ** penalty


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """Entries `at` [B, M] of the second axis of x [B, N, ...]."""
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


def _best(old: Finished, new: Finished, count: int) -> Finished:
    """The `count` best of both along the second axis, best first; earlier ones win ties."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    score, at = jax.lax.top_k(both.score, count)
    return jax.tree.map(lambda x: _take(x, at), both)._replace(score=score)
