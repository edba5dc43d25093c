"""The program that writes captions: what it starts from, a step, and what comes out.

Shape letters: B images, W captions or beams of an image, P prompt slots, S new tokens, V
vocabulary.

Layout of one decode. Prompts stand right-aligned in P slots, so that in every row the last prompt
token is in slot P - 1 and new tokens follow without a gap. `decoding.prefill` runs all but the last
prompt token; every step of the loop then runs one token per row, the last prompt token first. The
W captions of an image share its image keys, its prompt keys and one cache: step s writes its W
keys side by side, and a mask says which of them are a caption's own past. Beam search therefore
reorders a small mask and never the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.inference.generation.base import Finished, Fixed, Loop, Plan
from coca_jax.inference.generation.beam_search import beam_step
from coca_jax.inference.generation.config import Settings
from coca_jax.inference.generation.sampling import rules, single_step
from coca_jax.models import text_decoder
from coca_jax.models.text_decoder import Decoder
from coca_jax.ops.decode_layouts import NEVER


class Captions(NamedTuple):
    """tokens int32 [B, n, S], new tokens alone, end symbols after the end; length int32 [B, n],
    tokens with the end symbol if it came; log_prob float32 [B, n], the model's log probability of
    these tokens, in nats, whatever rules chose them."""

    tokens: jax.Array
    length: jax.Array
    log_prob: jax.Array


def generate(
    spec: Decoder,
    weights: dict,
    image_tokens: jax.Array,
    prompt: np.ndarray,
    prompt_len: np.ndarray,
    settings: Settings,
    *,
    rows: np.ndarray | None = None,
    active: np.ndarray | None = None,
) -> Captions:
    """Captions for image tokens [B, Q, D].

    prompt: int32 [B, P], each row's prompt right-aligned, begin symbol first; prompt_len: int32
    [B], at least 1. rows: int32 [B], what makes an image's random numbers its own (default: its
    place); active: bool [B], False for rows that pad the batch. One program is compiled per (B, P,
    steps rounded up to 16, kind of settings). Raises ValueError when a prompt leaves no
    room, or none for min_tokens.
    """
    plan, numbers = planned(spec, prompt_len, settings, rows, active)
    return decode(spec, plan, weights, image_tokens, prompt, prompt_len, numbers)


def stream(
    spec: Decoder,
    weights: dict,
    image_tokens: jax.Array,
    prompt: np.ndarray,
    prompt_len: np.ndarray,
    settings: Settings,
    *,
    rows: np.ndarray | None = None,
    active: np.ndarray | None = None,
) -> Iterator[Captions]:
    """The captions of `generate`, arguments alike, after each of their tokens: NumPy arrays as far
    as they are written, so S grows by one. A program runs a step, in place of all of them; what
    comes out is the same. Raises ValueError besides for beams, which take back what they wrote.
    """
    plan, numbers = planned(spec, prompt_len, settings, rows, active)
    if plan.beams:
        raise ValueError(f"num_beams={settings.num_beams}: beams cannot be streamed; set 1")
    slots = prompt.shape[1]
    fixed, loop = _first(spec, plan, weights, image_tokens, prompt, prompt_len, numbers)
    going, written = True, 0
    while going:
        loop = _next(spec, plan, weights, fixed, slots, loop)
        written += 1
        history, length, log_prob, done = jax.device_get(
            (loop.history, loop.length, loop.log_prob, loop.done)
        )
        yield Captions(history[:, :, slots : slots + written], length, log_prob)
        going = not done.all()


_COLDEST = np.finfo(np.float32).tiny  # a temperature that float32 would take for 0, and divide by


def planned(
    spec: Decoder,
    prompt_len: np.ndarray,
    settings: Settings,
    rows: np.ndarray | None,
    active: np.ndarray | None,
) -> tuple[Plan, dict]:
    """What `decode` is specialised to, and the numbers that it takes; arguments of `generate`."""
    batch = len(prompt_len)
    longest = int(prompt_len.max())
    if longest >= spec.max_len:
        raise ValueError(
            f"a prompt has {longest} tokens and the model writes {spec.max_len} in all "
            "(model.text.max_len); shorten it"
        )
    if settings.min_tokens > spec.max_len - longest:
        raise ValueError(
            f"min_tokens={settings.min_tokens}: behind a prompt of {longest - 1} tokens the model "
            f"writes {spec.max_len - longest} (model.text.max_len={spec.max_len}); lower it"
        )
    steps = min(settings.max_tokens, spec.max_len - int(prompt_len.min()))
    plan = Plan(
        width=settings.num_beams if settings.num_beams > 1 else settings.num_captions,
        num_captions=settings.num_captions,
        steps=min(-(-steps // 16) * 16, spec.max_len - 1),
        beams=settings.num_beams > 1,
        sample=settings.temperature > 0,
        filter=settings.top_k > 0 or settings.top_p < 1,
        penalise=settings.repetition_penalty != 1,
        ngram=settings.no_repeat_ngram,
        early_stop=settings.early_stop,
    )
    rows = np.arange(batch) if rows is None else rows
    active = np.ones(batch, bool) if active is None else active
    numbers = dict(
        limit=np.minimum(steps, spec.max_len - prompt_len).astype(np.int32),
        min_tokens=np.int32(settings.min_tokens),
        temperature=np.maximum(np.float32(settings.temperature or 1.0), _COLDEST),
        top_k=np.int32(settings.top_k or spec.vocab_size),
        top_p=np.float32(settings.top_p),
        min_p=np.float32(settings.min_p),
        length_penalty=np.float32(settings.length_penalty),
        repetition_penalty=np.float32(settings.repetition_penalty),
        seed=np.uint32(settings.seed),
        rows=rows.astype(np.uint32),
        active=active,
    )
    return plan, numbers


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def decode(
    spec: Decoder,
    plan: Plan,
    weights: dict,
    image_tokens: jax.Array,
    prompt: jax.Array,
    prompt_len: jax.Array,
    numbers: dict,
) -> Captions:
    """The program of `generate`; numbers: what of the settings is no part of the plan."""
    slots = prompt.shape[1]
    fixed, start = begin(spec, plan, weights, image_tokens, prompt, prompt_len, numbers)

    def unfinished(loop: Loop) -> jax.Array:
        return ~loop.done.all()

    step = functools.partial(step_of, spec, plan, weights, fixed, slots)
    return captions_of(spec, plan, slots, jax.lax.while_loop(unfinished, step, start))


def captions_of(spec: Decoder, plan: Plan, slots: int, loop: Loop) -> Captions:
    """The captions of rows that are done."""
    if plan.beams:
        assert loop.finished is not None
        best = loop.finished
        tokens, length, log_prob = best.history[:, :, slots:], best.length, best.log_prob
    else:
        tokens, length, log_prob = loop.history[:, :, slots:], loop.length, loop.log_prob
    keep = plan.num_captions
    inside = jnp.arange(plan.steps)[None, None] < length[..., None]
    tokens = jnp.where(inside, tokens, spec.eos_id)
    return Captions(tokens[:, :keep], length[:, :keep], log_prob[:, :keep])


def begin(
    spec: Decoder,
    plan: Plan,
    weights: dict,
    image_tokens: jax.Array,
    prompt: jax.Array,
    prompt_len: jax.Array,
    numbers: dict,
    *,
    prompts_alone: bool = False,
) -> tuple[Fixed, Loop]:
    """The image's keys and the prompts' in their caches, and no token written. prompts_alone: the
    caches have no room for tokens: they become a part of others."""
    batch, slots = prompt.shape
    width, steps = plan.width, plan.steps
    image = text_decoder.image_caches(spec, weights, image_tokens, width)
    room = 0 if prompts_alone else steps * width
    caches = text_decoder.empty_caches(spec, weights, batch, slots - 1 + room)
    first = slots - prompt_len
    prompt_mask = jnp.arange(slots - 1)[None] >= first[:, None]
    prompt_mask = jnp.broadcast_to(prompt_mask[:, None], (batch, width, slots - 1))
    known = jnp.where(jnp.arange(slots)[None] >= first[:, None], prompt, -1)
    hides, back = spec.hidden_id is not None, int(spec.hides_next)
    prompt_visible = None
    if hides:
        before = jnp.pad(known, ((0, 0), (back, 0)), constant_values=-1)
        prompt_visible = before[:, : slots - 1] != spec.hidden_id
    caches = text_decoder.prefill(spec, weights, prompt, prompt_len, caches, image, prompt_visible)
    history = jnp.concatenate([known, jnp.full((batch, steps), -1, jnp.int32)], axis=1)
    zeros = jnp.zeros((batch, width), jnp.float32)
    each = jnp.broadcast_to
    history = each(history[:, None], (batch, width, slots + steps))
    start = Loop(
        clock=jnp.int32(0),
        step=jnp.zeros(batch, jnp.int32),
        token=each(prompt[:, -1:], (batch, width)),
        caches=caches,
        past=jnp.zeros((batch, width, steps, width), bool),
        visible=jnp.ones((batch, steps, width), bool) if hides else None,
        history=history,
        log_prob=zeros,
        # All beams start alike: only the first may go on, or they would stay alike.
        score=zeros.at[:, 1:].set(NEVER) if plan.beams else zeros,
        done=each(~numbers["active"][:, None], (batch, width)),
        length=jnp.zeros((batch, width), jnp.int32),
        finished=Finished(zeros + NEVER, zeros, jnp.zeros((batch, width), jnp.int32), history)
        if plan.beams
        else None,
    )
    return Fixed(image, prompt_len, prompt_mask, prompt_visible, numbers), start


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def _first(
    spec: Decoder,
    plan: Plan,
    weights: dict,
    image_tokens: jax.Array,
    prompt: jax.Array,
    prompt_len: jax.Array,
    numbers: dict,
) -> tuple[Fixed, Loop]:
    """`begin` as a program of its own."""
    return begin(spec, plan, weights, image_tokens, prompt, prompt_len, numbers)


@functools.partial(jax.jit, static_argnames=("spec", "plan", "slots"), donate_argnames=("loop",))
def _next(spec: Decoder, plan: Plan, weights: dict, fixed: Fixed, slots: int, loop: Loop) -> Loop:
    """`step_of` as a program of its own."""
    return step_of(spec, plan, weights, fixed, slots, loop)


def step_of(spec: Decoder, plan: Plan, weights: dict, fixed: Fixed, slots: int, loop: Loop) -> Loop:
    """Runs the token that each caption ends with and chooses the next."""
    batch, width = loop.token.shape
    now = loop.clock % plan.steps
    past = loop.past.at[:, :, now].set(jnp.eye(width, dtype=bool))
    mask = jnp.concatenate([fixed.prompt_mask, past.reshape(batch, width, -1)], axis=2)
    visible = whole = None
    if spec.hidden_id is not None:
        # A begin symbol alone has nothing before it: there the index is clamped to itself.
        place = jnp.maximum(slots - 1 + loop.step - int(spec.hides_next), 0)
        place = jnp.minimum(place, loop.history.shape[2] - 1)[:, None, None]
        decides = jnp.take_along_axis(loop.history, place, axis=2)[..., 0]
        visible = loop.visible.at[:, now].set(decides != spec.hidden_id)
        whole = jnp.concatenate([fixed.prompt_visible, visible.reshape(batch, -1)], axis=1)
    positions = jnp.minimum(fixed.prompt_len - 1 + loop.step, spec.max_len - 1)
    states, caches = text_decoder.run_tokens(
        spec,
        weights,
        loop.token,
        jnp.broadcast_to(positions[:, None], (batch, width)),
        mask,
        slots - 1 + now * width,
        loop.caches,
        fixed.image,
        whole,
    )
    log_probs = text_decoder.log_probs_of(weights, states)
    allowed = rules(spec, plan, fixed.numbers, log_probs, loop.history, slots, loop.step)
    loop = loop._replace(caches=caches, past=past, visible=visible)
    choose = beam_step if plan.beams else single_step
    return choose(spec, plan, fixed.numbers, loop, log_probs, allowed, slots)
