"""Forced prefix."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp


@dataclasses.dataclass(frozen=True)
class ForcedPrefix(Processor):
    """Lets only one token come in each of the first places. Unlike those of a prompt, these tokens
    are new ones: they count in max_new_tokens and in the caption's log probability."""

    order: ClassVar[int] = 50

    forced_prefix_ids: tuple[Annotated[int, Interval(ge=0)], ...] = option(
        (), "Token ids that the new tokens begin with: [5, 7]."
    )

    @classmethod
    def check(cls, config: Any) -> None:
        if len(config.forced_prefix_ids) > config.max_new_tokens:
            raise ValueError(
                f"forced_prefix_ids: {len(config.forced_prefix_ids)} ids, more than "
                f"max_new_tokens={config.max_new_tokens}. Raise max_new_tokens."
            )

    def check_ids(self, count: int) -> None:
        if wrong := [one for one in self.forced_prefix_ids if one >= count]:
            raise ValueError(
                f"forced_prefix_ids: {wrong[0]} is not a token id. Give ids below {count}."
            )

    def arrays(self) -> ForcedPrefix:
        ids: Any = np.array(self.forced_prefix_ids, np.int32)
        return dataclasses.replace(self, forced_prefix_ids=ids)

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        ids = jnp.asarray(self.forced_prefix_ids)  # [L]
        wanted = ids[jnp.minimum(context.written, len(ids) - 1)][:, None, None]
        free = (context.written >= len(ids))[:, None, None]
        return jnp.where(free | (jnp.arange(scores.shape[-1]) == wanted), scores, NEVER)
