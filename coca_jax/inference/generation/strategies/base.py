"""What a decoding strategy declares and sees; see also processors/base.py.

Shape letters: B images, W captions or beams of an image, P prompt slots, S new tokens, T = P + S,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from coca_jax.inference.generation.processors.base import Context, Options, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp

if TYPE_CHECKING:
    from coca_jax.ops.decode_layouts import Cache


@dataclasses.dataclass(frozen=True)
class Strategy(Options):
    """Chooses tokens by their scores. Each subclass is a file of `strategies`."""

    title: ClassVar[str]  # as messages call it
    remedy: ClassVar[str]  # how to choose it
    priority: ClassVar[int] = 0  # the largest wins, of strategies that a config asks for
    streams: ClassVar[bool]  # whether a token that was written stays

    num_return_sequences: int = option(1, "Captions per image.", most=8, static=True)

    @classmethod
    def is_asked(cls, config: Any) -> bool:
        """Whether a GenerationConfig asks for it."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """W, captions in flight per image."""
        return self.num_return_sequences

    def start(self, loop: Loop) -> Loop:
        """The loop with the strategy's own state, before the first token."""
        return loop

    def step(
        self,
        context: Context,
        fixed: Fixed,
        loop: Loop,
        log_probs: jax.Array,
        scores: jax.Array,
    ) -> Loop:
        """Extends every caption that is not done by a token.

        log_probs: float32 [B, W, V], the model's; scores: after all processors.
        """
        raise NotImplementedError

    def finish(self, loop: Loop) -> tuple[jax.Array, jax.Array, jax.Array]:
        """history [B, n, T], length [B, n] and log_prob [B, n] of the captions to return."""
        return loop.history, loop.length, loop.log_prob


class Fixed(NamedTuple):
    """What every step of the loop reads and none writes."""

    image: list[Cache] | jax.Array  # text_decoder.image_caches
    prompt_len: jax.Array  # int32 [B]
    prompt_mask: jax.Array  # bool [B, W, P - 1]
    prompt_visible: jax.Array | None  # bool [B, P - 1]; None: all
    limit: jax.Array  # int32 [B], new tokens at most
    rows: jax.Array  # uint32 [B], what makes an image's random numbers its own


class Loop(NamedTuple):
    """What a step of the loop reads and writes.

    history holds prompts and new tokens by slot, -1 where there is none. past says which of the
    cache slots of the steps are a caption's own, visible which of them the unimodal half sees (None:
    all). clock counts the steps of the loop, which write one cache slot after the other, round and
    round; step counts those of a row, fewer where it took another's place (continuous.py).
    """

    clock: jax.Array  # int32
    step: jax.Array  # int32 [B]
    token: jax.Array  # [B, W], to run next
    caches: list[Cache]
    past: jax.Array  # bool [B, W, S, W]
    visible: jax.Array | None  # bool [B, S, W]
    history: jax.Array  # int32 [B, W, T]
    log_prob: jax.Array  # [B, W], the model's
    done: jax.Array  # bool [B, W]; a row of images stays in the loop until all are
    length: jax.Array  # int32 [B, W]
    own: Any  # the strategy's state, arrays [B, ...]


def write(history: jax.Array, token: jax.Array, slot: jax.Array) -> jax.Array:
    """history [B, N, T] with token [B, N] at slot [B]; unchanged where that is beyond the last."""
    here = jnp.arange(history.shape[2]) == slot[:, None, None]
    return jnp.where(here, token[..., None], history)
