"""Top-k sampling."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, largest, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp


@dataclasses.dataclass(frozen=True)
class TopK(Processor):
    """Keeps the k most probable tokens."""

    order: ClassVar[int] = 110
    samples: ClassVar[bool] = True

    top_k: Annotated[int, Interval(ge=0, le=1 << 30)] = option(
        50, "Sample among this many most probable tokens; 0: all.", off=0
    )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        count = jnp.minimum(self.top_k, scores.shape[-1])
        return jnp.where(largest(scores, lambda keep: keep.sum(-1) >= count), scores, NEVER)
