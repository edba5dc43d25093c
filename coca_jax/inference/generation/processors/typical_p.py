"""Locally typical sampling (Meister et al. 2023)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Interval

from coca_jax.inference.generation.processors.base import NEVER, Context, Processor, largest, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp


@dataclasses.dataclass(frozen=True)
class TypicalP(Processor):
    """Keeps the tokens whose information is nearest to the distribution's entropy, with
    probability p together."""

    order: ClassVar[int] = 140
    samples: ClassVar[bool] = True

    typical_p: Annotated[float, Interval(gt=0, le=1)] = option(
        1.0, "Sample among the most typical tokens with this total probability."
    )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        log_probs = jax.nn.log_softmax(scores, axis=-1)
        probs = jnp.exp(log_probs)
        entropy = -jnp.where(probs > 0, probs * log_probs, 0.0).sum(-1, keepdims=True)
        near = -jnp.abs(-log_probs - entropy)
        keep = largest(
            near, lambda keep: jnp.where(keep, probs, 0.0).sum(-1) >= self.typical_p * (1 - 1e-6)
        )
        return jnp.where(keep, scores, NEVER)
