"""The programs that write captions: what they start from, a step, and what comes out.

Shape letters: B images, W captions or beams of an image, P prompt slots, S new tokens, V
vocabulary.

Layout of one decode. Prompts stand right-aligned in P slots, so that in every row the last prompt
token is in slot P - 1 and new tokens follow without a gap. `text_decoder.prefill` runs all but the
last prompt token; every step of the loop then runs one token per row, the last prompt token first.
The W captions of an image share its image keys, its prompt keys and one cache: step s writes its W
keys side by side, and a mask says which of them are a caption's own past. Beam search therefore
reorders a small mask and never the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.inference.generation import processors, strategies
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.inference.generation.processors.base import NEVER, Context, Options, Processor
from coca_jax.inference.generation.strategies.base import Fixed, Loop, Strategy
from coca_jax.models import text_decoder
from coca_jax.models.text_decoder import Decoder


def _register(part: type[Options]) -> None:
    """Registers a processor or strategy as a pytree; static options belong to its structure."""
    fields = dataclasses.fields(part)
    static = [one.name for one in fields if one.metadata["static"]]
    values = [one.name for one in fields if not one.metadata["static"]]

    def flatten(one: Any) -> tuple[list[Any], tuple[Any, ...]]:
        # With the class: jaxlib 0.10 takes nodes of different dataclasses for equal, so that jit
        # could run the program of another processor.
        return [getattr(one, n) for n in values], (part, *(getattr(one, n) for n in static))

    def unflatten(structure: tuple[Any, ...], leaves: Any) -> Options:
        return part(**dict(zip(static, structure[1:])), **dict(zip(values, leaves)))

    jax.tree_util.register_pytree_node(part, flatten, unflatten)


for _part in (*strategies.ALL, *processors.ALL):
    _register(_part)


class Captions(NamedTuple):
    """tokens int32 [B, n, S], new tokens alone, end symbols after the end; length int32 [B, n],
    tokens with the end symbol if it came; log_prob float32 [B, n], the model's log probability of
    these tokens, in nats, whatever rules chose them."""

    tokens: jax.Array
    length: jax.Array
    log_prob: jax.Array


class Method(NamedTuple):
    """How tokens are chosen. A program is compiled for the classes and their static options."""

    strategy: Strategy
    processors: tuple[Processor, ...]


class Images(NamedTuple):
    """What the images of a batch differ in besides their tokens and prompts."""

    limit: np.ndarray  # int32 [B], new tokens at most
    rows: np.ndarray  # uint32 [B], what makes an image's random numbers its own
    active: np.ndarray  # bool [B], False for rows that pad the batch


def generate(
    spec: Decoder,
    weights: dict,
    image_tokens: jax.Array,
    prompt: np.ndarray,
    prompt_len: np.ndarray,
    config: GenerationConfig,
    *,
    rows: np.ndarray | None = None,
    active: np.ndarray | None = None,
) -> Captions:
    """Captions for image tokens [B, Q, D].

    prompt: int32 [B, P], each row's prompt right-aligned, begin symbol first; prompt_len: int32
    [B], from 1 to below max_len. rows: int32 [B], what makes an image's random numbers its own
    (default: its place); active: bool [B], False for rows that pad the batch. One program is
    compiled per (B, P, steps rounded up to 16, strategy, processors).
    """
    steps, method, images = prepare(spec, config, prompt_len, rows, active)
    return decode(spec, steps, method, weights, image_tokens, prompt, prompt_len, images)


def stream(
    spec: Decoder,
    weights: dict,
    image_tokens: jax.Array,
    prompt: np.ndarray,
    prompt_len: np.ndarray,
    config: GenerationConfig,
    *,
    rows: np.ndarray | None = None,
    active: np.ndarray | None = None,
) -> Iterator[Captions]:
    """The captions of `generate`, arguments alike, after each of their tokens: NumPy arrays as far
    as they are written, so S grows by one. A program runs a step, in place of all of them; what
    comes out is the same. Raises ValueError for a strategy that takes back what it wrote.
    """
    if not config.streams:
        raise ValueError(f"num_beams={config.num_beams}: beams cannot be streamed. Set 1.")
    steps, method, images = prepare(spec, config, prompt_len, rows, active)
    slots = prompt.shape[1]
    fixed, loop = _begin(
        spec, steps, method.strategy, weights, image_tokens, prompt, prompt_len, images
    )
    going, written = True, 0
    while going:
        loop = _advance(spec, slots, method, weights, fixed, loop)
        written += 1
        history, length, log_prob, done = jax.device_get(
            (loop.history, loop.length, loop.log_prob, loop.done)
        )
        yield Captions(history[:, :, slots : slots + written], length, log_prob)
        going = not done.all()


def prepare(
    spec: Decoder,
    config: GenerationConfig,
    prompt_len: np.ndarray,
    rows: np.ndarray | None,
    active: np.ndarray | None,
) -> tuple[int, Method, Images]:
    """S and the arguments of `decode` that a config gives; arguments of `generate`."""
    batch = len(prompt_len)
    steps = min(config.max_new_tokens, spec.max_len - int(prompt_len.min()))
    method = Method(config.strategy().arrays(), tuple(one.arrays() for one in config.processors()))
    images = Images(
        np.minimum(steps, spec.max_len - prompt_len).astype(np.int32),
        np.asarray(np.arange(batch) if rows is None else rows, np.uint32),
        np.ones(batch, bool) if active is None else active,
    )
    return min(-(-steps // 16) * 16, spec.max_len - 1), method, images


@functools.partial(jax.jit, static_argnames=("spec", "steps"))
def decode(
    spec: Decoder,
    steps: int,
    method: Method,
    weights: dict,
    image_tokens: jax.Array,
    prompt: jax.Array,
    prompt_len: jax.Array,
    images: Images,
) -> Captions:
    """The program of `generate`; steps: S."""
    slots = prompt.shape[1]
    fixed, start = begin(
        spec, steps, method.strategy, weights, image_tokens, prompt, prompt_len, images
    )

    def unfinished(loop: Loop) -> jax.Array:
        return ~loop.done.all()

    step = functools.partial(advance, spec, slots, method, weights, fixed)
    return captions(spec, slots, method.strategy, jax.lax.while_loop(unfinished, step, start))


def captions(spec: Decoder, slots: int, strategy: Strategy, loop: Loop) -> Captions:
    """The captions of rows that are done."""
    history, length, log_prob = strategy.finish(loop)
    tokens = history[:, :, slots:]
    inside = jnp.arange(tokens.shape[2]) < length[..., None]
    return Captions(jnp.where(inside, tokens, spec.eos_id), length, log_prob)


def begin(
    spec: Decoder,
    steps: int,
    strategy: Strategy,
    weights: dict,
    image_tokens: jax.Array,
    prompt: jax.Array,
    prompt_len: jax.Array,
    images: Images,
    *,
    prompts_alone: bool = False,
) -> tuple[Fixed, Loop]:
    """The image's keys and the prompts' in their caches, and no token written. prompts_alone: the
    caches have no room for tokens: they become a part of others."""
    batch, slots = prompt.shape
    width = strategy.width
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
    each = jnp.broadcast_to
    start = Loop(
        clock=jnp.int32(0),
        step=jnp.zeros(batch, jnp.int32),
        token=each(prompt[:, -1:], (batch, width)),
        caches=caches,
        past=jnp.zeros((batch, width, steps, width), bool),
        visible=jnp.ones((batch, steps, width), bool) if hides else None,
        history=each(history[:, None], (batch, width, slots + steps)),
        log_prob=jnp.zeros((batch, width), jnp.float32),
        done=each(~images.active[:, None], (batch, width)),
        length=jnp.zeros((batch, width), jnp.int32),
        own=None,
    )
    fixed = Fixed(image, prompt_len, prompt_mask, prompt_visible, *map(jnp.asarray, images[:2]))
    return fixed, strategy.start(start)


def advance(
    spec: Decoder, slots: int, method: Method, weights: dict, fixed: Fixed, loop: Loop
) -> Loop:
    """Runs the token that each caption ends with and chooses the next."""
    batch, width, steps, _ = loop.past.shape
    now = loop.clock % steps
    past = loop.past.at[:, :, now].set(jnp.eye(width, dtype=bool))
    mask = jnp.concatenate([fixed.prompt_mask, past.reshape(batch, width, -1)], axis=2)
    visible = visible_slots = None
    if spec.hidden_id is not None:
        # A begin symbol alone has nothing before it: there the index is clamped to itself.
        place = jnp.maximum(slots - 1 + loop.step - int(spec.hides_next), 0)
        place = jnp.minimum(place, loop.history.shape[2] - 1)[:, None, None]
        decides = jnp.take_along_axis(loop.history, place, axis=2)[..., 0]
        visible = loop.visible.at[:, now].set(decides != spec.hidden_id)
        visible_slots = jnp.concatenate([fixed.prompt_visible, visible.reshape(batch, -1)], axis=1)
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
        visible_slots,
    )
    log_probs = text_decoder.log_probs_of(weights, states)  # [B, W, V]
    # The model may have more rows than the vocabulary has ids.
    scores = jnp.where(jnp.arange(spec.vocab_size) < spec.num_ids, log_probs, NEVER)
    context = Context(loop.history, loop.step, slots, spec.eos_id)
    scores = processed(method.processors, scores, context)
    loop = loop._replace(caches=caches, past=past, visible=visible)
    return method.strategy.step(context, fixed, loop, log_probs, scores)


def processed(processors: tuple[Processor, ...], scores: jax.Array, context: Context) -> jax.Array:
    """scores [B, W, V] after all processors."""
    for processor in processors:
        scores = processor(scores, context)
    return scores


_begin = functools.partial(jax.jit, static_argnames=("spec", "steps"))(begin)
_advance = functools.partial(jax.jit, static_argnames=("spec", "slots"), donate_argnames=("loop",))(
    advance
)
