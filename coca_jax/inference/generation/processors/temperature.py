"""Temperature."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Interval

from coca_jax.inference.generation.processors.base import Context, Processor, option
from coca_jax.inference.generation.processors.lazy_jax import jax, jnp

_COLDEST = np.finfo(np.float32).tiny  # float32 would take a smaller one for 0, and divide by it


@dataclasses.dataclass(frozen=True)
class Temperature(Processor):
    """Divides scores, so that below 1 the most probable tokens come more often."""

    order: ClassVar[int] = 100
    samples: ClassVar[bool] = True

    temperature: Annotated[float, Interval(gt=0)] = option(
        1.0, "Below 1 samples more probable tokens, above 1 less probable ones.", most=10
    )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        # The largest stays 0 at any temperature; divided first, all would become minus infinity.
        below = scores - scores.max(-1, keepdims=True)
        return below / jnp.maximum(self.temperature, _COLDEST)
