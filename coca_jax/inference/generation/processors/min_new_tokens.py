"""Minimum length."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp


@dataclasses.dataclass(frozen=True)
class MinNewTokens(Processor):
    """Bans the end symbol before a number of new tokens."""

    order: ClassVar[int] = 40

    min_new_tokens: Annotated[int, Interval(ge=0)] = option(
        0, "New tokens before the caption may end.", most=256
    )

    @classmethod
    def check(cls, config: Any) -> None:
        if config.min_new_tokens > config.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={config.min_new_tokens}: more than "
                f"max_new_tokens={config.max_new_tokens}. Raise max_new_tokens."
            )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        early = (context.written < self.min_new_tokens)[:, None, None]
        ends = jnp.arange(scores.shape[-1]) == context.eos_id
        return jnp.where(early & ends, NEVER, scores)
