"""Nucleus sampling (Holtzman et al. 2020)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, largest, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp


@dataclasses.dataclass(frozen=True)
class TopP(Processor):
    """Keeps the fewest most probable tokens that together have probability p."""

    order: ClassVar[int] = 120
    samples: ClassVar[bool] = True

    top_p: Annotated[float, Interval(gt=0, le=1)] = option(
        1.0, "Sample among the fewest most probable tokens with this total probability."
    )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        probs = jax.nn.softmax(scores, axis=-1)
        # A little less than p: the sum of all probabilities may round below 1.
        mass = self.top_p * (1 - 1e-6) * probs.sum(-1)
        keep = largest(scores, lambda keep: jnp.where(keep, probs, 0.0).sum(-1) >= mass)
        return jnp.where(keep, scores, NEVER)
