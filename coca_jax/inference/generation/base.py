"""What the parts of generation share.

Shape letters: B images, W captions or beams of an image, P prompt slots, S new tokens, V
vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from coca_jax.ops.decode_layouts import Cache


class Plan(NamedTuple):
    """What a decode program is specialised to, beside shapes; the other settings are arguments."""

    width: int
    num_captions: int
    steps: int
    beams: bool
    sample: bool
    filter: bool
    penalise: bool
    ngram: int
    early_stop: bool


class Fixed(NamedTuple):
    """What every step of the loop reads and none writes; numbers: of the settings, by name."""

    image: list[Cache] | jax.Array  # decoding.image_caches
    prompt_len: jax.Array  # int32 [B]
    prompt_mask: jax.Array  # bool [B, W, P - 1]
    prompt_visible: jax.Array | None  # bool [B, P - 1]; None: all
    numbers: dict[str, jax.Array]


class Loop(NamedTuple):
    """What a step of the loop reads and writes. History holds prompts and new tokens by slot, -1
    where there is none; past says which of the cache slots of the steps are a caption's own,
    visible which of them the unimodal half sees (None: all). The clock counts the steps of the
    loop, which write one cache slot after the other, round and round; step counts those that a row
    has had: less, where it took another's place (`continuous`)."""

    clock: jax.Array  # int32
    step: jax.Array  # int32 [B]
    token: jax.Array  # [B, W], to run next
    caches: list[Cache]
    past: jax.Array  # bool [B, W, S, W]
    visible: jax.Array | None  # bool [B, S, W]
    history: jax.Array  # int32 [B, W, P + S]
    log_prob: jax.Array  # [B, W], the model's
    score: jax.Array  # [B, W], after the rules; beams only
    done: jax.Array  # bool [B, W]; beams: all of an image's or none
    length: jax.Array  # int32 [B, W]
    finished: Finished | None


class Finished(NamedTuple):
    """Finished captions of a beam search, best first; score NEVER where there is none."""

    score: jax.Array  # [B, W], over tokens^length_penalty
    log_prob: jax.Array
    length: jax.Array
    history: jax.Array  # [B, W, P + S]
