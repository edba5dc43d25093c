"""Min-p sampling (Nguyen et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp


@dataclasses.dataclass(frozen=True)
class MinP(Processor):
    """Keeps tokens at least this share as probable as the most probable one."""

    order: ClassVar[int] = 130
    samples: ClassVar[bool] = True

    min_p: Annotated[float, Interval(ge=0, le=1)] = option(
        0.0, "Sample among tokens at least this share as probable as the most probable one."
    )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        probs = jax.nn.softmax(scores, axis=-1)
        keep = probs >= self.min_p * probs.max(-1, keepdims=True)
        return jnp.where(keep, scores, NEVER)
