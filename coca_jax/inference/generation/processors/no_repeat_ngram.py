"""No n-gram twice (Paulus et al. 2018)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp


@dataclasses.dataclass(frozen=True)
class NoRepeatNgram(Processor):
    """Bans tokens that would complete an n-gram that is already there, prompt included."""

    order: ClassVar[int] = 20

    no_repeat_ngram_size: Annotated[int, Interval(ge=0)] = option(
        0, "N-grams of this size come at most once; 0: no rule.", most=8, static=True
    )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        size, tokens = self.no_repeat_ngram_size, context.tokens
        count = tokens.shape[2] - size + 1  # n-grams that there is room for
        if count < 1:
            return scores
        begin = context.last(size - 1)
        same = tokens[..., size - 1 :] >= 0
        for i in range(size - 1):
            window = tokens[..., i : i + count]
            same &= (window == begin[..., i : i + 1]) & (window >= 0)
        banned = jnp.where(same, tokens[..., size - 1 :], scores.shape[-1])  # dropped
        batch, row = jnp.indices(tokens.shape[:2], sparse=True)
        return scores.at[batch[..., None], row[..., None], banned].set(NEVER, mode="drop")
