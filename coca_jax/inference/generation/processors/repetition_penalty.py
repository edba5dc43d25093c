"""Repetition penalty (Keskar et al. 2019)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(Processor):
    """Multiplies negative scores of tokens already there, prompt included, and divides positive
    ones. Scores are log probabilities here, in greedy decoding too."""

    order: ClassVar[int] = 10

    repetition_penalty: Annotated[float, Interval(gt=0)] = option(
        1.0, "Above 1: discourage tokens that are already there.", most=10
    )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        batch, row = jnp.indices(context.tokens.shape[:2], sparse=True)
        old = jnp.take_along_axis(scores, jnp.maximum(context.tokens, 0), axis=2)  # [B, W, T]
        new = jnp.where(old < 0, old * self.repetition_penalty, old / self.repetition_penalty)
        new = jnp.where(old <= NEVER, NEVER, new)  # a penalty below 1 would permit it
        seen = jnp.where(context.tokens < 0, scores.shape[-1], context.tokens)  # dropped
        return scores.at[batch[..., None], row[..., None], seen].set(new, mode="drop")
