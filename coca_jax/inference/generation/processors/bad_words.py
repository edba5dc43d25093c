"""Bad words."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval, MinLen

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp

Id = Annotated[int, Interval(ge=0)]


@dataclasses.dataclass(frozen=True)
class BadWords(Processor):
    """Bans the last token of a word where its other tokens have just come."""

    order: ClassVar[int] = 30

    bad_words_ids: tuple[Annotated[tuple[Id, ...], MinLen(1)], ...] = option(
        (), "Token ids of words that must not come: [[5], [7, 8]]."
    )

    def check_ids(self, count: int) -> None:
        if wrong := [one for word in self.bad_words_ids for one in word if one >= count]:
            raise ValueError(
                f"bad_words_ids: {wrong[0]} is not a token id. Give ids below {count}."
            )

    def arrays(self) -> BadWords:
        size = max(map(len, self.bad_words_ids))
        rows = [(-1,) * (size - len(word)) + word for word in self.bad_words_ids]
        ids: Any = np.array(rows, np.int32)
        return dataclasses.replace(self, bad_words_ids=ids)

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        words = jnp.asarray(self.bad_words_ids)  # [N, L], -1 before shorter ones
        before = context.last(words.shape[1] - 1)[:, :, None]  # [B, W, 1, L - 1]
        same = ((before == words[:, :-1]) | (words[:, :-1] < 0)).all(-1)  # [B, W, N]
        banned = jnp.where(same, words[:, -1], scores.shape[-1])  # dropped
        batch, row = jnp.indices(scores.shape[:2], sparse=True)
        return scores.at[batch[..., None], row[..., None], banned].set(NEVER, mode="drop")
